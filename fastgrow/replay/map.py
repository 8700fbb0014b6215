"""GradMax's growth matrix at any site, as a linear map: the middle replayed forward and back.

M X is the consumers' weight gradient for the image of X under the middle's derivative, M^T Y the way back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from ..errors import GrowthError
from ..layout import restricted_size, unit_positions
from ..operators import LinearMap, exponent_of, power_of_two, split_scale
from ..sites import LayerCall, Slot
from ..sites.nodes import bind, conv_padding
from .middle import Replay

__all__ = ["ReplayMap", "consumer_gradient", "consumer_pullback"]


def consumer_gradient(node: Node, call: LayerCall, v: Tensor, dz: Tensor) -> Tensor:
    """Weight gradient of a consumer for the input v and the output gradient dz, in its canonical layout."""
    if call.kind == "linear":
        dz, v = dz.reshape(-1, dz.shape[-1]), v.reshape(-1, v.shape[-1])
        return dz.T @ v
    if call.kind == "stacked":
        read, own, out = call.letters()
        return torch.einsum(f"{out},{read}->{own}", dz, v)
    return _conv_vjp(node, call, v, None, dz)[1]


def consumer_pullback(node: Node, call: LayerCall, columns: Tensor, v: Tensor, dz: Tensor) -> Tensor:
    """Gradient at a consumer's input for its new columns (out, in, *kernel)."""
    if call.kind == "linear":
        return (dz.reshape(-1, dz.shape[-1]) @ columns).reshape(v.shape)
    if call.kind == "stacked":
        read, own, out = call.letters()
        return torch.einsum(f"{out},{own}->{read}", dz, columns).sum_to_size(v.shape)
    return _conv_vjp(node, call, v, columns, dz)[0]


def _conv_vjp(node: Node, call: LayerCall, v: Tensor, columns: Tensor | None, dz: Tensor) -> tuple[Tensor, Tensor]:
    bound = bind(node)
    transposed = call.transposed
    spatial = v.dim() - 2
    groups = int(bound["groups"])
    kernel = node.args[1].meta["val"].shape[2:]  # type: ignore[union-attr]
    dilation = _per_dim(bound["dilation"], spatial)
    padding = conv_padding(bound["padding"], kernel, dilation)
    around = [side for pair in reversed(padding) for side in pair]
    uneven = any(before != after for before, after in padding)
    if uneven:  # padding="same" of an even kernel
        v = F.pad(v, around)
    if columns is None:
        shape = (v.shape[1], dz.shape[1] // groups) if transposed else (dz.shape[1], v.shape[1] // groups)
        weight = v.new_zeros((*shape, *kernel))
    else:
        weight = columns.transpose(0, 1) if transposed else columns
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        dz,
        v,
        weight,
        None,
        _per_dim(bound["stride"], spatial),
        [0 if uneven else before for before, _ in padding],
        dilation,
        transposed,
        _per_dim(bound["output_padding"], spatial) if transposed else [0] * spatial,
        groups,
        [columns is not None, columns is None, False],
    )
    if uneven and grad_input is not None:
        grad_input = F.pad(grad_input, [-side for side in around])
    return grad_input, grad_weight.transpose(0, 1) if transposed and grad_weight is not None else grad_weight


def _per_dim(value: Any, spatial: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (values * spatial if len(values) == 1 else values)]


class ReplayMap(LinearMap):
    """M of one site and one batch as a linear map on unit vectors, never formed.

    X (n, r): a column is a unit's incoming weights, producer after producer, each (rows of one unit, in,
    *kernel) flattened, then its bias's entries where ``bias`` counts. Y (m, r): its outgoing weights, consumer
    after consumer, each (out, positions of one unit, *kernel) flattened.

    base: the state around which the middle is linearised: incoming weights (n,) of every unit, or (n, units) of
    each; zero by default.
    """

    granule = 16  # as for convolutions, which most of the middles that need a replay lie between

    def __init__(self, replay: Replay, scale: float = 1.0, *, bias: bool = False, base: Tensor | None = None) -> None:
        self._replay = replay
        self._site = replay.site
        one = {**replay.sizes, self._site.axis: 1}
        self._in: dict[str, tuple[int, ...]] = {}
        for name in self._site.producers:
            slot = self._site.weight(name, "producer")
            shape = _canonical(replay.tensors[slot.tensor].shape, slot)
            rows = restricted_size(slot.layout, self._site.axis, one)
            self._in[name] = (rows, *shape[1:])
            if bias and any(slot.layer == name and slot.role == "bias" for slot in self._site.slots):
                members = shape[2:] if slot.members is not None else ()
                self._in[f"{name}.bias"] = (rows, *members)
        self._out: dict[str, tuple[int, ...]] = {}
        for name in self._site.consumers:
            slot = self._site.weight(name, "consumer")
            shape = _canonical(replay.tensors[slot.tensor].shape, slot)
            self._out[name] = (shape[0], restricted_size(slot.layout, self._site.axis, one), *shape[2:])
        self.shape = tuple(sum(map(math.prod, shapes.values())) for shapes in (self._out, self._in))  # type: ignore[assignment]
        read = {n: c for n, c in replay.consumers.items() if not replay.unread(*c)} or replay.consumers
        self._consumers = read
        self.dtype = replay.dtype
        gradients = [self._seen(call, number).to(self.dtype) for call, number in read.values()]
        self.device = gradients[0].device
        # power-of-two scaling: the products stay in float32's range whatever the units of the loss
        mantissa, extra = split_scale(scale)
        largest = torch.stack([exponent_of(gradient) for gradient in gradients]).amax()
        self.exponent = largest + extra
        shrink = power_of_two(-largest, self.dtype) * mantissa
        self._gradients = {node: gradient * shrink for node, gradient in zip(read, gradients, strict=True)}
        taps = {name: math.prod(shape[1:]) for name, shape in self._out.items()}
        self.column_flops = 2.0 * sum(
            gradient.numel() * taps[call.name] for gradient, (call, _) in zip(gradients, read.values(), strict=True)
        )
        for node, (call, _) in replay.producers.items():
            shape = node.meta["val"].shape
            self.column_flops += 2.0 * math.prod(self._in[call.name]) * math.prod(shape) / shape[call.channel]
        self.dense_flops = self.column_flops * min(self.shape)
        self._base = base
        if not (replay.live or replay.linear):
            self._check_silence()
        self._pulled: tuple[int, dict[Node, Tensor], Callable[..., Any]] | None = None

    def _check_silence(self) -> None:
        """New units that start at zero must write exactly zero, or the function would change."""
        units = 1 if self._base is None or self._base.dim() == 1 else self._base.shape[1]
        values = self._replay.forward(self._origin(units), units).values()
        if torch.stack([value.count_nonzero() for value in values]).any():
            kinds = ", ".join(dict.fromkeys(a.kind for a in self._site.activations)) or "the ops between"
            raise GrowthError(
                f"site {self._site.name!r}: {kinds}: what lies between its layers is not zero at zero, so units with "
                "zero incoming weights would change the function; use a method with zero outgoing weights "
                "(how.ZeroOutgoing, how.GradMaxOpt(form='incoming'))"
            )

    def _seen(self, call: LayerCall, number: int) -> Tensor:
        key = (call.name, number)
        if key not in self._replay.capture.gradients:
            raise GrowthError(
                f"layer {call.name!r}: no gradient reached its output (call {number + 1}); the loss must depend on it, "
                "and it must be called as a module"
            )
        return self._replay.capture.gradients[key]

    def _slot(self, name: str, role: str) -> Slot:
        if name in self._site.producers or role == "consumer":
            return self._site.weight(name, role)
        layer = name.removesuffix(".bias")
        return next(slot for slot in self._site.slots if slot.layer == layer and slot.role == "bias")

    def rows(self, columns: Tensor) -> dict[str, Tensor]:
        """Unit vectors (n, r) -> each producer's new rows (rows, in, *kernel), in their positions."""
        return self._spread(columns, self._in, "producer")

    def columns(self, vectors: Tensor) -> dict[str, Tensor]:
        """Unit vectors (m, r) -> each consumer's new columns (out, columns, *kernel), in their positions."""
        return self._spread(vectors, self._out, "consumer")

    def _spread(self, columns: Tensor, shapes: Mapping[str, tuple[int, ...]], role: str) -> dict[str, Tensor]:
        units = columns.shape[1]
        sizes = {**self._replay.sizes, self._site.axis: units}
        result, offset = {}, 0
        for name, shape in shapes.items():
            count = math.prod(shape)
            piece = columns[offset : offset + count].T.reshape(units, *shape)
            offset += count
            layout = self._slot(name, role).layout
            positions = unit_positions(layout, self._site.axis, sizes).reshape(-1).to(columns.device)
            if role == "producer":  # (units, rows, in, *k) -> (rows of all units, in, *k)
                flat = piece.reshape(-1, *shape[1:])
                result[name] = torch.empty_like(flat).index_copy(0, positions, flat)
            else:  # (units, out, positions, *k) -> (out, positions of all units, *k)
                flat = piece.movedim(0, 1).reshape(shape[0], -1, *shape[2:])
                result[name] = torch.empty_like(flat).index_copy(1, positions, flat)
        return result

    def _gather(
        self, slices: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], role: str, units: int
    ) -> Tensor:
        """The inverse of `_spread`."""
        sizes = {**self._replay.sizes, self._site.axis: units}
        pieces = []
        for name, shape in shapes.items():
            layout = self._slot(name, role).layout
            positions = unit_positions(layout, self._site.axis, sizes).reshape(-1).to(self.device)
            if role == "producer":
                piece = slices[name].index_select(0, positions).reshape(units, -1)
            else:
                piece = slices[name].index_select(1, positions).reshape(shape[0], units, -1, *shape[2:])
                piece = piece.movedim(1, 0).reshape(units, -1)
            pieces.append(piece)
        return torch.cat(pieces, 1).T

    def _origin(self, units: int) -> dict[str, Tensor]:
        if self._base is not None:
            return self.rows(self._base if self._base.dim() == 2 else self._base[:, None].expand(-1, units))
        return self.rows(torch.zeros(self.shape[1], units, dtype=self.dtype, device=self.device))

    def unit_matmat(self, columns: Tensor) -> Tensor:
        units = columns.shape[1]
        rows = self.rows(columns)
        if self._replay.linear:
            images = self._replay.forward(rows, units)
        else:
            forward = functools.partial(self._replay.forward, units=units)
            images = torch.func.jvp(forward, (self._origin(units),), (rows,))[1]
        gradients: dict[str, Tensor] = {}
        for node, (call, _) in self._consumers.items():
            gradient = consumer_gradient(node, call, images[node], self._gradients[node])
            gradients[call.name] = gradients[call.name] + gradient if call.name in gradients else gradient
        for name in self._out.keys() - gradients.keys():  # the loss does not depend on them
            gradients[name] = self.columns(columns.new_zeros(self.shape[0], units))[name]
        return self._gather(gradients, self._out, "consumer", units)

    def unit_rmatmat(self, columns: Tensor) -> Tensor:
        units = columns.shape[1]
        spread = self.columns(columns)
        values, pull = self._pullback(units)
        cotangents = {
            node: consumer_pullback(node, call, spread[call.name], values[node], self._gradients[node])
            for node, (call, _) in self._consumers.items()
        }
        cotangents |= {node: torch.zeros_like(values[node]) for node in values.keys() - cotangents.keys()}
        (rows,) = pull(cotangents)
        return self._gather(rows, self._in, "producer", units)

    def _pullback(self, units: int) -> tuple[dict[Node, Tensor], Callable[..., Any]]:
        if self._pulled is None or self._pulled[0] != units:
            found = torch.func.vjp(functools.partial(self._replay.forward, units=units), self._origin(units))
            self._pulled = (units, found[0], found[1])
        return self._pulled[1], self._pulled[2]

    def values(self, units: int = 1) -> dict[str, Tensor]:
        """What new units in the base state write at each consumer's input."""
        values, _ = self._pullback(units)
        return {call.name: values[node] for node, (call, _) in self._replay.consumers.items()}


def _canonical(shape: Sequence[int], slot: Slot) -> tuple[int, ...]:
    """A weight's shape as (out, in, *kernel)."""
    return tuple(shape[dim] for dim in slot.order(len(shape)))
