"""What every growth method is: what it asks for, and the questions it answers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from torch import nn

from ..errors import GrowthError
from ..newborns import Newborns, Start
from ..rehearsal import Rehearsal
from ..site_view import SiteView
from ..sites import Site
from ..solve import Directions

__all__ = ["DEAD_AT_ZERO", "How", "refuse_dead", "refuse_mixing", "site_multiple"]

DEAD_AT_ZERO = frozenset(("relu", "relu6", "hardtanh"))


class How:
    """A growth method. Subclasses answer `start`; the rest says what they need."""

    needs_directions = False
    """Whether a backward pass must be observed for growth matrices."""
    starts_at_zero = False
    """Whether new units write exactly zero, so that activations need their derivative from the right."""
    solves = False
    """Whether `solve` answers the directions that `start` is given, instead of M's leading ones."""
    reads_growth = True
    """Whether `solve` reads the growth matrix: without, sites are allowed where units born at zero are none."""
    rewrites = False
    """Whether units are copied or present values change: sites grow one by one in forward order, each seeing
    those before it grown."""
    needs_closure = False
    """Whether the loss is needed again: `rehearse` answers instead of `start`."""
    learns_first: Literal["producer", "consumer"] = "producer"
    """The side whose new weights receive the gradient that `Start.attained` is the square of."""
    fills_room = True
    """Whether units can start in room that was reserved: not where a method tries or reads the tensors themselves."""

    @property
    def name(self) -> str:
        return type(self).__name__

    def check(self, site: Site, units: int) -> None:
        """Raises `GrowthError` where the method cannot grow this site by so many units."""

    def check_directions(self, found: Mapping[str, Directions]) -> None:
        """Raises `GrowthError` where the method cannot start units from what was found; of all sites, so that a device
        is waited for once."""

    def multiple(self, site: Site, width: int) -> int:
        """The units that come together where this method grows a site of this width."""
        return site_multiple(site, width)

    def at_once(self, site: Site, width: int) -> int | None:
        """The most units that this method can add to a site of this width in one growth; None: any number."""
        return None

    def rank(self, site: Site, units: int) -> int:
        """Directions wanted for so many units; 0 where none are needed."""
        return units // site.step if self.needs_directions else 0

    def signed(self, site: Site) -> bool:
        """Whether the site's units come as signed pairs."""
        return False

    def swaps(self, site: Site) -> bool:
        """Whether the site's activation modules must be replaced by their twins with slope f'(0+) at 0."""
        return self.starts_at_zero and not self.signed(site)

    def start(self, newborns: Newborns) -> Start:
        """How the new units begin. Called without gradients; changes nothing."""
        raise NotImplementedError

    def solve(self, view: SiteView) -> Directions:
        """The directions of one site, where the method has its own way to them (`solves`)."""
        raise NotImplementedError

    def rehearse(self, rehearsal: Rehearsal) -> dict[str, Start]:
        """How the new units of all sites begin, by trying (`needs_closure`)."""
        raise NotImplementedError

    def check_optimizers(self, optimizers: Iterable[Any]) -> None:
        """Raises `GrowthError` where these optimizers cannot do what the method asks of them."""

    def settle(self, model: nn.Module, optimizers: Iterable[Any]) -> None:
        """What is left to do once the model has grown; must not fail."""


def site_multiple(site: Site, width: int) -> int:
    """The units that come together whatever the method is: a LayerNorm's channels are all copied equally often."""
    return width if any(norm.kind == "layer_norm" for norm in site.norms) else site.multiple


def refuse_mixing(how: How, site: Site, kinds: Collection[str] = ("layer_norm", "rms_norm")) -> None:
    """Raises `GrowthError` where a norm mixes the site's channels: new ones that are not zero change the others, and
    under a LayerNorm those that are zero too."""
    for norm in site.norms:
        if norm.kind in kinds:
            raise GrowthError(
                f"site {site.name!r}: {norm.module!r} ({norm.kind}) mixes its channels, so how.{how.name} would "
                "change what the present units write; copy all of them (how.Net2Net, units = the width)"
            )


def refuse_dead(how: How, site: Site, others: str) -> None:
    """Raises `GrowthError` where units born at zero would stay there: behind an activation that is dead at 0 and that
    no module stands for, which its twin could replace. others: what to do instead."""
    functional = [a.kind for a in site.activations if a.kind in DEAD_AT_ZERO and a.module is None]
    if functional:
        raise GrowthError(
            f"site {site.name!r}: units that how.{how.name} starts at zero never learn behind {functional[0]}, called "
            f"as a function; use nn.ReLU in the model, {others}"
        )
