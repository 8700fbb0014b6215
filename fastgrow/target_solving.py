"""An observer's sites solved from tensors: together when its block ends, or each inside the backward pass."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import GrowthError
from .readings import Readings
from .replay import Capture
from .site_sketching import Pieces, check_version
from .site_solving import SiteSolving
from .site_view import Solver
from .sites import Site
from .solve import Directions
from .surroundings import set_aside

__all__ = ["Batch", "TargetSolving", "pooled"]


@dataclass
class Batch:
    """One forward pass, and what the backward pass through it brought."""

    capture: Capture = field(default_factory=Capture)
    readings: Readings = field(default_factory=Readings)
    pieces: Pieces = field(default_factory=Pieces)
    calls: dict[str, int] = field(default_factory=dict)
    edges: list[Any] = field(default_factory=list)
    unless_norm: dict[str, list[torch.utils.hooks.RemovableHandle]] = field(default_factory=dict)
    closed: bool = False
    backward: int = -1  # the number of the backward pass that reached it
    differentiable: set[tuple[str, int]] = field(default_factory=set)  # calls whose gradients came with create_graph

    @property
    def reached(self) -> bool:
        """Whether a backward pass went through it."""
        return bool(self.readings.totals)


def pooled(batches: Sequence[Batch]) -> list[int]:
    """For each batch the samples of all forward passes that its backward pass went through: they share one loss."""
    counts: Counter[int] = Counter()
    for batch in batches:
        counts[batch.backward] += batch.capture.samples
    return [counts[batch.backward] for batch in batches]


class TargetSolving:
    """Directions of the targets, and what further ``solvers`` make of them.

    unmapped: sites that only these solvers look at.
    """

    def __init__(
        self, solving: SiteSolving, targets: Sequence[Site], solvers: Mapping[str, Solver], unmapped: frozenset[str]
    ) -> None:
        self.seconds = 0.0  # spent inside backward passes
        self._solving, self._targets, self._solvers, self._unmapped = solving, targets, solvers, unmapped
        self._consumed: dict[str, list[Site]] = {}
        for site in targets:
            for name in site.consumers:
                self._consumed.setdefault(name, []).append(site)
        self.reset()

    def reset(self) -> None:
        """Forget what was solved."""
        self._open = {site.name: site for site in self._targets}
        self._directions: dict[str, Directions] = {}
        self._solutions: dict[str, dict[str, Directions]] = {label: {} for label in self._solvers}

    @property
    def begun(self) -> bool:
        """Whether a site has been solved ahead of the end, and its tensors let go."""
        return len(self._open) < len(self._targets)

    def arrived(self, layer: str, batches: Sequence[Batch]) -> None:
        """Inside the only backward pass of a block, with a consumer's gradient: solves the sites that lack no other.

        Their tensors go, but for those that open sites read. What cannot be solved stays open: the end tells why. So
        do gated units, which draw their gates, and what further solvers may draw: in the order of the sites.
        """
        if self._solvers:
            return
        batches = [batch for batch in batches if batch.capture.called]
        for site in self._consumed.get(layer, ()):
            if site.name in self._open and not site.gates and all(_complete(site, batch) for batch in batches):
                started = time.perf_counter()
                try:
                    self._solve_alone(site, batches)
                except GrowthError:
                    continue
                del self._open[site.name]
                self._let_go(site, batches)
                self.seconds += time.perf_counter() - started

    def finish(
        self, batches: Sequence[Batch], weights: Sequence[float]
    ) -> tuple[dict[str, Directions], dict[str, dict[str, Directions]]]:
        """Directions of all targets, and what each further solver makes of them; the open ones are solved together."""
        for batch in batches:
            for key in batch.capture.inputs:
                _check_read(batch, key)
        self._solve(list(self._open.values()), [batch.capture for batch in batches], weights)
        solutions = {label: self._ordered(found) for label, found in self._solutions.items()}
        return self._ordered(self._directions), solutions

    def _ordered(self, found: Mapping[str, Directions]) -> dict[str, Directions]:
        return {site.name: found[site.name] for site in self._targets if site.name in found}

    def _solve_alone(self, site: Site, batches: Sequence[Batch]) -> None:
        weights = []
        for batch in batches:
            for key in batch.capture.inputs:
                if key[0] in site.producers:
                    _check_read(batch, key)
            assert isinstance(batch.readings.scale, float)
            weights.append(1.0 / batch.readings.scale)  # one loss, of all samples
        with torch.no_grad(), set_aside():
            self._solve([site], [batch.capture for batch in batches], weights, tracing=False)

    def _solve(
        self, targets: list[Site], captures: Sequence[Capture], weights: Sequence[float], *, tracing: bool = True
    ) -> None:
        mapped = [site for site in targets if site.name not in self._unmapped]
        directions = self._solving.directions(mapped, captures, weights, tracing=tracing)
        found = {name: self._solving.by(solver, targets, captures, weights) for name, solver in self._solvers.items()}
        self._solving.forget()
        self._directions.update(directions)
        for name, solved in found.items():
            self._solutions[name].update(solved)

    def _let_go(self, site: Site, batches: Sequence[Batch]) -> None:
        read = {name for other in self._open.values() for name in other.producers}
        wanted = {name for other in self._open.values() for name in other.consumers}
        for batch in batches:
            _drop(batch.capture.inputs, site.producers, read)
            _drop(batch.capture.gradients, site.consumers, wanted)


def _complete(site: Site, batch: Batch) -> bool:
    """Whether every call of the site's consumers has its gradient."""
    calls = {key for key in batch.capture.called if key[0] in site.consumers}
    return bool(calls) and calls <= batch.capture.gradients.keys()


def _check_read(batch: Batch, key: tuple[str, int]) -> None:
    check_version(key[0], batch.capture.inputs[key], batch.pieces.versions[key])


def _drop(tensors: dict[tuple[str, int], Tensor], layers: Sequence[str], but: set[str]) -> None:
    for key in [key for key in tensors if key[0] in layers and key[0] not in but]:
        del tensors[key]
