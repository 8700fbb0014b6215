"""What reading gradient norms costs a training step: paired steps, with a confidence interval."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn

import fastgrow as fg

from . import naive
from .measure import Timing, Variant, compare, paired_ratio, peak_bytes
from .models import Case, cases
from .rows import Row, Settings

__all__ = ["run"]

_PAIRS = 121  # the interval's width falls with their root: 1 % of a step needs many on a noisy machine


def run(settings: Settings) -> Iterator[Row]:
    for case in cases(settings):
        yield from _case(settings, case)


def _case(settings: Settings, case: Case) -> Iterator[Row]:
    torch.manual_seed(0)
    model = case.build().to(settings.device)
    sites = fg.find_sites(model, case.x)
    norms: dict[str, float] = {}
    watching: dict[str, Callable[[nn.Module], AbstractContextManager[object]]] = {
        "off": lambda model: nullcontext(),
        "on": lambda model: fg.observe(model, sites, nagn="after_norm", growth=False),  # as `where.NAGN` reads it
        "both places": lambda model: fg.observe(model, sites, nagn=True, growth=False),
        "naive": lambda model: naive.gradient_norms(model, norms),
    }
    variants = {name: _training(case, model, watch) for name, watch in watching.items()}
    others = settings.times(21)
    for name in ("both places", "naive"):
        variants[name].most = others
    timings = compare(variants, settings.device, settings.times(_PAIRS), warmup=2)
    peaks = {name: peak_bytes(partial(variants[name].run, None), settings.device) for name in ("on", "both places")}
    shape = f"{case.name}, {len(sites.layers)} layers"
    comparisons = [
        ("NAGN", "on", "off", "training step without"),
        ("NAGN at both places", "both places", "off", "training step without"),
        ("NAGN at both places", "both places", "naive", "step with .norm().item()"),
    ]
    for benchmark, ours, label, baseline in comparisons:
        count = min(len(timings[ours].samples), len(timings[label].samples))
        pair = [Timing(timings[name].samples[:count]) for name in (ours, label)]
        median, low, high = paired_ratio(*pair)
        yield settings.row(
            benchmark,
            shape,
            baseline,
            *pair,
            peak=peaks[ours],
            paired_ratio=median,
            low=low,
            high=high,
        )


def _training(case: Case, model: nn.Module, watch: Callable[[nn.Module], AbstractContextManager[object]]) -> Variant:
    own = copy.deepcopy(model)
    optimizer = torch.optim.SGD(own.parameters(), lr=1e-4, momentum=0.9)

    def step(_: object) -> None:
        with watch(own):
            case.loss(own).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Variant(step)
