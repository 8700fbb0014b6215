"""The networks, tasks and trainings of `teacher_student.py`."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from teacher_stack import METHODS as STACKED
from teacher_stack import StackedLinear, apart, stacked
from torch import Tensor, nn

import fastgrow as fg

POINTS = 1000


@dataclass(frozen=True)
class Case:
    """inputs : hidden : outputs of the teacher, and how the student comes there."""

    inputs: int
    hidden: int
    outputs: int
    start: int  # the student's hidden width
    units: int  # added at each growth
    every: int  # steps between growths
    first: int  # the step of the first growth
    steps: int
    kind: str = "mlp"
    size: int = 8  # of the images, where there are any

    @property
    def growths(self) -> dict[int, int]:
        """step -> units."""
        count = (self.hidden - self.start) // self.units
        return {self.first + self.every * turn: self.units for turn in range(count)}

    def flops(self, growths: dict[int, int], start: int) -> float:
        """Of a whole training, relative to the full-sized student's: both are linear in the hidden width."""
        total, width = 0, start
        for step in range(self.steps):
            width += growths.get(step, 0)
            total += width
        return total / (self.steps * self.hidden)


CASES = {
    "small": Case(20, 10, 10, start=5, units=1, every=200, first=200, steps=1500),
    "large": Case(100, 50, 10, start=25, units=5, every=500, first=500, steps=3500),
    "conv": Case(3, 10, 4, start=5, units=1, every=200, first=200, steps=1500, kind="conv"),
    "batchnorm": Case(20, 10, 10, start=5, units=1, every=200, first=200, steps=1500, kind="batchnorm"),
}


def network(case: Case, width: int, teacher: bool = False) -> nn.Sequential:
    """inputs : width : outputs."""
    if case.kind == "conv":
        first: nn.Module = nn.Conv2d(case.inputs, width, 3, padding=1, bias=not teacher)
        last: nn.Module = nn.Conv2d(width, case.outputs, 3, padding=1, bias=not teacher)
    else:
        first = nn.Linear(case.inputs, width, bias=not teacher)
        last = nn.Linear(width, case.outputs, bias=not teacher)
    norm = [nn.BatchNorm1d(width)] if case.kind == "batchnorm" and not teacher else []
    return nn.Sequential(first, *norm, nn.ReLU(), last)


def initialise_(model: nn.Module, how: str) -> None:
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or how == "torch":
            continue
        if how == "uniform":
            nn.init.uniform_(module.weight, -1, 1)
        else:
            nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def task(case: Case, seed: int, shared_teacher: bool) -> tuple[Tensor, Tensor]:
    """The points and the teacher's answers."""
    torch.manual_seed(1000 if shared_teacher else 1000 + seed)
    teacher = network(case, case.hidden, teacher=True)
    for parameter in teacher.parameters():
        nn.init.uniform_(parameter, -1, 1)
    torch.manual_seed(2000 + seed)
    shape = (POINTS // 10, case.inputs, case.size, case.size) if case.kind == "conv" else (POINTS, case.inputs)
    x = torch.randn(shape)
    with torch.no_grad():
        return x, teacher(x)


class NthDirection(fg.how.GradMax):
    """GradMax with the n-th singular direction instead of the first (figure 8)."""

    def __init__(self, n: int, scale: float) -> None:
        super().__init__(scale=scale)
        self.n = n

    def rank(self, site: fg.Site, units: int) -> int:
        return self.n + 1

    def start(self, newborns: fg.how.Newborns) -> fg.how.Start:
        found = newborns.directions
        assert found is not None
        newborns.directions = replace(
            found,
            left=found.left[:, self.n :],
            values=found.values[self.n :],
            right=found.right[:, self.n :],
        )
        return super().start(newborns)


def methods_of(options: argparse.Namespace) -> dict[str, Callable[[], fg.how.How]]:
    """Every growing method by name."""
    how, scale = fg.how, options.scale
    return {
        "gradmax": lambda: how.GradMax(scale=scale),
        "gradmax_opt": lambda: how.GradMaxOpt(scale=scale, rate=options.opt_rate),
        "gradmax_opt_tuned": lambda: how.GradMaxOpt(scale=scale, rate=options.tuned_rate, tangent=True),
        "gradmax_inverse": lambda: how.GradMaxOpt("incoming", scale=scale, rate=options.tuned_rate, tangent=True),
        "random": lambda: how.Random(scale=scale),
        "tiny": lambda: how.TINY(scale=scale, project=False),
        "tiny_projected": lambda: how.TINY(scale=scale),
        "zero_both": how.ZeroBoth,
        "zero_outgoing": how.ZeroOutgoing,
        "net2net": lambda: how.Net2Net(noise=1e-2),
        "sparkling": how.Sparkling,
        "splitting": how.Splitting,
        "firefly": lambda: how.Firefly(scale=scale),
        "firefly_full": lambda: how.Firefly("full", scale=scale),
        "variance_transfer": how.VarianceTransfer,
    }


BASELINES = ("baseline_small", "baseline_big")


@dataclass
class Run:
    """One training. norms: (step, gradient norm of all weights over the loss); checkpoints: just before each growth.

    Times are of what was trained, all seeds where they trained at once (together): of a growth, of a training step, and
    of a step's forward and backward pass.
    """

    losses: list[float]
    norms: list[tuple[int, float]]
    growth_ms: list[float]
    step_ms: float
    pass_ms: float
    checkpoints: list[nn.Module]
    together: bool


def criterion(output: Tensor, target: Tensor) -> Tensor:
    """The squared loss, mean over points and outputs."""
    return nn.functional.mse_loss(output, target)


def each_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(networks,): the loss of every network of a stack; of one that is none, alone."""
    output = model(x)
    return (output - y).square().mean((1, 2)) if _is_stack(model) else criterion(output, y)[None]


def _is_stack(model: nn.Module) -> bool:
    return any(isinstance(layer, StackedLinear) for layer in model.children())


def _gradient_norms(model: nn.Module) -> Tensor:
    """(networks,): the norm of all gradients of each."""
    members = _is_stack(model)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    squares = [g.square().sum((1, 2)) if members else g.square().sum()[None] for g in gradients]
    return torch.stack(squares).sum(0).sqrt()


def train(
    case: Case,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    options: argparse.Namespace,
    how: fg.how.How | None = None,
    growths: dict[int, int] | None = None,
    *,
    steps: int | None = None,
    rate: float | None = None,
    keep: bool = False,
) -> list[Run]:
    """Gradient descent on all points; `how` adds units at the steps of `growths`. A run for each network of a stack."""
    optimizer = torch.optim.SGD(model.parameters(), lr=options.rate if rate is None else rate)
    sites = fg.find_sites(model, x) if growths else None
    losses: list[list[float]] = []
    norms: list[tuple[int, list[float]]] = []
    checkpoints: list[list[nn.Module]] = []
    growth_ms: list[float] = []
    passes: list[float] = []
    growing = 0.0
    started = time.perf_counter()
    for step in range(case.steps if steps is None else steps):
        if growths and step in growths:
            began = time.perf_counter()
            if keep:
                checkpoints.append(apart(model))
            assert sites is not None
            before = time.perf_counter()
            fg.grow(
                model,
                {sites[0].name: growths[step]},
                how,
                sites=sites,
                optimizer=optimizer,
                closure=lambda: each_loss(model, x, y).sum(),
            )
            growth_ms.append(1000 * (time.perf_counter() - before))
            growing += time.perf_counter() - began
        began = time.perf_counter()
        loss = each_loss(model, x, y)
        optimizer.zero_grad()
        loss.sum().backward()
        passes.append(1000 * (time.perf_counter() - began))
        losses.append(loss.tolist())
        if step % 10 == 0:
            relative = _gradient_norms(model) / loss.detach().clamp(min=1e-30)
            norms.append((step, relative.tolist()))
        optimizer.step()
    step_ms = 1000 * (time.perf_counter() - started - growing) / max(1, len(losses))
    with torch.no_grad():
        losses.append(each_loss(model, x, y).tolist())
    return [
        Run(
            [row[at] for row in losses],
            [(step, row[at]) for step, row in norms],
            growth_ms,
            step_ms,
            statistics.median(passes) if passes else 0.0,
            [models[at] for models in checkpoints],
            _is_stack(model),
        )
        for at in range(len(losses[-1]))
    ]


def student(case: Case, width: int, seed: int, options: argparse.Namespace) -> nn.Sequential:
    torch.manual_seed(seed)
    model = network(case, width)
    initialise_(model, options.init)
    return model


def run_seeds(case: Case, method: str, options: argparse.Namespace, **more: Any) -> list[Run]:
    """One training for each seed, at once where their networks can be stacked.

    The losses are those of trainings one by one, up to rounding; methods that draw at random draw other values.
    """
    tasks = [task(case, seed, options.protocol == "notebook") for seed in range(options.seeds)]
    width = case.hidden if method == "baseline_big" else case.start
    how, growths = None, None
    if method not in BASELINES:
        how = methods_of(options)[method]
        growths = more.pop("growths", case.growths)
    if case.kind == "mlp" and options.seeds > 1 and method in STACKED and not options.alone:
        model = stacked([student(case, width, seed, options) for seed in range(options.seeds)])
        x, y = (torch.stack(each) for each in zip(*tasks, strict=True))
        return train(case, model, x, y, options, how and how(), growths, **more)
    return [
        run
        for seed, (x, y) in enumerate(tasks)
        for run in train(case, student(case, width, seed, options), x, y, options, how and how(), growths, **more)
    ]


def norm_after_growth(model: nn.Module, how: fg.how.How, units: int, x: Tensor, y: Tensor) -> float:
    """||dL/dW_new|| of the new incoming and outgoing weights, right after growth."""
    model = copy.deepcopy(model)
    sites = fg.find_sites(model, x)
    site = sites[0]
    width = sites.width(model, site)
    fg.grow(model, {site.name: units}, how, sites=sites, closure=lambda: criterion(model(x), y))
    model.zero_grad()
    criterion(model(x), y).backward()
    incoming = model.get_parameter(f"{site.producers[0]}.weight").grad
    outgoing = model.get_parameter(f"{site.consumers[0]}.weight").grad
    assert incoming is not None
    assert outgoing is not None
    return float((incoming[width:].square().sum() + outgoing[:, width:].square().sum()).sqrt())


def gradient_norms(case: Case, methods: Sequence[str], options: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Figures 2a, 9a, 11a: method -> seed -> growth of one unit, all from the checkpoints of Random's training."""
    result: dict[str, list[list[float]]] = {method: [] for method in methods if method not in BASELINES}
    for seed, run in enumerate(run_seeds(case, "random", options, keep=True, steps=max(case.growths) + 1)):
        x, y = task(case, seed, options.protocol == "notebook")
        for method, rows in result.items():
            rows.append(
                [
                    norm_after_growth(model, methods_of(options)[method](), least_units(method), x, y)
                    for model in run.checkpoints
                ]
            )
    return result


def least_units(method: str) -> int:
    """Units come in multiples of this."""
    return 2 if method == "variance_transfer" else 1


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def training_curves(case: Case, methods: Sequence[str], options: argparse.Namespace) -> dict[str, list[Run]]:
    """Figures 3a, 3b, 10, 12. A method that fails is entered in `options.failed`; the others run on."""
    runs: dict[str, list[Run]] = {}
    for method in methods:
        try:
            runs[method] = run_seeds(case, method, options)
        except Exception as error:
            options.failed[method] = error
            print(f"{method:20s} failed: {error}", flush=True)
            continue
        finals = [run.losses[-1] for run in runs[method]]
        print(f"{method:20s} final loss {mean(finals):.4g} ({min(finals):.4g} .. {max(finals):.4g})", flush=True)
    return runs
