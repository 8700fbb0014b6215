"""The figures of `teacher_student.py`: each function returns the lines of one, {label: [[x, y], ...]}."""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from teacher_training import (
    BASELINES,
    Case,
    NthDirection,
    Run,
    criterion,
    gradient_norms,
    mean,
    methods_of,
    run_seeds,
    student,
    task,
    train,
    training_curves,
)

import fastgrow as fg

Lines = dict[str, list[list[float]]]


def _mean_curve(runs: Sequence[Run]) -> list[list[float]]:
    length = min(len(run.losses) for run in runs)
    return [[step, mean([run.losses[step] for run in runs])] for step in range(0, length, 10)]


def figure_norms(case: Case, methods: Sequence[str], options: argparse.Namespace) -> Lines:
    found = gradient_norms(case, methods, options)
    steps = sorted(case.growths)
    return {
        method: [[step, mean([row[at] for row in rows])] for at, step in enumerate(steps)]
        for method, rows in found.items()
    }


def figure_relative_norms(case: Case, methods: Sequence[str], options: argparse.Namespace) -> Lines:
    lines: Lines = {}
    for method, runs in training_curves(case, methods, options).items():
        count = min(len(run.norms) for run in runs)
        lines[method] = [[runs[0].norms[at][0], mean([run.norms[at][1] for run in runs])] for at in range(count)]
    return lines


def figure_difference(case: Case, methods: Sequence[str], options: argparse.Namespace) -> Lines:
    """L(f_random) - L(f_gradmax) over 500 steps after one unit is grown, from each of Random's checkpoints."""
    sums: dict[str, list[list[float]]] = {}
    for seed, run in enumerate(run_seeds(case, "random", options, keep=True, steps=max(case.growths) + 1)):
        x, y = task(case, seed, options.protocol == "notebook")
        for turn, model in enumerate(run.checkpoints, 1):
            grown = {
                method: train(
                    case, copy.deepcopy(model), x, y, options, methods_of(options)[method](), {0: 1}, steps=500
                )[0].losses
                for method in ("random", "gradmax")
            }
            difference = [r - g for r, g in zip(grown["random"], grown["gradmax"], strict=True)]
            sums.setdefault(f"growth {turn}", []).append(difference)
    return {
        name: [[step, mean([row[step] for row in rows])] for step in range(0, 501, 10)] for name, rows in sums.items()
    }


def figure_curves(case: Case, methods: Sequence[str], options: argparse.Namespace) -> Lines:
    return {method: _mean_curve(runs) for method, runs in training_curves(case, methods, options).items()}


def figure_time(case: Case, methods: Sequence[str], options: argparse.Namespace) -> Lines:
    """Milliseconds of one growth (at 0) and of one training step (at 1), of all seeds where they train at once."""
    return {
        method: [
            [0, statistics.median([t for run in runs for t in run.growth_ms])],
            [1, statistics.median(run.step_ms for run in runs)],
        ]
        for method, runs in training_curves(case, [m for m in methods if m not in BASELINES], options).items()
    }


def figure_rates(case: Case, methods: Sequence[str], options: argparse.Namespace) -> Lines:
    return {
        f"lr {rate}": _mean_curve(run_seeds(case, "gradmax", options, rate=rate))
        for rate in (0.2, 0.1, 0.05, 0.02, 0.01)
    }


def figure_correlation(case: Case, methods: Sequence[str], options: argparse.Namespace) -> Lines:
    """Pearson correlation between the singular value a unit is grown from and the loss afterwards (negative: good)."""
    lines: Lines = {}
    top, after = 5, case.steps // 5
    for grow_at in (case.steps // 15, case.steps // 5, case.steps * 2 // 5):
        values: list[list[float]] = []
        for seed in range(options.seeds):
            x, y = task(case, seed, options.protocol == "notebook")
            model = student(case, case.start, seed, options)
            train(case, model, x, y, options, steps=grow_at)
            sites = fg.find_sites(model, x)
            probe = copy.deepcopy(model)
            with fg.observe(probe, sites, nagn=False, rank=top) as seen:
                criterion(probe(x), y).backward()
            singular = seen.directions(top)[sites[0].name].values
            losses = []
            for n in range(len(singular)):
                grown = copy.deepcopy(model)
                how = NthDirection(n, options.scale)
                losses.append(train(case, grown, x, y, options, how, {0: 1}, steps=after)[0].losses)
            table = torch.tensor(losses, dtype=torch.float64)  # (n, steps)
            pair = [torch.stack([singular.double(), table[:, step]]) for step in range(10, after + 1, 10)]
            values.append([float(torch.corrcoef(two)[0, 1]) for two in pair])
        lines[f"grown at {grow_at}"] = [
            [10 * (at + 1), mean([row[at] for row in values])] for at in range(len(values[0]))
        ]
    return lines


def figure_start(case: Case, methods: Sequence[str], options: argparse.Namespace) -> Lines:
    """13b: the step of the first growth, at the same FLOPs for all."""
    budget = case.flops(case.growths, case.start) * case.steps * case.hidden
    lines: Lines = {}
    for first in (0, 100, 200, 400, 600):
        growths = {first + case.every * turn: case.units for turn in range(len(case.growths))}
        steps = _steps_for(budget, growths, case.start)
        runs = run_seeds(case, "gradmax", options, growths=growths, steps=steps)
        lines[f"first growth at {first}"] = _mean_curve(runs)
    return lines


def figure_initial_width(case: Case, methods: Sequence[str], options: argparse.Namespace) -> Lines:
    """13c: the width before the first growth, at the same FLOPs for all, growing from the start."""
    budget = case.flops(case.growths, case.start) * case.steps * case.hidden
    lines: Lines = {}
    for width in sorted({case.start - 2 * case.units, case.start, case.start + 2 * case.units}):
        turns = (case.hidden - width) // case.units
        growths = {case.every * turn: case.units for turn in range(turns)}
        chosen = replace(case, start=width)
        steps = _steps_for(budget, growths, width)
        for method in ("gradmax", "random"):
            runs = run_seeds(chosen, method, options, growths=growths, steps=steps)
            lines[f"{method} ({width})"] = _mean_curve(runs)
    return lines


def figure_beyond(case: Case, methods: Sequence[str], options: argparse.Namespace) -> Lines:
    """13d: to 1.5 times the teacher's width."""
    turns = (case.hidden * 3 // 2 - case.start) // case.units
    growths = {case.first + case.every * turn: case.units for turn in range(turns)}
    steps = max(growths) + case.steps - max(case.growths)
    lines = {
        "gradmax to 1.5 x": _mean_curve(run_seeds(case, "gradmax", options, growths=growths, steps=steps)),
    }
    for method in ("gradmax", "baseline_big"):
        lines[method] = _mean_curve(run_seeds(case, method, options, steps=steps))
    return lines


def _steps_for(budget: float, growths: dict[int, int], width: int) -> int:
    """Steps whose summed widths come to the budget."""
    total, step = 0, 0
    while total < budget:
        width += growths.get(step, 0)
        total += width
        step += 1
    return step


Figure = Callable[[Case, Sequence[str], argparse.Namespace], Lines]
FIGURES: dict[str, tuple[str, Figure]] = {
    "2a": ("small", figure_norms),
    "2b": ("small", figure_relative_norms),
    "2c": ("small", figure_difference),
    "3a": ("small", figure_curves),
    "3b": ("large", figure_curves),
    "3c": ("small", figure_time),
    "7": ("small", figure_rates),
    "8": ("small", figure_correlation),
    "9a": ("conv", figure_norms),
    "9b": ("conv", figure_relative_norms),
    "9c": ("conv", figure_difference),
    "10": ("conv", figure_curves),
    "11a": ("batchnorm", figure_norms),
    "11b": ("batchnorm", figure_relative_norms),
    "11c": ("batchnorm", figure_difference),
    "12": ("batchnorm", figure_curves),
    "13a": ("small", figure_curves),
    "13b": ("small", figure_start),
    "13c": ("small", figure_initial_width),
    "13d": ("small", figure_beyond),
}


def draw(name: str, lines: Lines, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for label, points in lines.items():
        axes.plot([p[0] for p in points], [p[1] for p in points], marker="o" if len(points) < 12 else "", label=label)
    axes.set_xlabel("step")
    axes.set_title(f"GradMax, figure {name}")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
