"""What torch.compile pays when a network grows: seconds and graphs at each growth, and what makes it pay less."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastgrow as fg

from .measure import Timing
from .models import Case, cases
from .rows import Row, Settings

__all__ = ["run"]

_GROWTHS = 4


def run(settings: Settings) -> Iterator[Row]:
    chosen = ("MLP",) if settings.quick else ("conv", "MLP")
    for case in cases(settings):
        if not case.name.startswith(chosen):
            continue
        for label, dynamic, reserved in (
            ("as torch.compile is", False, False),
            ("widths dynamic", True, False),
            ("room reserved", False, True),
        ):
            found = _training(settings, case, 1 / 16, _GROWTHS, dynamic, reserved)
            yield _row(settings, f"{case.name}, {_GROWTHS} x n/16, {label}", found)
        # The same width in one growth: what rounding the units up to a quarter of the width saves.
        found = _training(settings, case, _GROWTHS / 16, 1)
        yield _row(settings, f"{case.name}, 1 x n/4, as torch.compile is", found)


@dataclass(frozen=True)
class _Found:
    """first: ms of the first step, growing: of each first step after a growth, both beyond a warm step; steps: ms of
    a warm step before the first growth and after the last; widening: ms of each growth itself; graphs: compiled in all.
    """

    first: float
    growing: Sequence[float]
    widening: Sequence[float]
    steps: tuple[float, float]
    graphs: int


def _row(settings: Settings, shape: str, found: _Found) -> Row:
    before, after = found.steps
    return settings.row(
        "recompilation",
        shape,
        "first compilation",
        Timing(found.growing),
        found.first,
        graphs=found.graphs,
        total_ms=sum(found.growing),
        grow_ms=statistics.median(found.widening),
        first_step_ms=before,
        last_step_ms=after,
    )


def _training(
    settings: Settings, case: Case, share: float, growths: int, dynamic: bool = False, reserved: bool = False
) -> _Found:
    """Growths of a compiled model. reserved: room for all of them is made before it is compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = case.build().to(settings.device)
    sites = fg.find_sites(model, case.x, include=[pair.producer for pair in case.pairs])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    counting = _Counting("eager" if settings.quick else "inductor")
    units = {name: max(1, int(share * width)) for name, width in sites.widths(model).items()}
    if reserved:
        widths = {name: width + growths * units[name] for name, width in sites.widths(model).items()}
        fg.reserve(model, widths, sites=sites, how=fg.how.Random(), optimizer=optimizer)
    # What an earlier variant compiled must not be read back from the disk.
    uncached = torch.compiler.config.patch(force_disable_caches=True)
    with uncached, _dynamic_widths() if dynamic else contextlib.nullcontext():
        compiled = torch.compile(model, backend=counting)

        def step() -> float:
            started = time.perf_counter()
            nn.functional.cross_entropy(compiled(case.x), case.y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if settings.cuda:
                torch.cuda.synchronize(settings.device)
            return (time.perf_counter() - started) * 1000

        def warm() -> float:
            return statistics.median(step() for _ in range(3 if settings.quick else 9))

        first = step() - step()
        before = warm()
        growing, widening = [], []
        for _ in range(growths):
            started = time.perf_counter()
            fg.grow(model, units, fg.how.Random(), sites=sites, optimizer=optimizer)
            widening.append((time.perf_counter() - started) * 1000)
            growing.append(step() - step())
        return _Found(first, growing, widening, (before, warm()), counting.graphs)


@contextlib.contextmanager
def _dynamic_widths() -> Iterator[None]:
    """Parameters may have dynamic shapes: the first growth then compiles for every width."""
    names = ("force_parameter_static_shapes", "force_nn_module_property_static_shapes")
    with torch._dynamo.config.patch(dict.fromkeys(names, False)):
        yield


class _Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self, backend: str) -> None:
        self.graphs = 0
        self._compile = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        self.graphs += 1
        return self._compile(graph, inputs)
