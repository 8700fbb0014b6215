"""What the arithmetic allows on a GPU: bytes and FLOPs over a data sheet's rates, for what was not measured.

Predictions, never rows: `bench.report` shows them in a column of their own. Each is the ratio of two floors,
``max(FLOPs / rate, bytes / bandwidth)``, of the networks in `bench.models`; launches, synchronisation and
everything that runs below its floor are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from .models import Case, gpu_cases
from .naive import Pair
from .rows import Settings

__all__ = ["H200", "ROUNDS", "Machine", "Work", "predictions"]

ROUNDS = 4  # of the block Krylov solver: what the gradients of real networks take (bench/NOTES.md)
SPARE = 8  # columns of a block beyond the units wanted


@dataclass(frozen=True)
class Machine:
    """Bytes a second of memory, FLOPs a second of dense matmuls."""

    name: str
    bandwidth: float
    tf32: float
    fp32: float


H200 = Machine("H200, data sheet", 4.8e12, 494e12, 67e12)


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of a piece of work; `+` and `*` as expected."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)

    def seconds(self, rate: float, machine: Machine) -> float:
        return max(self.flops / rate, self.bytes / machine.bandwidth)


def _layers(case: Case) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """name -> (module, its input, its output) of every linear and convolution layer, on the meta device."""
    model = case.build().to("meta")
    seen: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(
                lambda m, args, out, name=name: seen.setdefault(name, (m, args[0], out)) and None
            )
    with torch.no_grad():
        model(case.x.to("meta"))
    return seen


def _forward(module: nn.Module, x: Tensor, out: Tensor, columns: int | None = None) -> Work:
    """A layer's forward pass in float32; with so many output channels instead of its own."""
    if isinstance(module, nn.Conv2d):
        taps, inside, outside = module.weight[0, 0].numel(), module.in_channels, module.out_channels
        places = out.numel() / outside
    else:
        assert isinstance(module, nn.Linear)
        taps, inside, outside = 1, module.in_features, module.out_features
        places = out.numel() / outside
    wide = outside if columns is None else columns
    return Work(2.0 * places * wide * inside * taps, 4.0 * (x.numel() + places * wide))


def _training(layers: Iterable[tuple[nn.Module, Tensor, Tensor]]) -> Work:
    """Forward pass, input gradients, weight gradients: three passes of one size."""
    total = Work()
    for layer in layers:
        total += _forward(*layer) * 3
    return total


def _solving(layers: dict[str, tuple[nn.Module, Tensor, Tensor]], pair: Pair, share: float) -> tuple[Work, Work]:
    """What a site's solve multiplies in tf32, and in float32.

    `ROUNDS` rounds of M X and M^T Y on its two tensors, blocks of share x width + `SPARE` columns; then M^T Y for the
    columns that are kept.
    """
    width = layers[pair.producer][0].weight.shape[0]  # type: ignore[union-attr]
    kept = max(1, round(width * share))
    return _product(layers, pair, kept + SPARE) * (2 * ROUNDS), _product(layers, pair, kept)


def _product(layers: dict[str, tuple[nn.Module, Tensor, Tensor]], pair: Pair, columns: int) -> Work:
    """M X or M^T Y with so many columns."""
    producer, h, hidden = layers[pair.producer]
    consumer, _, dz = layers[pair.consumer]
    width = producer.weight.shape[0]  # type: ignore[union-attr]
    project = _forward(producer, h, hidden, columns)
    thin = hidden.numel() / width * columns
    taps = consumer.weight[0, 0].numel()  # type: ignore[union-attr]
    correlate = Work(2.0 * dz.numel() * taps * columns, 4.0 * (dz.numel() + thin))
    return project + correlate


def _growth_over_step(share: float) -> Iterator[float]:
    for case in gpu_cases(_META):
        layers = _layers(case)
        step = _training(layers.values()).seconds(H200.tf32, H200)
        solving = 0.0
        for pair in case.pairs:
            if pair.pool == 1 and not pair.averaged:
                rounds, last = _solving(layers, pair, share)
                solving += rounds.seconds(H200.tf32, H200) + last.seconds(H200.fp32, H200)
        yield solving / step


def _nagn() -> Iterator[float]:
    """Every layer's output gradient is read once more."""
    for case in gpu_cases(_META):
        layers = _layers(case).values()
        reading = Work(0.0, sum(4.0 * out.numel() for _, _, out in layers))
        yield 1 + reading.seconds(H200.fp32, H200) / _training(layers).seconds(H200.tf32, H200)


def _unfold_over_offsets() -> Iterator[float]:
    """3 x 3 on 3 x 3, batch 32: 81 pairs of taps against 25 distances between taps, as the auxiliary conv has."""
    for size, width in ((56, 64), (28, 128), (14, 256), (7, 512)):
        places, taps = 32.0 * size * size, 9
        outer = 4.0 * 2 * places * width
        unfolded = Work(2 * places * (taps * width) ** 2, outer + 4.0 * 2 * places * taps * width)
        ours = Work(2 * places * 25 * width**2, outer)
        yield unfolded.seconds(H200.tf32 / 3, H200) / ours.seconds(H200.tf32 / 3, H200)


def _directions() -> Iterator[float]:
    """20 n^3 FLOPs of a full SVD against 4 R r n^2, both at the matmul rate of float32."""
    for side, k in ((576, 4), (1152, 8), (2304, 16)):
        yield 20 * side / (4 * ROUNDS * (k + SPARE))


_META = Settings(torch.device("meta"))


@lru_cache(maxsize=1)
def predictions() -> dict[str, tuple[float, float]]:
    """Line of the targets -> (least, most) of its ratio, as the floors predict it for an H200."""
    found: dict[str, Iterable[float]] = {
        "growth n/16": _growth_over_step(1 / 16),
        "growth n/4": _growth_over_step(1 / 4),
        "unfold": _unfold_over_offsets(),
        "auxiliary": [1.0],
        "directions": _directions(),
        "nagn": _nagn(),
        "sum": [1.0],
        "rate-adapted": [1.0],
    }
    result = {}
    for line, values in found.items():
        ordered = sorted(values)
        result[line] = (ordered[0], ordered[-1])
    return result
