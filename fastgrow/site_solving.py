"""From what a backward pass left to every site's directions, over all ranks where there are several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from .blocks import block_directions, has_blocks
from .distributed import Replicas, together
from .growth_map import growth_map
from .how import Newborns
from .names import find_module
from .operators import LinearMap
from .pairs import signed_pairs
from .replay import Capture, tensors_read
from .sharded import gathered, wrapped_modules
from .site_view import SiteView, Solver
from .sites import Site, Sites
from .solve import Directions, solve

__all__ = ["SiteSolving"]


@dataclass
class SiteSolving:
    """Solves sites from captures, each with its weight in M = sum_b weight_b M_b.

    rank: directions wanted of each site. signed: sites whose units come as signed pairs, and the norm of their
    incoming weights relative to the present ones' mean.
    """

    model: nn.Module
    sites: Sites
    rank: Mapping[str, int]
    bias: bool
    signed: Mapping[str, float]
    replicas: Replicas | None
    _maps: dict[str, LinearMap] = field(default_factory=dict)

    def directions(
        self, targets: Sequence[Site], captures: Sequence[Capture], weights: Sequence[float]
    ) -> dict[str, Directions]:
        """The leading directions of every target, all plain ones solved together."""
        apart = {site.name for site in targets if has_blocks(site) or self._normed_together(site)}
        whole = [site for site in targets if site.name not in apart]
        solved = solve if self.replicas is None else self.replicas.solve
        directions = self._whole(whole, captures, weights, solved) if whole else {}
        for site in targets:
            if site.name in apart:
                directions[site.name] = self._pooled(site, captures, weights, partial(self._alone, site))
            elif site.name in self.signed:
                plain = directions[site.name]
                with self._gathered(site, weights=True):
                    directions[site.name] = self._pairs(site, captures, weights, plain, solved)
        return directions

    def _whole(
        self,
        sites: Sequence[Site],
        captures: Sequence[Capture],
        weights: Sequence[float],
        solver: Callable[..., list[Directions]],
    ) -> dict[str, Directions]:
        """Sites with one matrix each, kept for solvers that come after."""
        with self._gathered(*sites), together(self.replicas):
            maps = [self._map(site, captures, weights) for site in sites]
        names = [site.name for site in sites]
        self._maps = dict(zip(names, maps, strict=True))
        ranks = [min(self.rank[name], *found.shape) for name, found in self._maps.items()]
        return dict(zip(names, solver(maps, ranks, names=names), strict=True))

    def by(
        self, solver: Solver, targets: Sequence[Site], captures: Sequence[Capture], weights: Sequence[float]
    ) -> dict[str, Directions]:
        """What another solver makes of every target whose units are single channels; after `directions`.

        Units with channels apart from each other are for solvers made for them (`fastgrow.site_view.for_parts`).
        """
        parts = bool(getattr(solver, "for_parts", False))
        return {
            site.name: self._pooled(
                site, captures, weights, partial(self._view, solver, site, self._maps.get(site.name))
            )
            for site in targets
            if not has_blocks(site) or (parts and not site.gates)
        }

    def _alone(self, site: Site, captures: Sequence[Capture], weights: Sequence[float]) -> Directions:
        """One site's directions from these tensors and no others."""
        rank = self.rank[site.name]
        if has_blocks(site):
            signed = self._sizes(site) if site.name in self.signed else None
            return block_directions(
                self.model, self.sites, site, captures, weights, rank, bias=self.bias, signed=signed
            )
        mapping = self._map(site, captures, weights)
        (found,) = solve([mapping], min(rank, *mapping.shape), names=[site.name])
        return self._pairs(site, captures, weights, found, solve) if site.name in self.signed else found

    def _pairs(
        self,
        site: Site,
        captures: Sequence[Capture],
        weights: Sequence[float],
        plain: Directions,
        solver: Callable[..., list[Directions]],
    ) -> Directions:
        size = self.signed[site.name] * Newborns(self.model, self.sites, site, site.step).mean_norm("producer")
        return signed_pairs(self.model, self.sites, site, captures, weights, plain, size, bias=self.bias, solver=solver)

    def _sizes(self, site: Site) -> Tensor:
        """(n, 1): the size of a new unit's incoming weights at each of their entries, channel by channel."""
        newborns = Newborns(self.model, self.sites, site, site.step)
        return newborns.side("producer").spread(newborns.incoming_part_norms(self.signed[site.name], "mean")[:, None])

    def _normed_together(self, site: Site) -> bool:
        """Whether a batch norm on the site takes its statistics over all ranks."""
        norms = [find_module(self.model, norm.module) for norm in site.norms]
        synced = any(isinstance(norm, nn.SyncBatchNorm) and norm.training for norm in norms)
        return self.replicas is not None and synced

    def _map(self, site: Site, captures: Sequence[Capture], weights: Sequence[float]) -> LinearMap:
        return growth_map(self.model, self.sites, site, captures, weights, bias=self.bias)

    def _gathered(self, *targets: Site, weights: bool = False) -> AbstractContextManager[None]:
        """What sites of a sharded model are solved from; weights: those of their producers and consumers too."""
        if not wrapped_modules(self.model):
            return nullcontext()
        names = {name for site in targets for name in tensors_read(self.sites, site)}
        own = {slot.tensor for site in targets for slot in site.slots} if weights else set()
        return gathered(self.model, names | own)

    def _view(
        self,
        solver: Solver,
        site: Site,
        growth: LinearMap | None,
        captures: Sequence[Capture],
        weights: Sequence[float],
    ) -> Directions:
        known = growth if self.replicas is None else None
        rank = self.rank[site.name]
        return solver(SiteView(self.model, self.sites, site, captures, weights, rank, self.bias, known))

    def _pooled(
        self,
        site: Site,
        captures: Sequence[Capture],
        weights: Sequence[float],
        function: Callable[[Sequence[Capture], Sequence[float]], Directions],
    ) -> Directions:
        """A solver that wants the tensors themselves: under DDP rank 0 gets those of all ranks."""
        if self.replicas is None:
            return function(captures, weights)
        layers = frozenset(site.layers)
        own = [capture.of(layers) for capture in captures]
        with self._gathered(site, weights=True):
            return self.replicas.on_first(own, weights, function, joined=self._normed_together(site))
