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
_METHODS: dict[str, dict[str, Any]] = {"SGD": dict(lr=1e-4, momentum=0.9), "Adam": dict(lr=1e-5)}
_IMPLEMENTATIONS = ("foreach", "fused")  # what parameters that never grew take, on either side


def _build(name: str, implementation: str, ours: bool, device: torch.device) -> _Build:
    options: dict[str, Any] = {**_METHODS[name], implementation: True}
    if ours:
        options["rate_adaptation"] = True
        if device.type == "cuda" and implementation == "foreach":
            del options["foreach"]  # torch's choice on a GPU, but said aloud it keeps grown parameters from the kernel
    return lambda params: getattr(fastgrow.optim if ours else torch.optim, name)(params, **options)


def run(settings: Settings) -> Iterator[Row]:
    for case in cases(settings):
        if not case.name.startswith(("ResNet-18", "ResNet-like", "MLP")):
            continue
        torch.manual_seed(0)
        seed = case.build().to(settings.device)
        include = [pair.producer for pair in case.pairs]
        sites = fg.find_sites(seed, case.x, include=include)
        for name in _METHODS:
            optimizers = {
                (who, one): _grown(case, seed, sites, _build(name, one, who == "ours", settings.device))
                for who in ("ours", f"torch.optim.{name}")
                for one in _IMPLEMENTATIONS
            }
            variants = {" ".join(key): _stepping(optimizer) for key, optimizer in optimizers.items()}
            timings = compare(variants, settings.device, settings.times(21), warmup=3)
            for one in _IMPLEMENTATIONS:
                own = optimizers["ours", one]
                count = sum(p.numel() for group in own.param_groups for p in group["params"])
                label = f"torch.optim.{name} {one}"
                yield settings.row(
                    "rate-adapted step", f"{name}, {case.name}, {count} parameters", label,
                    timings[f"ours {one}"], timings[label], peak=peak_bytes(own.step, settings.device), group=one,
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
