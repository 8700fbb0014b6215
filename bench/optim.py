"""Optimizer steps with stage-wise rates against torch's own, on a network that has grown twice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import fastgrow as fg
import fastgrow.optim

from .measure import Variant, compare, peak_bytes
from .models import Case, cases
from .rows import Row, Settings

__all__ = ["run"]

_Build = Callable[[Any], torch.optim.Optimizer]
_OURS: dict[str, _Build] = {
    "SGD": lambda p: fastgrow.optim.SGD(p, lr=1e-4, momentum=0.9, rate_adaptation=True),
    "Adam": lambda p: fastgrow.optim.Adam(p, lr=1e-5, rate_adaptation=True),
}
_THEIRS: dict[str, dict[str, _Build]] = {
    "SGD": {
        "torch.optim.SGD foreach": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, foreach=True),
        "torch.optim.SGD fused": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, fused=True),
    },
    "Adam": {
        "torch.optim.Adam foreach": lambda p: torch.optim.Adam(p, lr=1e-5, foreach=True),
        "torch.optim.Adam fused": lambda p: torch.optim.Adam(p, lr=1e-5, fused=True),
    },
}


def run(settings: Settings) -> Iterator[Row]:
    for case in cases(settings):
        if not case.name.startswith(("ResNet-18", "ResNet-like", "MLP")):
            continue
        torch.manual_seed(0)
        seed = case.build().to(settings.device)
        include = [pair.producer for pair in case.pairs]
        sites = fg.find_sites(seed, case.x, include=include)
        for name, build in _OURS.items():
            optimizers = {"ours": _grown(case, seed, sites, build)}
            optimizers |= {label: _grown(case, seed, sites, make) for label, make in _THEIRS[name].items()}
            variants = {label: _stepping(optimizer) for label, optimizer in optimizers.items()}
            timings = compare(variants, settings.device, settings.times(21), warmup=3)
            own = optimizers["ours"]
            count = sum(p.numel() for group in own.param_groups for p in group["params"])
            peak = peak_bytes(own.step, settings.device)
            for label in _THEIRS[name]:
                yield settings.row(
                    "rate-adapted step", f"{name}, {case.name}, {count} parameters", label,
                    timings["ours"], timings[label], peak=peak, group=label.split()[-1],
                )  # fmt: skip


def _stepping(optimizer: torch.optim.Optimizer) -> Variant:
    return Variant(lambda _: optimizer.step())


def _grown(case: Case, seed: nn.Module, sites: fg.Sites, build: _Build) -> torch.optim.Optimizer:
    """An optimizer of a model that grew twice by a quarter, with gradients to step along."""
    torch.manual_seed(0)
    model = copy.deepcopy(seed)
    optimizer = build(model.parameters())
    for _ in range(2):
        case.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        units = {name: max(1, width // 4) for name, width in sites.widths(model).items()}
        fg.grow(model, units, fg.how.Random(), sites=sites, optimizer=optimizer)
    case.loss(model).backward()
    return optimizer
