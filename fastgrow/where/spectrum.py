"""Policies that read singular values: what a unit would bring, at every site."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from typing_extensions import Unpack

from ..arguments import choice, number, whole
from ..errors import GrowthError
from ..sites.site import Site
from .base import Where
from .evidence import Evidence
from .limits import COSTS, Cost, LimitOptions, Limits

__all__ = ["FirstOrderGain", "SingularValues"]


def _squares(policy: Where, evidence: Evidence, name: Literal["directions", "natural"]) -> dict[str, list[float]]:
    """Site name -> its squared singular values, largest first, in evaluation mode's units."""
    source = evidence.directions if name == "directions" else evidence.natural
    if source is None:
        raise GrowthError(
            f"where.{type(policy).__name__}: {name} were not observed; wanted Evidence.{name}, from a "
            "backward pass inside observe(growth=True)"
        )
    found = source(policy.rank(evidence.sites, evidence.widths))
    squares: dict[str, list[float]] = {}
    for site in evidence.sites:
        if site.name not in found:
            continue
        factor = number("where", f"norm_factor[{site.name!r}]", evidence.norm_factor.get(site.name, 1.0), least=0)
        if name == "natural":  # whitened by what stands behind the norms, it has their scale no more
            factor = 1.0
        values = found[site.name].values.double()
        if not bool(values.isfinite().all()):
            raise GrowthError(f"site {site.name!r}: its growth matrix has singular values that are not finite")
        squares[site.name] = (values * factor).square().tolist()
    return squares


class SingularValues(Where):
    """One budget for the whole network, spent where the spectra of the growth matrices promise most.

    All s_i^2 of all sites lie in one pool, each divided by what a channel costs at its site; units are
    taken from the top until a budget is spent, so the spectra say where and how many. By GradMax, eq. 11,
    s_i^2 is the squared gradient norm that a unit of norm 1 attains. Where units come in several, a step
    counts with the sum of its s_i^2. Values behind batch norms measured in training mode are taken to
    evaluation mode by `Evidence.norm_factor`: in training mode their gamma/sqrt(eps), to the power of the norms in
    series, would always win.

    units: of the whole network, in one growth; may be left out where `budget=` has "units", "parameters"
    or "flops".
    max_new: most units one site gains in one growth; without it, and without a number of units, widths at
    most double. The directions are observed to that rank.
    cost: what a unit's gain is divided by: its "parameters", its "flops", or 1 ("units").

    Raises `GrowthError` without any budget, for arguments out of range, and for directions that were not
    observed or are not finite.
    """

    reads = frozenset({"directions"})

    def __init__(
        self,
        units: int | None = None,
        max_new: int | None = None,
        cost: Cost = "parameters",
        **limits: Unpack[LimitOptions],
    ) -> None:
        given = Limits(**limits, max_new=max_new)
        budget = dict(given.budget)
        if units is not None:
            budget["units"] = min(budget.get("units", units), whole("where.SingularValues", "units", units))
        if not budget:
            raise GrowthError(
                "where.SingularValues: neither units nor budget was given; wanted units=, or budget= with "
                "'units', 'parameters' or 'flops'"
            )
        super().__init__(replace(given, budget=budget))
        self.cost = choice("where.SingularValues", "cost", cost, COSTS)

    def most(self, site: Site, width: int) -> int:
        ceilings = [self.limits.max_new, self.limits.budget.get("units")]
        return int(min((value for value in ceilings if value is not None), default=width))

    def allocate(self, evidence: Evidence) -> dict[str, int]:
        squares = _squares(self, evidence, "directions")
        pool: list[tuple[float, str, int]] = []
        for site in evidence.sites:
            width = evidence.widths[site.name]
            values, done = squares.get(site.name, []), 0
            cost = evidence.unit_cost(self.cost, site.name)
            if cost <= 0:
                raise GrowthError(f"site {site.name!r}: a channel costs {cost} {self.cost}; wanted more than 0")
            for count in self.limits.steps(site, width, self.rounded(site, width, self.most(site, width))):
                gain = sum(values[done : done + count]) / (count * cost)
                done += count
                if gain > 0:
                    pool.append((gain, site.name, count))
        # A stable sort: equal gains stay in forward order, and a site's own steps in theirs.
        pool.sort(key=lambda entry: -entry[0])
        chosen = self.limits.fit(evidence, [(name, count) for _, name, count in pool])
        for name, values in squares.items():
            self.explanation[name] = {
                "gain": sum(values[: chosen.get(name, 0)]),
                "best_gain_per_cost": max((gain for gain, site, _ in pool if site == name), default=0.0),
            }
        return chosen


class FirstOrderGain(Where):
    """The sites where growth promises the largest first-order decrease of the loss grow (TINY).

    ``gain = sum_{i <= k} s_i^2``, the decrease of the loss per unit of learning rate that k new units
    bring; s_i are the singular values of TINY's whitened matrix (`Evidence.natural`).

    units: k, the most units a site gains.
    best: how many sites grow, those with the largest gain; None for all.
    threshold: units with ``s_i < threshold * s_max`` are not added, s_max the largest of all sites, so
    the scale of the loss changes nothing.
    whitened: False reads GradMax's directions instead, the gain in the plain gradient's metric, taken to evaluation
    mode behind batch norms as `SingularValues` does; the whitened matrix has nothing of their scale in any mode.

    Raises `GrowthError` for arguments out of range, and for values that were not observed or not finite.
    """

    def __init__(
        self,
        units: int,
        best: int | None = 1,
        threshold: float = 0.01,
        *,
        whitened: bool = True,
        **limits: Unpack[LimitOptions],
    ) -> None:
        super().__init__(Limits(**limits))
        self.amount = whole("where.FirstOrderGain", "units", units)
        self.best = None if best is None else whole("where.FirstOrderGain", "best", best)
        self.threshold = number("where.FirstOrderGain", "threshold", threshold, least=0)
        self.whitened = whitened
        self.reads = frozenset({"natural" if whitened else "directions"})

    def most(self, site: Site, width: int) -> int:
        return self.amount

    def allocate(self, evidence: Evidence) -> dict[str, int]:
        squares = _squares(self, evidence, "natural" if self.whitened else "directions")
        largest = max((values[0] for values in squares.values() if values), default=0.0)
        wish, gains = {}, {}
        for name, values in squares.items():
            kept = [square for square in values[: self.amount] if square > 0]
            kept = [square for square in kept if square >= self.threshold**2 * largest]
            site, width = evidence.sites[name], evidence.widths[name]
            wish[name] = self.rounded(site, width, len(kept))
            gains[name] = sum(values[: wish[name]])
            self.explanation[name] = {"gain": gains[name]}
        # Sites that the limits hold back do not use up a place among the best.
        able = sorted((name for name in gains if wish[name]), key=lambda name: -gains[name])
        return {name: wish[name] for name in able[: self.best]}
