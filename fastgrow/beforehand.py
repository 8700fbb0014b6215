"""What a Grower's policy may ask for, and what is refused before training begins rather than once a growth is due."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .errors import GrowthError
from .growth_map import check_mapped, check_untied
from .how import How
from .optimizer_state import check_followed
from .plan import check_units
from .sites import Sites, tensors_of
from .tensor_checks import check_copies
from .where import Where

__all__ = ["check_any", "check_followers", "offered", "refused", "wishes"]


def offered(model: nn.Module, sites: Sites, how: How) -> Sites:
    """The sites, with the multiples and the bounds in which the method grows them at their present widths."""
    widths = sites.widths(model)
    items = [
        replace(site, multiple=how.multiple(site, width), at_once=how.at_once(site, width))
        for site in sites
        for width in (widths[site.name],)
    ]
    return replace(sites, items=tuple(items))


def wishes(model: nn.Module, sites: Sites, where: Where, how: How) -> dict[str, int]:
    """The most units that the policy can ask of each site that may still grow."""
    items = offered(model, sites, how)
    widths = items.widths(model)
    most = {site.name: where.most(site, widths[site.name]) for site in items}
    wanted = {site.name: where.rounded(site, widths[site.name], most[site.name]) for site in items}
    return {name: wish for name, wish in wanted.items() if wish}


def refused(model: nn.Module, sites: Sites, where: Where, how: How) -> dict[str, str]:
    """Sites that the policy may ask for and the method cannot grow, with the reasons."""
    reasons: dict[str, str] = {}
    widths = sites.widths(model)
    mapped = (how.needs_directions and how.reads_growth) or where.reads & {"directions", "natural"}
    for name, units in wishes(model, sites, where, how).items():
        try:
            check_units(sites, widths, name, units, how)
            check_untied(sites[name])
            if mapped:
                check_mapped(sites[name])
        except GrowthError as error:
            reasons[name] = str(error)
    return reasons


def check_followers(
    model: nn.Module, sites: Sites, how: How, optimizers: Sequence[Any], also: Sequence[nn.Module]
) -> None:
    """Raises `GrowthError` for optimizers and copies that could not follow a growth."""
    tensors = tensors_of(model)
    grown = {slot.tensor: tensors[slot.tensor] for site in sites for slot in site.slots}
    how.check_optimizers(optimizers)
    check_followed(optimizers, {id(tensor): name for name, tensor in grown.items()})
    check_copies(also, grown)


def check_any(sites: Sites) -> None:
    """Raises `GrowthError` where there is no site."""
    if not sites:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(sites.frozen.items())[:5])
        raise GrowthError(f"Grower: nothing in the model can grow ({reasons or 'it has no layers'})")
