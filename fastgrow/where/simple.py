"""Policies that look at widths alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import Unpack

from ..arguments import number, whole
from ..errors import GrowthError
from ..sites.site import Site, Sites
from .base import Where
from .evidence import Evidence
from .limits import LimitOptions, Limits, check_patterns, of_site

__all__ = ["Everywhere", "RoundRobin"]

Target = int | Sequence[int]


class Everywhere(Where):
    """Every site grows, by one of

    units: so many units;
    fraction: ``round(fraction * width)`` units, at least one;
    target: up to this width and never beyond; a sequence of rising widths is a growth curve, of which each
    growth takes the next (`fastgrow.schedule.widths`).

    Each is one value for all sites, or a mapping from site names or patterns; sites that fit none keep
    their width. Raises `GrowthError` unless exactly one is given, and for numbers that are not positive.
    """

    def __init__(
        self,
        units: int | Mapping[str, int] | None = None,
        fraction: float | Mapping[str, float] | None = None,
        target: Target | Mapping[str, Target] | None = None,
        **limits: Unpack[LimitOptions],
    ) -> None:
        super().__init__(Limits(**limits))
        given = {"units": units, "fraction": fraction, "target": target}
        chosen = [argument for argument, value in given.items() if value is not None]
        if len(chosen) != 1:
            raise GrowthError(
                f"where.Everywhere: {' and '.join(chosen) or 'nothing'} was given; wanted exactly one of "
                "units, fraction and target"
            )
        self.argument, self.amount = chosen[0], given[chosen[0]]
        for value in self.amount.values() if isinstance(self.amount, Mapping) else [self.amount]:
            if self.argument == "units":
                whole("where.Everywhere", "units", value)
            elif self.argument == "fraction":
                number("where.Everywhere", "fraction", value, above=0)
            else:
                self._check_target(value)

    def _check_target(self, value: Any) -> None:
        curve = [whole("where.Everywhere", "target", width) for width in _curve(value)]
        if not curve or curve != sorted(curve):
            raise GrowthError(f"where.Everywhere: target={value!r} was given; wanted widths in rising order")

    def most(self, site: Site, width: int) -> int:
        value: Any = of_site(self.amount, site.name)
        if value is None:
            return 0
        if self.argument == "units":
            return value
        if self.argument == "fraction":
            return max(1, math.floor(value * width + 0.5))
        first, further = self.limits.step(site, width)
        # The first width of the curve that one step does not overshoot; down to what the steps can reach.
        room = next((goal - width for goal in _curve(value) if goal - width >= first), 0)
        return first + (room - first) // further * further if room else 0

    def check(self, sites: Sites) -> None:
        super().check(sites)
        check_patterns(self.argument, self.amount, sites)

    def allocate(self, evidence: Evidence) -> dict[str, int]:
        return {site.name: self.most(site, evidence.widths[site.name]) for site in evidence.sites}


def _curve(target: Any) -> Sequence[Any]:
    return target if isinstance(target, Sequence) and not isinstance(target, str) else [target]


class RoundRobin(Where):
    """One site a growth, in turn, gains `units`; a site that the limits hold back is passed over.

    Raises `GrowthError` unless `units` is a positive integer.
    """

    def __init__(self, units: int, **limits: Unpack[LimitOptions]) -> None:
        super().__init__(Limits(**limits))
        self.amount = whole("where.RoundRobin", "units", units)
        self._last: str | None = None

    def most(self, site: Site, width: int) -> int:
        return self.amount

    def allocate(self, evidence: Evidence) -> dict[str, int]:
        names = [site.name for site in evidence.sites]
        after = names.index(self._last) + 1 if self._last in names else 0
        for name in names[after:] + names[:after]:
            site, width = evidence.sites[name], evidence.widths[name]
            steps = self.limits.steps(site, width, self.rounded(site, width, self.amount))
            if self.limits.fit(evidence, [(name, count) for count in steps]).get(name):
                return {name: self.amount}
        return {}

    def units(self, evidence: Evidence) -> dict[str, int]:
        final = super().units(evidence)
        self._last = next(iter(final), self._last)
        return final

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._last = None if state["last"] is None else str(state["last"])
