"""NORTH*: layers whose units all point their own way have used up their room."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from typing_extensions import Unpack

from ..arguments import choice, number
from ..errors import GrowthError
from ..sites.site import Site
from .base import Where
from .evidence import Evidence
from .limits import LimitOptions, Limits

__all__ = ["NORTH"]


class NORTH(Where):
    """Grows sites whose units are more orthogonal than they were at the start (NORTH*, Maile et al. 2022).

    ``phi_l = |{sigma_i(H_l / sqrt(n)) > epsilon}| / C_l``, the effective dimension of a site's features
    over its width (`fastgrow.where.effective_dimension`, which Evidence.ranks holds), and

    ``k_l = max(0, floor(C_l (phi_l - gamma phi_{0,l})))`` units, with phi_{0,l} of the seed network.

    gamma: near 1; the smaller, the sooner sites grow.
    epsilon: the singular values that count.
    read: what the ranks are taken of: "activations", those that the site's first consumer reads in the observed
    batches (Gram matrices in float64), or "weights", the incoming ones of its first producer.
    baseline: phi_0 for all sites, or by site name; None takes what the first evidence says, so that
    evidence should be of the seed network. It is part of the state.

    Raises `GrowthError` for arguments out of range, and for ranks that were not observed or are not
    between 0 and the width.
    """

    reads = frozenset({"ranks"})

    def __init__(
        self,
        gamma: float = 0.97,
        epsilon: float = 0.01,
        read: Literal["activations", "weights"] = "activations",
        baseline: float | Mapping[str, float] | None = None,
        **limits: Unpack[LimitOptions],
    ) -> None:
        super().__init__(Limits(**limits))
        self.gamma = number("where.NORTH", "gamma", gamma, least=0)
        self.epsilon = number("where.NORTH", "epsilon", epsilon, above=0)
        self.read = choice("where.NORTH", "read", read, ("activations", "weights"))
        entries = baseline if isinstance(baseline, Mapping) else {} if baseline is None else {"": baseline}
        for value in entries.values():
            number("where.NORTH", "baseline", value, least=0)
        self._common = None if baseline is None or isinstance(baseline, Mapping) else float(baseline)
        self._baseline = {name: float(value) for name, value in entries.items() if name}

    def most(self, site: Site, width: int) -> int:
        return width

    def allocate(self, evidence: Evidence) -> dict[str, int]:
        wish = {}
        for site in evidence.sites:
            width = evidence.widths[site.name]
            if site.name not in evidence.ranks:
                raise GrowthError(
                    f"where.NORTH: site {site.name!r} has no rank; wanted Evidence.ranks of its {self.read}"
                )
            rank = number("where.NORTH", f"ranks[{site.name!r}]", evidence.ranks[site.name], least=0)
            if rank > width:
                raise GrowthError(
                    f"where.NORTH: site {site.name!r} of width {width} has rank {rank:g}; wanted at most its width"
                )
            start = self._common
            if start is None:
                start = self._baseline.setdefault(site.name, rank / width)
            units = max(0, math.floor(rank - self.gamma * start * width))
            wish[site.name] = units
            self.explanation[site.name] = {"phi": rank / width, "baseline": start}
        return wish

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "baseline": dict(self._baseline)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._baseline = {str(name): float(value) for name, value in state["baseline"].items()}
