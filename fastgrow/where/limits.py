"""The limits every policy shares: what a site and the whole network may become."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, TypedDict, TypeVar

from ..arguments import choice, number, whole
from ..errors import GrowthError
from ..sites.site import Site, Sites
from .evidence import Evidence

__all__ = ["COSTS", "Cost", "LimitOptions", "Limits", "check_patterns", "of_site"]

Cost = Literal["units", "parameters", "flops"]
COSTS: tuple[Cost, ...] = ("units", "parameters", "flops")

T = TypeVar("T")


def of_site(value: T | Mapping[str, T] | None, site: str) -> T | None:
    """The value for one site of an argument given for all, or by name or pattern (the first that fits)."""
    if not isinstance(value, Mapping):
        return value
    if site in value:
        return value[site]
    return next((entry for pattern, entry in value.items() if fnmatchcase(site, pattern)), None)


def check_patterns(argument: str, value: Any, sites: Sites) -> None:
    """Raises where a name or pattern fits no site: it would be a limit that limits nothing."""
    if isinstance(value, Mapping):
        for pattern in value:
            if not any(site.name == pattern or fnmatchcase(site.name, pattern) for site in sites):
                known = ", ".join(site.name for site in sites) or "none"
                why = f" ({sites.frozen[pattern]})" if pattern in sites.frozen else ""
                raise GrowthError(f"where: {argument} names {pattern!r}, which fits no site{why}; found: {known}")


class LimitOptions(TypedDict, total=False):
    """Keyword arguments of every policy in `fastgrow.where`."""

    max_width: int | Mapping[str, int] | None
    round_to: int
    max_parameters: float | None
    max_flops: float | None
    budget: Mapping[Cost, float]


@dataclass(frozen=True)
class Limits:
    """What growth may not exceed.

    max_width: largest width of a site, in channels; a number, or site names or patterns to numbers.
    round_to: widths that grow end at a multiple of this (8 keeps tensor cores busy); heads are not rounded.
    max_parameters, max_flops: of the whole network; FLOPs of one forward pass of one sample, whatever the batch of the
    example inputs, as `fastgrow.plan` reports them.
    budget: what one growth may add, under any of the keys "units", "parameters", "flops" (likewise a sample's).
    max_new: most units that a site gains in one growth.

    A wish becomes the nearest width that `Site.multiple` and `round_to` allow, by one step at least.
    Over a cap of the whole network, sites give up units in step, each the same share of its wish.
    Raises `GrowthError` for an argument that is not as described.
    """

    max_width: int | Mapping[str, int] | None = None
    round_to: int = 1
    max_parameters: float | None = None
    max_flops: float | None = None
    budget: Mapping[Cost, float] = field(default_factory=dict)
    max_new: int | None = None

    def __post_init__(self) -> None:
        widths = self.max_width.values() if isinstance(self.max_width, Mapping) else [self.max_width]
        for width in widths:
            if width is not None or isinstance(self.max_width, Mapping):
                whole("where", "max_width", width)
        whole("where", "round_to", self.round_to)
        for argument in ("max_parameters", "max_flops"):
            if getattr(self, argument) is not None:
                number("where", argument, getattr(self, argument), above=0)
        if not isinstance(self.budget, Mapping):
            raise GrowthError(
                f"where: budget={self.budget!r} was given; wanted a mapping such as {{'parameters': 10000}}"
            )
        for key, value in self.budget.items():
            number("where", f"budget[{choice('where', 'budget', key, COSTS)!r}]", value, above=0)
        if self.max_new is not None and whole("where", "max_new", self.max_new) < self.round_to:
            raise GrowthError(
                f"where: max_new={self.max_new} never reaches the next multiple of round_to={self.round_to}; "
                "wanted max_new of at least round_to"
            )

    def step(self, site: Site, width: int) -> tuple[int, int]:
        """(first, further): the increments that keep to `site.multiple` and `round_to`.

        Raises `GrowthError` where no width can keep to both.
        """
        round_to = 1 if site.heads else self.round_to
        further = math.lcm(site.multiple, round_to)
        for first in range(site.multiple, further + 1, site.multiple):
            if (width + first) % round_to == 0:
                return first, further
        raise GrowthError(
            f"site {site.name!r}: width {width} grows in multiples of {site.multiple} and so never becomes a "
            f"multiple of round_to={round_to}; exclude the site or leave round_to out"
        )

    def rounded(self, site: Site, width: int, wish: int, most: int | None = None) -> int:
        """The units a site may gain when `wish` are asked: 0, or at least one step.

        most: a ceiling that the policy sets itself, and that yields to the one step.
        """
        if wish <= 0:
            return 0
        first, further = self.step(site, width)
        ceilings = [self.max_new, self.budget.get("units"), site.at_once]
        widest = of_site(self.max_width, site.name)
        if widest is not None:
            ceilings.append(widest - width)
        if most is not None:
            ceilings.append(max(most, first))
        ceiling = min((value for value in ceilings if value is not None), default=math.inf)
        if first > ceiling:
            return 0
        steps = max(0, (2 * (wish - first) + further) // (2 * further))  # the nearest, ties upwards
        if first + steps * further > ceiling:
            steps = int(ceiling - first) // further
        return first + steps * further

    def steps(self, site: Site, width: int, units: int) -> list[int]:
        """`units` as the increments they are made of; a rest that makes no step is left out."""
        if units <= 0:
            return []
        first, further = self.step(site, width)
        return [first] + [further] * ((units - first) // further) if units >= first else []

    def fits(self, evidence: Evidence, units: Mapping[str, int]) -> bool:
        """Does the whole network keep within its caps and the growth within its budget?"""
        if sum(units.values()) > self.budget.get("units", math.inf):
            return False
        caps = (self.max_parameters, self.max_flops)
        extra = (self.budget.get("parameters"), self.budget.get("flops"))
        if caps == extra == (None, None):
            return True
        now = (evidence.parameters, evidence.flops)
        then = evidence.priced({name: count for name, count in units.items() if count})
        return all(
            (cap is None or after <= cap) and (more is None or after - before <= more)
            for cap, more, before, after in zip(caps, extra, now, then, strict=True)
        )

    def fit(self, evidence: Evidence, steps: Sequence[tuple[str, int]]) -> dict[str, int]:
        """The (site, units) steps that fit, taken in order; a site whose step does not fit gains no more."""
        taken: dict[str, int] = {}

        def with_first(count: int) -> dict[str, int]:
            total = dict(taken)
            for name, units in remaining[:count]:
                total[name] = total.get(name, 0) + units
            return total

        remaining = list(steps)
        while remaining:
            # Costs only rise with units, so the longest prefix that fits can be bisected.
            low, high = 0, len(remaining)
            while low < high:
                middle = (low + high + 1) // 2
                if self.fits(evidence, with_first(middle)):
                    low = middle
                else:
                    high = middle - 1
            taken = with_first(low)
            if low == len(remaining):
                break
            closed = remaining[low][0]
            remaining = [step for step in remaining[low + 1 :] if step[0] != closed]
        return taken
