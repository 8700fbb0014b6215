"""``python -m bench methods``: every way to start units, at every choice of where, from one seed network.

All cells of a network share seeds, data, order of the batches, optimizer, schedule, the steps on which they grow and
the budget: at each growth a cell may add the parameters that are left up to the big network's number, divided by the
growths that are left. Policies that ask for less end smaller; the table says what each ended with. Baselines are the
seed network and the big one, trained alike.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg
from fastgrow.data import ImageData, load_digits, load_folder
from fastgrow.demo.models import conv_net
from fastgrow.demo.training import accuracy, flop_counter
from fastgrow.schedule import flops

from .cells import BASELINES, Cell, Run, line
from .plots import draw
from .rows import ROOT, Settings

__all__ = ["HOWS", "NETWORKS", "WHERES", "main"]

RESULTS = ROOT / "bench" / "results" / "methods-cpu.json"

HOWS: dict[str, Callable[[], fg.how.How]] = {
    "GradMax": fg.how.GradMax,
    "GradMaxOpt": lambda: fg.how.GradMaxOpt(rate=0.1, tangent=True),
    "GradMaxOpt-inverse": lambda: fg.how.GradMaxOpt("incoming", rate=0.1, tangent=True),
    "TINY": fg.how.TINY,
    "Random": fg.how.Random,
    "ZeroOutgoing": fg.how.ZeroOutgoing,
    "ZeroBoth": fg.how.ZeroBoth,
    "Net2Net": lambda: fg.how.Net2Net(noise=1e-2),
    "Sparkling": fg.how.Sparkling,
    "Splitting": lambda: fg.how.Splitting(rounds=8),
    "Firefly": fg.how.Firefly,
    "Firefly-full": lambda: fg.how.Firefly("full"),
    "VarianceTransfer": fg.how.VarianceTransfer,
}
"""Every growth method; copies get noise where plain SGD would leave them copies, Splitting few Lanczos steps."""

WHERES: dict[str, Callable[..., fg.where.Where]] = {
    "Everywhere": lambda **limits: fg.where.Everywhere(fraction=1.0, **limits),
    "RoundRobin": lambda **limits: fg.where.RoundRobin(4, **limits),
    "NAGN": lambda **limits: fg.where.NAGN(**limits),
    "SingularValues": lambda **limits: fg.where.SingularValues(**limits),
    "NORTH": lambda **limits: fg.where.NORTH(gamma=0.7, **limits),
    "FirstOrderGain": lambda **limits: fg.where.FirstOrderGain(4, best=2, **limits),
}
"""Every policy, asking for at most as many units as a site has, and otherwise for more than the budget leaves."""


def _mlp(widths: Sequence[int], data: ImageData) -> nn.Sequential:
    first, second = widths
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(data.train_images[0].numel(), first),
        nn.ReLU(),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, data.classes),
    )


def _conv(widths: Sequence[int], data: ImageData) -> nn.Sequential:
    """Three 3 x 3 convolutions with biases, Kaiming's initialisation, no norms; the head reads the whole map."""
    first, second, third = widths
    channels, height, width = data.train_images.shape[1:]
    model = nn.Sequential(
        nn.Conv2d(channels, first, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(second, third, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(third * (height // 2) * (width // 2), data.classes),
    )
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return model


def _conv_norm(widths: Sequence[int], data: ImageData) -> nn.Sequential:
    """Four 3 x 3 convolutions with batch norms and no biases; the head reads averages over the map."""
    return conv_net((widths[:2], widths[2:]), data.train_images.shape[1], data.classes)


@dataclass(frozen=True)
class Network:
    """Widths of the seed and of the big network, both even, and how long they train."""

    build: Callable[[Sequence[int], ImageData], nn.Sequential]
    seed: tuple[int, ...]
    big: tuple[int, ...]
    epochs: int
    lr: float


NETWORKS = {
    "mlp": Network(_mlp, (6, 6), (24, 24), epochs=20, lr=0.05),
    "conv": Network(_conv, (2, 2, 4), (12, 12, 16), epochs=10, lr=0.02),
    "conv-norm": Network(_conv_norm, (4, 4, 6, 6), (12, 12, 18, 18), epochs=10, lr=0.05),
}


@dataclass(frozen=True)
class Plan:
    """What all cells have in common."""

    data: ImageData
    seeds: int
    epochs: int | None  # None: the network's own
    batch: int = 64
    growths: int = 5
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def growth_steps(self, steps: int) -> list[int]:
        """Evenly spaced over the first 60 % of the training."""
        return sorted({max(1, round(0.6 * steps * turn / self.growths)) for turn in range(1, self.growths + 1)})


class Bench:
    """One network's cells. Sites are found once; the FLOPs of growths are counted on the first seed."""

    def __init__(self, name: str, plan: Plan, quick: bool = False) -> None:
        self.name, self.plan, self.quick = name, plan, quick
        self.network = NETWORKS[name]
        self.example = plan.data.train_images[: plan.batch]
        self.sites = fg.find_sites(self._model(self.network.seed, 0), self.example)
        self.cap = sum(p.numel() for p in self._model(self.network.big, 0).parameters())
        self._flops: dict[tuple[int, ...], float] = {}

    def cell(self, how: str, where: str) -> Cell:
        cell = Cell(self.name, how, where)
        counted: list[float] = []
        for seed in range(self.plan.seeds):
            try:
                cell.runs.append(self._train(seed, self.network.seed, how, where, counted))
            except fg.GrowthError as error:
                cell.runs, cell.refused = [], str(error)
                break
        return cell

    def baseline(self, name: str) -> Cell:
        widths = self.network.seed if name == "small" else self.network.big
        return Cell(self.name, name, "", [self._train(seed, widths) for seed in range(self.plan.seeds)])

    def _model(self, widths: Sequence[int], seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return self.network.build(widths, self.plan.data)

    def _train(
        self, seed: int, widths: Sequence[int], how: str = "", where: str = "", counted: list[float] | None = None
    ) -> Run:
        """counted: FLOPs of each growth, filled on the first seed."""
        counted = [] if counted is None else counted
        plan, data, run = self.plan, self.plan.data, Run(seed)
        model = self._model(widths, seed)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=self.network.lr, momentum=plan.momentum, weight_decay=plan.weight_decay
        )
        per_epoch = len(data.train_images) // plan.batch
        epochs = plan.epochs or self.network.epochs
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
        growth_steps = plan.growth_steps(epochs * per_epoch)
        grower = self._grower(model, optimizer, how, where, growth_steps) if how else None
        order = torch.Generator().manual_seed(seed)  # its own: growth draws numbers too
        step_flops, step = self._step_flops(model), 0
        for _ in range(epochs):
            model.train()
            for rows in torch.randperm(len(data.train_images), generator=order)[: per_epoch * plan.batch].split(
                plan.batch
            ):
                step += 1
                x, y = data.train_images[rows], data.train_labels[rows]
                started = time.process_time()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                run.seconds += time.process_time() - started
                run.flops += step_flops
                if grower is None:
                    continue
                if step in growth_steps:
                    turn = growth_steps.index(step)
                    self._share(grower, len(growth_steps) - turn)
                    if seed == 0:
                        counted.append(self._growth_flops(grower, how, x, y))
                    # A growth that came to nothing was looked for all the same.
                    run.growth_flops += counted[turn]
                clocks = time.process_time(), time.perf_counter()
                report = grower.step(closure=lambda: F.cross_entropy(model(x), y))  # noqa: B023
                if report is not None:
                    run.gains.append(_gains(report))
                    # The growth's part of the step, by the wall clock, of the CPU time that the step took.
                    share = report.seconds / (time.perf_counter() - clocks[1])
                    run.growth_seconds += share * (time.process_time() - clocks[0])
                    step_flops = self._step_flops(model)
            run.curve.append((run.flops + run.growth_flops, accuracy(model, data.test_images, data.test_labels)))
        run.seconds += run.growth_seconds
        run.flops += run.growth_flops
        run.accuracy = run.curve[-1][1]
        with torch.no_grad():
            model.eval()
            run.loss = float(F.cross_entropy(model(data.train_images), data.train_labels))
        run.parameters = sum(p.numel() for p in model.parameters())
        run.widths = list(self.sites.widths(model).values())
        return run

    def _how(self, how: str) -> fg.how.How:
        method = HOWS[how]()
        if self.quick and isinstance(method, fg.how.Firefly):
            method.steps = 3
        return method

    def _grower(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        how: str,
        where: str,
        steps: Sequence[int],
    ) -> fg.Grower:
        limits: dict[str, Any] = {"round_to": 2, "max_parameters": self.cap, "budget": {"parameters": self.cap}}
        return fg.Grower(
            model,
            optimizer,
            sites=self.sites,
            when=fg.when.Milestones(list(steps)),
            where=WHERES[where](**limits),
            how=self._how(how),
            measure_gain=True,
        )

    def _share(self, grower: fg.Grower, left: int) -> None:
        """This growth's budget: what is left up to the cap, over the growths left."""
        present = sum(p.numel() for p in grower.model.parameters())
        share = max(1.0, (self.cap - present) / left)
        grower.where.limits = dataclasses.replace(grower.where.limits, budget={"parameters": share})

    def _growth_flops(self, grower: fg.Grower, how: str, x: Tensor, y: Tensor) -> float:
        """FLOPs of the growth that comes next, its own passes included, counted on a copy."""
        model, optimizer = copy.deepcopy((grower.model, grower.optimizers[0]))
        where = copy.deepcopy(grower.where)
        other = fg.Grower(model, optimizer, sites=self.sites, when=fg.when.Every(1), where=where, how=self._how(how))
        with torch.random.fork_rng(), flop_counter() as counter:
            other.step(closure=lambda: F.cross_entropy(model(x), y))
        return float(counter.get_total_flops())

    def _step_flops(self, model: nn.Module) -> float:
        widths = tuple(self.sites.widths(model).values())
        if widths not in self._flops:
            self._flops[widths] = float(flops(model, self.example))
        return self._flops[widths]


def _gains(report: fg.GrowthReport) -> dict[str, Any]:
    captured = [site.captured for site in report.sites if site.captured is not None]
    return {
        "step": report.step,
        "sites": {site.name: [site.predicted_gain, site.measured_gain] for site in report.sites},
        "predicted": report.predicted_gain,
        "measured": report.measured_gain,
        "loss_change": report.loss_change,
        "captured": min(captured, default=None),
    }


_Task = tuple[str, str, str]  # network, how or baseline, where
_benches: dict[str, Bench] = {}


def _carry_out(plan: Plan, quick: bool, task: _Task) -> Cell:
    """One cell; each process keeps its networks' benches."""
    torch.set_num_threads(1)  # networks this small only lose by being shared out
    name, how, where = task
    if name not in _benches:
        # The first growth of a process loads code for seconds, which is no cell's cost.
        Bench(name, Plan(plan.data.head(64, 32), 1, 1, batch=32, growths=1), True).cell("GradMax", "Everywhere")
        _benches[name] = Bench(name, plan, quick)
    bench = _benches[name]
    return bench.cell(how, where) if where else bench.baseline(how)


def run(
    plan: Plan,
    networks: Sequence[str],
    hows: Sequence[str],
    wheres: Sequence[str],
    quick: bool = False,
    jobs: int = 1,
) -> Iterator[Cell]:
    """Every cell in order, network after network, baselines first; `jobs` processes share them."""
    _benches.clear()
    tasks: list[_Task] = []
    for name in networks:
        tasks += [(name, baseline, "") for baseline in BASELINES]
        tasks += [(name, how, where) for how in hows for where in wheres]
    if jobs == 1:
        yield from map(partial(_carry_out, plan, quick), tasks)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield from pool.map(partial(_carry_out, plan, quick), tasks)


def write(path: Path, plan: Plan, cells: Sequence[Cell]) -> None:
    """Conditions and cells, one cell a line, numbers of five digits."""
    conditions = Settings(torch.device("cpu")).complete(Settings(torch.device("cpu")).row("methods", "", ""))
    head = {
        "data": plan.data.name,
        "train": len(plan.data.train_images),
        "test": len(plan.data.test_images),
        "seeds": plan.seeds,
        "batch": plan.batch,
        "growths": plan.growths,
        "networks": {
            name: {
                "seed": network.seed,
                "big": network.big,
                "epochs": plan.epochs or network.epochs,
                "lr": network.lr,
            }
            for name, network in NETWORKS.items()
        },
        **{key: getattr(conditions, key) for key in ("device", "torch", "commit", "date")},
        "load": conditions.more.get("load"),
    }
    lines = ",\n".join(json.dumps(_rounded(dataclasses.asdict(cell))) for cell in cells)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"conditions": {json.dumps(head)},\n"cells": [\n{lines}\n]}}\n')


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench methods", description="Compare how and where networks grow, on equal budgets."
    )
    parser.add_argument("--methods", nargs="+", choices=list(HOWS), default=list(HOWS), metavar="HOW")
    parser.add_argument("--where", nargs="+", choices=list(WHERES), default=list(WHERES), metavar="WHERE")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST or CIFAR-10 (default: digits)")
    parser.add_argument("--epochs", type=int, help="default: " + _epochs())
    parser.add_argument("--json", type=Path, help=f"default: {RESULTS.relative_to(ROOT)}; with --quick none")
    parser.add_argument("--plots", type=Path, help="folder of the plots (python -m bench report draws the page's)")
    parser.add_argument("--quick", action="store_true", help="few images, one seed, two growths: seconds")
    return parser


def _epochs() -> str:
    return ", ".join(f"{network.epochs} ({name})" for name, network in NETWORKS.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells, print each as it comes, write JSON and plots."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name in ("seeds", "epochs", "jobs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: wanted at least 1")
    data = load_folder(options.data) if options.data else load_digits()
    plan = Plan(data, options.seeds, options.epochs)
    if options.quick:
        plan = Plan(data.head(192, 100), 1, options.epochs or 2, batch=32, growths=2)
    started = time.perf_counter()
    target = options.json or (None if options.quick else RESULTS)
    cells = []
    for cell in run(plan, options.networks, options.methods, options.where, options.quick, options.jobs):
        cells.append(cell)
        print(line(cell), flush=True)
        if target is not None:  # as it goes: an interrupted run keeps what it has
            write(target, plan, cells)
    print(f"# {len(cells)} cells in {time.perf_counter() - started:.0f} s", flush=True)
    if options.plots is not None:
        for path in draw(cells, options.plots):
            print(f"{path} written")
    return 0
