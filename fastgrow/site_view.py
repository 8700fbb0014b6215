"""What a growth method that solves sites in its own way is given of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from .growth_map import growth_map
from .operators import LinearMap
from .site_data import SiteData
from .solve import Directions

__all__ = ["SiteView", "Solver", "for_parts"]


@dataclass(frozen=True)
class SiteView(SiteData):
    """rank: directions wanted. known: M, where it is at hand. The rest as in `SiteData`."""

    rank: int = 1
    known: LinearMap | None = None

    @cached_property
    def growth(self) -> LinearMap:
        """M."""
        return growth_map(self) if self.known is None else self.known


Solver = Callable[[SiteView], Directions]
"""Another way to solve a site's growth than by M's leading directions."""

_Function = TypeVar("_Function", bound=Callable[..., Directions])


def for_parts(solver: _Function) -> _Function:
    """Marks a solver that also takes sites whose units have a channel in each of several groups or members."""
    solver.for_parts = True  # type: ignore[attr-defined]
    return solver
