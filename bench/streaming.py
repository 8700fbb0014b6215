"""Growth directions from hundreds of batches by sketches: what they capture, what a step with them costs."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import fastgrow as fg
from fastgrow.operators import ConvPair, DenseMap, LinearMap, LinearPair
from fastgrow.ops import ConvGeometry
from fastgrow.sketch import Sketch, sketch_columns, sketched_directions

from .directions import captured_norm, factors
from .measure import Variant, compare, paired_ratio, peak_bytes
from .models import Case, cases, mlp, vgg, vgg_pairs
from .naive import Pair
from .rows import Row, Settings

__all__ = ["run"]

_RANKS = (4, 16)
_BATCH = 64


@dataclass
class _Sum:
    """One growth matrix summed as it is, and by sketches of several sizes."""

    sketches: dict[tuple[int, int], Sketch] = field(default_factory=dict)  # by k, columns
    matrix: Tensor | None = None

    def add(self, given: LinearMap) -> None:
        dense = given.dense().double()
        self.matrix = dense if self.matrix is None else self.matrix + dense
        for k in _RANKS:
            for columns in (k + 8, sketch_columns(k, given.granule), 2 * sketch_columns(k, given.granule)):
                sketch = self.sketches.setdefault((k, columns), Sketch(k, columns=columns))
                sketch.add(sketch.parts(given), 1.0, 1, torch.ones((), dtype=torch.bool, device=given.device))


def run(settings: Settings) -> Iterator[Row]:
    for case in _real(settings):
        for label, skipped in (("early", 5), ("late", 10 if settings.quick else 500)):
            sums = _trained(case, settings, skipped, 3 if settings.quick else 100)
            for name, total in sums.items():
                yield from _captured(settings, f"{case.name}, {label}, {name}", total)
    side = 96 if settings.quick else 1024
    for power in (0.0, 0.5, 1.0):
        total = _Sum()
        for given in _of_spectrum(side, power, settings):
            total.add(given)
        yield from _captured(settings, f"spectrum i^-{power:g}, {side}", total)
    for case in cases(settings):
        if case.name.startswith(("conv", "ResNet", "MLP")):
            yield from _cost(settings, case)


def _captured(settings: Settings, shape: str, total: _Sum) -> Iterator[Row]:
    assert total.matrix is not None
    values = torch.linalg.svdvals(total.matrix)
    for (k, columns), sketch in total.sketches.items():
        if sketch.exact:
            continue
        (found,) = sketched_directions([sketch], [1.0], [shape])
        held = sum(t.numel() * t.element_size() for t in (*sketch.sums, sketch.omega, sketch.psi))
        yield settings.row(
            "streaming, captured norm",
            f"{shape}, k {k}, {columns} columns",
            "the matrix itself",
            peak=held,
            baseline_peak=total.matrix.numel() * sketch.sums[0].element_size(),
            oversampling=round(columns / k, 1),
            truly_captured=captured_norm(total.matrix, found.left, values),
            estimated=found.captured,
        )


def _real(settings: Settings) -> list[Case]:
    """Networks on handwritten digits; on noise where scikit-learn is missing."""
    if importlib.util.find_spec("sklearn") is not None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    else:
        generator = torch.Generator().manual_seed(0)
        x, y = torch.rand(1797, 64, generator=generator), torch.randint(10, (1797,), generator=generator)
    x, y = x.to(settings.device), y.to(settings.device)
    widths: list[int | str] = [8, 16] if settings.quick else [32, 48, 64]
    wide = 48 if settings.quick else 256
    spread = torch.randn(64, wide, generator=torch.Generator().manual_seed(1)).to(settings.device) / 8
    pairs = tuple(Pair(str(2 * i), str(2 * i + 2)) for i in range(3))
    return [
        Case("conv net, digits", lambda: vgg(widths, 1), x.view(-1, 1, 8, 8), y, vgg_pairs(widths)),
        Case(f"MLP {wide}, digits", lambda: mlp(wide, 3), x @ spread, y, pairs),
    ]


def _trained(case: Case, settings: Settings, skipped: int, count: int) -> dict[str, _Sum]:
    """Train; of the last `count` steps the gradients are summed, each at its own weights."""
    torch.manual_seed(0)
    model = case.build().to(settings.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    sums: dict[str, _Sum] = {}
    for step in range(skipped + count):
        rows = torch.randint(len(case.x), (_BATCH,), generator=generator).to(settings.device)
        batch = replace(case, x=case.x[rows], y=case.y[rows])
        if step >= skipped:
            for producer, consumer, h, dz in factors(batch, model):
                name = next(name for name, module in model.named_modules() if module is producer)
                sums.setdefault(name, _Sum()).add(_map(producer, consumer, h, dz))
        optimizer.zero_grad()
        batch.loss(model).backward()
        optimizer.step()
    return sums


def _map(producer: nn.Module, consumer: nn.Module, h: Tensor, dz: Tensor) -> LinearMap:
    if isinstance(producer, nn.Conv2d) and isinstance(consumer, nn.Conv2d):
        return ConvPair(dz, h, ConvGeometry.of(producer), ConvGeometry.of(consumer))
    return LinearPair(dz, h)


def _of_spectrum(side: int, power: float, settings: Settings) -> Iterator[LinearMap]:
    """Batches that scatter around a matrix with singular values i^-power, as far as it is from zero."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, side, generator=generator)).Q for _ in range(2))
    mean = (left * torch.arange(1, side + 1) ** -power) @ right.mT
    for _ in range(4):
        noise = torch.randn(side, side, generator=generator)
        yield DenseMap((mean + noise * (mean.norm() / noise.norm())).to(settings.device))


def _cost(settings: Settings, case: Case) -> Iterator[Row]:
    torch.manual_seed(0)
    model = case.build().to(settings.device)
    sites = fg.find_sites(model, case.x, include=[pair.producer for pair in case.pairs])
    rank = {name: max(1, width // 16) for name, width in sites.widths(model).items()}

    off, on = copy.deepcopy(model), copy.deepcopy(model)
    watching = fg.observe(on, sites, nagn=False, growth="sketch", rank=rank)
    steps = {
        "off": _training(case, off, nullcontext),
        "on": _training(case, on, lambda: watching.block(last=False)),
    }
    timings = compare(steps, settings.device, settings.times(11), warmup=2)
    peaks = [peak_bytes(lambda step=step: step.run(None), settings.device) for step in steps.values()]
    median, low, high = paired_ratio(timings["on"], timings["off"])
    yield settings.row(
        "streaming, a training step",
        f"{case.name}, {len(sites)} sites, n/16",
        "step without",
        timings["on"],
        timings["off"],
        peak=peaks[1],
        baseline_peak=peaks[0],
        paired_ratio=median,
        low=low,
        high=high,
    )


def _training(case: Case, model: nn.Module, watch: Callable[[], AbstractContextManager[object]]) -> Variant:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step(_: object) -> None:
        with watch():
            case.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Variant(step)
