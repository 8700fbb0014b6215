"""The training loop of the demo, the same for the growing and the static networks."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastgrow as fg

from ..data import ImageData
from .models import widths_of

__all__ = ["Growth", "Run", "Settings", "accuracy", "flop_counter", "step_flops", "train"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the three networks of a run have in common."""

    epochs: int = 40
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 1e-2
    seed: int = 0
    growths: int = 5

    def growth_steps(self, steps: int) -> list[int]:
        """The steps on which to grow, evenly spaced over the first half of the training."""
        return sorted({max(1, steps * turn // (2 * self.growths)) for turn in range(1, self.growths + 1)})


@dataclass(frozen=True, slots=True)
class Growth:
    """One growth of the demo's network, and what it cost beyond the training step it came with."""

    report: fg.GrowthReport
    milliseconds: float
    steps: float  # the same in training steps of the network before it
    flops: int


@dataclass(slots=True)
class Run:
    """How the training of one network went."""

    name: str
    widths: list[list[int]] = field(default_factory=list)
    parameters: int = 0
    seconds: float = 0.0  # of training, growth and the search for sites included, evaluation not
    flops: int = 0  # of training, growth included
    accuracy: list[float] = field(default_factory=list)  # on the test images, after each epoch
    flops_after_epoch: list[int] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    search_milliseconds: float = 0.0


def train(
    name: str,
    model: nn.Sequential,
    data: ImageData,
    settings: Settings,
    *,
    grows: bool,
    on_epoch: Callable[[Run], None] = lambda run: None,
    on_growth: Callable[[Growth], None] = lambda growth: None,
) -> Run:
    """Trains `model` with AdamW and a cosine learning rate; if it `grows`, then where NAGN says so.

    Raises:
        GrowthError: the training images don't fill one batch.
    """
    per_epoch = len(data.train_images) // settings.batch
    if per_epoch == 0:
        raise fg.GrowthError(f"{len(data.train_images)} training images don't fill a batch of {settings.batch}")
    run = Run(name)
    steps = settings.epochs * per_epoch
    growth_steps = settings.growth_steps(steps) if grows else []
    torch.manual_seed(settings.seed)
    order = torch.Generator().manual_seed(settings.seed)  # its own: growth may draw numbers too
    example = (data.train_images[: settings.batch], data.train_labels[: settings.batch])
    optimizer = _optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    _warm_up(model, settings, *example, grows=grows)
    start = time.perf_counter()
    grower = _grower(model, optimizer, growth_steps, example_inputs=example[0]) if grows else None
    run.search_milliseconds = 1e3 * (time.perf_counter() - start)
    run.seconds = run.search_milliseconds / 1e3
    flops_of_step = step_flops(model, *example)
    usual: list[float] = []  # seconds of the steps since the last growth
    step = 0
    for _ in range(settings.epochs):
        model.train()
        for rows in _batches(len(data.train_images), settings.batch, order):
            step += 1
            x, y = data.train_images[rows], data.train_labels[rows]
            before = copy.deepcopy((model, optimizer)) if step in growth_steps else None
            start = time.perf_counter()
            _step(model, optimizer, grower, x, y)
            schedule.step()
            seconds = time.perf_counter() - start
            run.seconds += seconds
            run.flops += flops_of_step
            if grower and before and len(grower.history) > len(run.growths):
                one_step = statistics.median(usual or [seconds])
                growth = Growth(
                    grower.history[-1],
                    milliseconds=1e3 * (seconds - one_step),
                    steps=(seconds - one_step) / one_step,
                    flops=max(0, _growth_flops(*before, grower.sites, x, y) - flops_of_step),
                )
                run.growths.append(growth)
                run.flops += growth.flops
                flops_of_step = step_flops(model, *example)
                usual.clear()
                on_growth(growth)
            else:
                usual.append(seconds)
        run.accuracy.append(accuracy(model, data.test_images, data.test_labels))
        run.flops_after_epoch.append(run.flops)
        on_epoch(run)
    run.widths = widths_of(model)
    run.parameters = sum(p.numel() for p in model.parameters())
    return run


def step_flops(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Floating point operations of one forward and backward pass, counted on a copy of the model."""
    model = copy.deepcopy(model).train()
    with flop_counter() as counter:
        nn.functional.cross_entropy(model(x), y).backward()
    return int(counter.get_total_flops())


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)


def _warm_up(model: nn.Module, settings: Settings, x: Tensor, y: Tensor, *, grows: bool) -> None:
    """One step of a copy: the first of a process loads code for seconds, which is nobody's training."""
    model = copy.deepcopy(model).train()
    optimizer = _optimizer(model, settings)
    grower = _grower(model, optimizer, [1], example_inputs=x) if grows else None
    _step(model, optimizer, grower, x, y)


def _grower(model: nn.Module, optimizer: torch.optim.Optimizer, growth_steps: list[int], **sites: Any) -> fg.Grower:
    return fg.Grower(
        model,
        optimizer,
        when=fg.when.Milestones(growth_steps),
        where=fg.where.NAGN(max_new=8),
        how=fg.how.GradMax(),
        **sites,
    )


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, grower: fg.Grower | None, x: Tensor, y: Tensor) -> None:
    with grower.observe() if grower else nullcontext():
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if grower:
        grower.step()


def _growth_flops(model: nn.Module, optimizer: torch.optim.Optimizer, sites: fg.Sites, x: Tensor, y: Tensor) -> int:
    """FLOPs of a step in which a network grows, counted on a copy: counting would spoil the timing."""
    grower = _grower(model, optimizer, [1], sites=sites)
    with flop_counter() as counter:
        _step(model, optimizer, grower, x, y)
    return int(counter.get_total_flops())


def flop_counter() -> FlopCounterMode:
    """torch's counter, with the dense decompositions that growth needs counted too."""
    return FlopCounterMode(display=False, custom_mapping=_decompositions())


def _decompositions() -> dict[Any, Any]:
    """Operation counts of the dense decompositions, which torch's counter leaves out (Golub & Van Loan)."""

    def sides(shape: torch.Size) -> tuple[int, int, int]:
        *batch, m, n = shape
        return math.prod(batch), max(m, n), min(m, n)

    def svd(shape: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        count, m, n = sides(shape)
        return count * (6 * m * n * n + 20 * n**3)

    def qr(shape: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        count, m, n = sides(shape)
        return count * (4 * m * n * n - 4 * n**3 // 3)

    def eigh(shape: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        count, _, n = sides(shape)
        return count * 9 * n**3

    def cholesky(shape: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        count, _, n = sides(shape)
        return count * n**3 // 3

    def triangular(shape: torch.Size, right: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return math.prod(right) * shape[-1]

    aten = torch.ops.aten
    return {
        aten._linalg_svd: svd,
        aten.linalg_qr: qr,
        aten._linalg_eigh: eigh,
        aten.linalg_cholesky_ex: cholesky,
        aten.linalg_solve_triangular: triangular,
    }


def _batches(count: int, batch: int, order: torch.Generator) -> Iterator[Tensor]:
    rows = torch.randperm(count, generator=order)
    yield from rows[: count // batch * batch].split(batch)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that are classified right, in evaluation mode."""
    model.eval()
    hits = sum(
        int((model(x).argmax(dim=1) == y).sum()) for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    )
    return hits / len(labels)
