"""The policy's frame: a wish, and what the limits leave of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from ..errors import GrowthError
from ..sites.site import Site, Sites
from .evidence import Evidence
from .limits import Limits, check_patterns

__all__ = ["Where"]


class Where(ABC):
    """Where to grow and by how much. A policy says what it wishes (`allocate`); `units` keeps the limits.

    Every policy takes the limits of `fastgrow.where.Limits` as keyword arguments.
    """

    reads: frozenset[str] = frozenset()
    """What the Grower must observe: of "directions", "natural", "ranks" (fields of `Evidence`), "nagn_own" (its `nagn`)
    and "nagn_after_norm", or both of these as "nagn"."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.explanation: dict[str, dict[str, Any]] = {}

    @abstractmethod
    def allocate(self, evidence: Evidence) -> dict[str, int]:
        """Site name -> units the policy wishes."""

    @abstractmethod
    def most(self, site: Site, width: int) -> int:
        """The most units the policy itself asks of this site in one growth."""

    def check(self, sites: Sites) -> None:
        """Raises `GrowthError` for a name or pattern that fits none of these sites."""
        check_patterns("max_width", self.limits.max_width, sites)

    def rank(self, sites: Sites, widths: Mapping[str, int]) -> int:
        """The most units that this policy can ask of one site at once; 0 where no site can grow."""
        return max(
            (self.rounded(site, widths[site.name], self.most(site, widths[site.name])) for site in sites),
            default=0,
        )

    def units(self, evidence: Evidence) -> dict[str, int]:
        """Site name -> units, more than 0, within all limits. Fills `explanation`: per site what was
        computed, its width, the wish, and the units that it gains.

        Raises `GrowthError` for a limit that names no site, and for evidence that was not observed.
        """
        self.check(evidence.sites)
        self.explanation = {}
        wish = self.allocate(evidence)
        order: list[tuple[float, str, int]] = []
        for site in evidence.sites:
            width = evidence.widths[site.name]
            steps = self.limits.steps(site, width, self.rounded(site, width, wish.get(site.name, 0)))
            order += [(place / len(steps), site.name, count) for place, count in enumerate(steps, 1)]
        # A stable sort: sites advance in step, so that a cap takes the same share from each.
        order.sort(key=lambda step: step[0])
        final = self.limits.fit(evidence, [(name, count) for _, name, count in order])
        for site in evidence.sites:
            self.explanation.setdefault(site.name, {}).update(
                width=evidence.widths[site.name],
                wish=wish.get(site.name, 0),
                units=final.get(site.name, 0),
            )
        return {site.name: final[site.name] for site in evidence.sites if final.get(site.name, 0) > 0}

    def rounded(self, site: Site, width: int, wish: int) -> int:
        """The units that the limits of this one site leave of a wish."""
        return self.limits.rounded(site, width, wish)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, beside the same constructor arguments: plain numbers and strings."""
        return {"policy": type(self).__name__}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state saved by a policy of the same class; any other raises `GrowthError`."""
        wanted = self.state_dict()
        if state.get("policy") != wanted["policy"] or state.keys() != wanted.keys():
            raise GrowthError(
                f"where.{wanted['policy']}: the state is that of {state.get('policy')!r} with keys "
                f"{sorted(state)}; wanted {wanted['policy']!r} with keys {sorted(wanted)}; build the policy "
                "that the checkpoint was saved with"
            )
