"""GradMax the paper's way, in plain torch: the baseline, written to be read and to be fair.

Each site gets an auxiliary zero layer from the producer's input to the consumer's output; its weight
gradient, taken apart into patches, is the growth matrix (exact only where the consumer pads nothing, as in
the paper); a full SVD gives the directions; widened tensors replace the layers'. (Evci et al., section 3.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Auxiliary", "Pair", "auxiliary_layers", "gradient_norms", "grow", "growth_matrix"]


@dataclass(frozen=True)
class Pair:
    """One producer and the consumer that reads it, with nothing but what is named between.

    norm: the batch norm of the producer's channels. pool: side (and stride) of max pooling between.
    averaged: the consumer is linear and reads the average over all positions.
    """

    producer: str
    consumer: str
    norm: str | None = None
    pool: int = 1
    averaged: bool = False


@dataclass
class Auxiliary:
    """The zero layer of a pair: the composition of producer and consumer as one layer."""

    pair: Pair
    weight: Tensor  # (O, I) or (O, I, K, K), zero
    stride: int = 1
    padding: int = 0
    input: Tensor | None = None

    @classmethod
    def of(cls, model: nn.Module, pair: Pair) -> Auxiliary:
        producer, consumer = model.get_submodule(pair.producer), model.get_submodule(pair.consumer)
        if isinstance(producer, nn.Linear):
            assert isinstance(consumer, nn.Linear)
            return cls(pair, _zeros(producer.weight, consumer.out_features, producer.in_features))
        assert isinstance(producer, nn.Conv2d)
        k1, s1, p1 = producer.kernel_size[0], producer.stride[0], int(producer.padding[0])
        if pair.averaged:
            assert isinstance(consumer, nn.Linear)
            zero = _zeros(producer.weight, consumer.out_features, producer.in_channels, k1, k1)
            return cls(pair, zero, s1, p1)
        assert isinstance(consumer, nn.Conv2d)
        k2, s2, p2 = consumer.kernel_size[0], consumer.stride[0], int(consumer.padding[0])
        # Max pooling of an all-zero map routes to the first element of each window: a stride.
        apart = s1 * pair.pool
        side = apart * (k2 - 1) + k1
        zero = _zeros(producer.weight, consumer.out_channels, producer.in_channels, side, side)
        return cls(pair, zero, apart * s2, apart * p2 + p1)

    def __call__(self, output: Tensor) -> Tensor:
        """The consumer's output, with the auxiliary layer's zeros added."""
        assert self.input is not None
        if self.weight.dim() == 2:
            return output + F.linear(self.input, self.weight)
        extra = F.conv2d(self.input, self.weight, stride=self.stride, padding=self.padding)
        if self.pair.averaged:
            return output + extra.mean((2, 3))
        return output + extra[..., : output.shape[2], : output.shape[3]]


def _zeros(like: Tensor, *shape: int) -> Tensor:
    return like.new_zeros(shape, requires_grad=True)


@contextlib.contextmanager
def auxiliary_layers(model: nn.Module, pairs: Sequence[Pair]) -> Iterator[list[Auxiliary]]:
    """Around a forward and backward pass: the auxiliary layers' weights have their gradients afterwards."""
    layers = [Auxiliary.of(model, pair) for pair in pairs]
    handles = []
    for layer in layers:

        def keep(module: nn.Module, args: tuple[Tensor, ...], layer: Auxiliary = layer) -> None:
            layer.input = args[0].detach()

        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, layer: Auxiliary = layer) -> Tensor:
            return layer(output)

        handles.append(model.get_submodule(layer.pair.producer).register_forward_pre_hook(keep))
        handles.append(model.get_submodule(layer.pair.consumer).register_forward_hook(add))
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def growth_matrix(model: nn.Module, layer: Auxiliary) -> Tensor:
    """(O k2 k2, I k1 k1): patches of the auxiliary gradient, one for each tap of the consumer."""
    gradient = layer.weight.grad
    assert gradient is not None
    producer, consumer = (
        model.get_submodule(layer.pair.producer),
        model.get_submodule(layer.pair.consumer),
    )
    if gradient.dim() == 2:
        return gradient
    assert isinstance(producer, nn.Conv2d)
    k1 = producer.kernel_size[0]
    step = producer.stride[0] * layer.pair.pool
    patches = gradient.unfold(2, k1, step).unfold(3, k1, step)  # (O, I, k2, k2, k1, k1)
    patches = patches.permute(0, 2, 3, 1, 4, 5)
    taps = consumer.kernel_size[0] ** 2 if isinstance(consumer, nn.Conv2d) else 1
    return patches.reshape(gradient.shape[0] * taps, -1)


def grow(
    model: nn.Module,
    layers: Sequence[Auxiliary],
    units: Mapping[str, int],
    optimizer: torch.optim.SGD,
    scale: float = 0.5,
) -> None:
    """Add units to every pair: incoming weights zero, outgoing ones along leading left singular vectors."""
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for layer in layers:
        count = units[layer.pair.producer]
        left, _, _ = torch.linalg.svd(growth_matrix(model, layer), full_matrices=False)
        _widen(model, layer.pair, left[:, :count], scale, replaced)
    _follow(optimizer, replaced)


def _widen(
    model: nn.Module, pair: Pair, columns: Tensor, scale: float, replaced: dict[nn.Parameter, nn.Parameter]
) -> None:
    count = columns.shape[1]
    consumer = model.get_submodule(pair.consumer)
    assert isinstance(consumer, (nn.Conv2d, nn.Linear))
    columns = columns * (scale * consumer.weight.detach().transpose(0, 1).flatten(1).norm(dim=1).mean())
    if isinstance(consumer, nn.Conv2d):
        taps = consumer.kernel_size
        new = columns.reshape(consumer.out_channels, *taps, count).permute(0, 3, 1, 2)
        consumer.in_channels += count
    else:
        new = columns
        consumer.in_features += count
    _replace(consumer, "weight", torch.cat([consumer.weight.detach(), new], 1), replaced)
    producer = model.get_submodule(pair.producer)
    assert isinstance(producer, (nn.Conv2d, nn.Linear))
    zeros = producer.weight.new_zeros(count, *producer.weight.shape[1:])
    _replace(producer, "weight", torch.cat([producer.weight.detach(), zeros]), replaced)
    if producer.bias is not None:
        bias = torch.cat([producer.bias.detach(), producer.bias.new_zeros(count)])
        _replace(producer, "bias", bias, replaced)
    if isinstance(producer, nn.Conv2d):
        producer.out_channels += count
    else:
        producer.out_features += count
    if pair.norm is not None:
        norm = model.get_submodule(pair.norm)
        assert isinstance(norm, nn.BatchNorm2d)
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            old = getattr(norm, name)
            _replace(norm, name, torch.cat([old.detach(), old.new_full((count,), value)]), replaced)
        for name, value in (("running_mean", 0.0), ("running_var", 1.0)):
            old = getattr(norm, name)
            setattr(norm, name, torch.cat([old, old.new_full((count,), value)]))
        norm.num_features += count


def _replace(module: nn.Module, name: str, value: Tensor, replaced: dict[nn.Parameter, nn.Parameter]) -> None:
    old, new = getattr(module, name), nn.Parameter(value)
    original = next((first for first, last in replaced.items() if last is old), old)
    replaced[original] = new
    setattr(module, name, new)


def _follow(optimizer: torch.optim.SGD, replaced: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Param groups hold the new parameters; momentum is kept and padded with zeros."""
    for group in optimizer.param_groups:
        group["params"] = [replaced.get(p, p) for p in group["params"]]
    for old, new in replaced.items():
        state = optimizer.state.pop(old, {})
        momentum = state.get("momentum_buffer")
        if momentum is not None:
            padded = new.detach().new_zeros(new.shape)
            padded[tuple(slice(length) for length in momentum.shape)] = momentum
            state["momentum_buffer"] = padded
        optimizer.state[new] = state


@contextlib.contextmanager
def gradient_norms(model: nn.Module, norms: dict[str, float]) -> Iterator[None]:
    """NAGN the naive way: ``.norm().item()`` of every linear and convolution layer's output gradient."""
    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue

        def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            def read(gradient: Tensor) -> None:
                per_sample = output.numel() // len(output)
                norms[name] = gradient.norm().item() * (len(output) / per_sample) ** 0.5

            output.register_hook(read)

        handles.append(module.register_forward_hook(watch))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
