"""What a forward and backward pass left of one site: all that a solver of its growth may read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from torch import nn

from .growth_map import growth_map
from .operators import LinearMap
from .replay import Capture
from .sites import Site, Sites
from .solve import Directions

__all__ = ["SiteView", "Solver", "for_parts"]


@dataclass(frozen=True)
class SiteView:
    """captures: one for each batch, with its weight in M = sum_b weight_b M_b.

    rank: directions wanted. bias: whether the producers' biases are a column of M. known: M, where it is at hand.
    """

    model: nn.Module
    sites: Sites
    site: Site
    captures: Sequence[Capture]
    weights: Sequence[float]
    rank: int
    bias: bool = False
    known: LinearMap | None = None

    @cached_property
    def growth(self) -> LinearMap:
        """M."""
        if self.known is not None:
            return self.known
        return growth_map(self.model, self.sites, self.site, self.captures, self.weights, bias=self.bias)

    @property
    def samples(self) -> int:
        return sum(capture.samples for capture in self.captures)


Solver = Callable[[SiteView], Directions]
"""Another way to solve a site's growth than by M's leading directions."""

_Function = TypeVar("_Function", bound=Callable[..., Directions])


def for_parts(solver: _Function) -> _Function:
    """Marks a solver that also takes sites whose units have a channel in each of several groups or members."""
    solver.for_parts = True  # type: ignore[attr-defined]
    return solver
