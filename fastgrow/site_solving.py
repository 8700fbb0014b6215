"""From what a backward pass left to every site's directions, over all ranks where there are several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from .blocks import block_directions, has_blocks
from .closures import ran_hidden
from .cores import to_host
from .distributed import Replicas, together
from .errors import GrowthError
from .growth_map import growth_map
from .names import find_module
from .newborns import Newborns
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
    incoming weights relative to the present ones' mean (`Newborns.small_norm`).
    """

    model: nn.Module
    sites: Sites
    rank: Mapping[str, int]
    bias: bool
    signed: Mapping[str, float]
    replicas: Replicas | None
    _maps: dict[str, LinearMap] = field(default_factory=dict)

    def directions(
        self, targets: Sequence[Site], captures: Sequence[Capture], weights: Sequence[float], *, tracing: bool = True
    ) -> dict[str, Directions]:
        """The leading directions of every target, all plain ones solved together.

        tracing: the model may be traced at a batch's sizes; an error where it may not and must be.
        """
        views = {site.name: replace(self._view(site, captures, weights), tracing=tracing) for site in targets}
        apart = {site.name for site in targets if has_blocks(site) or self._normed_together(site)}
        whole = [view for name, view in views.items() if name not in apart]
        solved = solve if self.replicas is None else self.replicas.solve
        directions = self._whole(whole, solved) if whole else {}
        for site in targets:
            if site.name in apart:
                directions[site.name] = self._pooled(views[site.name], self._alone)
            elif site.name in self.signed:
                with self._gathered(site, weights=True):
                    directions[site.name] = self._pairs(views[site.name], directions[site.name], solved)
        return directions

    def _whole(self, views: Sequence[SiteView], solver: Callable[..., list[Directions]]) -> dict[str, Directions]:
        """Sites with one matrix each, kept for solvers that come after."""
        with self._gathered(*(view.site for view in views)), together(self.replicas):
            maps = [growth_map(view) for view in views]
        names = [view.site.name for view in views]
        self._maps = dict(zip(names, maps, strict=True))
        ranks = [min(view.rank, *found.shape) for view, found in zip(views, maps, strict=True)]
        return dict(zip(names, solver(maps, ranks, names=names), strict=True))

    def by(
        self, solver: Solver, targets: Sequence[Site], captures: Sequence[Capture], weights: Sequence[float]
    ) -> dict[str, Directions]:
        """What another solver makes of every target whose units are single channels; after `directions`.

        Units with channels apart from each other are for solvers made for them (`fastgrow.site_view.for_parts`).
        """
        parts = bool(getattr(solver, "for_parts", False))
        known = self._maps if self.replicas is None else {}
        views = [
            self._view(site, captures, weights, known.get(site.name))
            for site in targets
            if not has_blocks(site) or (parts and not site.gates)
        ]
        with together(self.replicas):
            _check_finite([view for view in views if view.site.name not in known])
        return {view.site.name: self._pooled(view, solver) for view in views}

    def forget(self) -> None:
        """Let go of the maps, which hold the tensors that they multiply."""
        self._maps.clear()

    def _view(
        self, site: Site, captures: Sequence[Capture], weights: Sequence[float], known: LinearMap | None = None
    ) -> SiteView:
        for capture in captures:
            _check_seen(site, capture)
        rank = self.rank[site.name]
        return SiteView(self.model, self.sites, site, captures, weights, self.bias, rank=rank, known=known)

    def _alone(self, view: SiteView) -> Directions:
        """One site's directions from these tensors and no others."""
        name = view.site.name
        if has_blocks(view.site):
            return block_directions(view, view.rank, signed=self._sizes(view) if name in self.signed else None)
        mapping = view.growth
        (found,) = solve([mapping], min(view.rank, *mapping.shape), names=[name])
        return self._pairs(view, found, solve) if name in self.signed else found

    def _pairs(self, view: SiteView, plain: Directions, solver: Callable[..., list[Directions]]) -> Directions:
        newborns = Newborns(self.model, self.sites, view.site, view.site.step)
        return signed_pairs(view, plain, newborns.small_norm(self.signed[view.site.name]), solver=solver)

    def _sizes(self, view: SiteView) -> Tensor:
        """(n, 1): the size of a new unit's incoming weights at each of their entries, channel by channel."""
        newborns = Newborns(self.model, self.sites, view.site, view.site.step)
        norms = newborns.small_part_norms(self.signed[view.site.name])
        return newborns.side("producer").spread(norms[:, None])

    def _normed_together(self, site: Site) -> bool:
        """Whether a batch norm on the site takes its statistics over all ranks."""
        norms = [find_module(self.model, norm.module) for norm in site.norms]
        synced = any(isinstance(norm, nn.SyncBatchNorm) and norm.training for norm in norms)
        return self.replicas is not None and synced

    def _gathered(self, *targets: Site, weights: bool = False) -> AbstractContextManager[None]:
        """What sites of a sharded model are solved from; weights: those of their producers and consumers too."""
        if not wrapped_modules(self.model):
            return nullcontext()
        names = {name for site in targets for name in tensors_read(self.sites, site)}
        own = {slot.tensor for site in targets for slot in site.slots} if weights else set()
        return gathered(self.model, names | own)

    def _pooled(self, view: SiteView, solver: Solver) -> Directions:
        """A solver that wants the tensors themselves: under DDP rank 0 gets those of all ranks."""
        if self.replicas is None:
            return solver(view)
        layers = frozenset(view.site.layers)
        own = [capture.of(layers) for capture in view.captures]

        def first(captures: Sequence[Capture], weights: Sequence[float]) -> Directions:
            return solver(replace(view, captures=captures, weights=weights))

        with self._gathered(view.site, weights=True):
            return self.replicas.on_first(own, view.weights, first, joined=self._normed_together(view.site))


def _check_seen(site: Site, capture: Capture) -> None:
    """Raises `GrowthError` for layers whose tensors are missing because they ran with gradients off."""
    for names, tensors in ((site.producers, capture.inputs), (site.consumers, capture.gradients)):
        for name in capture.hidden.intersection(names):
            if all(name != seen for seen, _ in tensors):
                raise ran_hidden(name)


def _check_finite(views: Sequence[SiteView]) -> None:
    """Raises `GrowthError` for what producers read; gradients and growth matrices were looked at."""
    read = [
        (name, tensor)
        for view in views
        for capture in view.captures
        for (name, _), tensor in capture.inputs.items()
        if name in view.site.producers
    ]
    for (name, _), fine in zip(read, to_host([tensor.isfinite().all() for _, tensor in read]), strict=True):
        if not fine:
            raise GrowthError(
                f"layer {name!r}: its input is not finite; check the batch, or lower the learning rate if the run has "
                "diverged"
            )
