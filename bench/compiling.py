"""What torch.compile pays when a network grows: seconds and graphs at each growth, and what makes it pay less."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
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
        for label, dynamic in (("as torch.compile is", False), ("widths dynamic", True)):
            first, steps, graphs = _training(settings, case, 1 / 16, _GROWTHS, dynamic)
            growing = Timing(steps)
            shape = f"{case.name}, {_GROWTHS} x n/16, {label}"
            more = {"graphs": graphs, "total_ms": sum(steps)}
            yield settings.row("recompilation", shape, "first compilation", growing, first, **more)
        # The same width in one growth: what rounding the units up to a quarter of the width saves.
        first, steps, graphs = _training(settings, case, _GROWTHS / 16, 1, False)
        more = {"graphs": graphs, "total_ms": sum(steps)}
        shape = f"{case.name}, 1 x n/4, as torch.compile is"
        yield settings.row("recompilation", shape, "first compilation", Timing(steps), first, **more)


def _training(
    settings: Settings, case: Case, share: float, growths: int, dynamic: bool
) -> tuple[float, Sequence[float], int]:
    """ms of the first step, ms of each first step after a growth, both beyond a warm step; graphs compiled in all."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = case.build().to(settings.device)
    sites = fg.find_sites(model, case.x, include=[pair.producer for pair in case.pairs])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    counting = _Counting("eager" if settings.quick else "inductor")
    units = {name: max(1, int(share * width)) for name, width in sites.widths(model).items()}
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

        first = step() - step()
        spent = []
        for _ in range(growths):
            fg.grow(model, units, fg.how.Random(), sites=sites, optimizer=optimizer)
            spent.append(step() - step())
    return first, spent, counting.graphs


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
