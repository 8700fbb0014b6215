"""`fg.plan`: what a growth would give, without growing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from .arguments import instance, whole
from .costs import pricing
from .errors import GrowthError
from .how import GradMax, How
from .how.base import site_multiple
from .layout import size
from .sites import Site, Sites, live_tensors, unwrap

__all__ = ["Plan", "check_units", "checked_units", "plan"]


@dataclass(frozen=True)
class Plan:
    """The outcome of a dry run; pairs are (before, after) of the sites that are not refused.

    flops: of one forward pass of one sample through linear and convolution layers, two for each multiply-add, at the
    example inputs' map sizes and lengths; a sample is one entry of the first input's first dimension (of the next where
    that numbers a stack's members, or what attention joins). memory: bytes of parameters and buffers; reserved room is
    left out of all of them. refused: site name -> why.
    """

    widths: dict[str, tuple[int, int]]
    parameters: tuple[int, int]
    flops: tuple[float, float]
    memory: tuple[int, int]
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name}: {old} -> {new}" for name, (old, new) in self.widths.items()]
        for what, (old, new) in (
            ("parameters", self.parameters),
            ("forward FLOPs a sample", self.flops),
            ("bytes", self.memory),
        ):
            lines.append(f"{what}: {old:.4g} -> {new:.4g}")
        lines += [f"{name} is refused: {why}" for name, why in self.refused.items()]
        return "\n".join(lines)


def plan(model: nn.Module, units: Mapping[str, int], *, sites: Sites, how: How | None = None) -> Plan:
    """A dry run of `grow`: new widths, parameters, FLOPs, memory, what is refused and why.

    how: the method whose rules count (signed pairs, multiples), GradMax by default. Nothing is changed
    and no gradient is read.
    """
    how = GradMax() if how is None else instance("plan", "how", how, How)
    widths = instance("plan", "sites", sites, Sites).widths(model)
    allowed: dict[str, int] = {}
    refused: dict[str, str] = {}
    for name, count in checked_units(units).items():
        try:
            allowed[name] = check_units(sites, widths, name, count, how)
        except GrowthError as error:
            refused[name] = str(error)
    price = pricing(model, sites)
    (old_parameters, old_flops), (new_parameters, new_flops) = price({}), price(allowed)
    return Plan(
        {name: (widths[name], widths[name] + count) for name, count in allowed.items()},
        (old_parameters, new_parameters),
        (old_flops, new_flops),
        (_bytes(model, sites, {}), _bytes(model, sites, allowed)),
        refused,
    )


def _bytes(model: nn.Module, sites: Sites, units: Mapping[str, int]) -> int:
    """Of parameters and buffers with these units more, without reserved room."""
    inner = unwrap(model)
    tensors, sizes = live_tensors(inner), sites.sizes(model)
    for name, count in units.items():
        sizes[sites[name].axis] += count // sites[name].step
    total = 0
    for name, tensor in (*inner.named_parameters(), *inner.named_buffers()):
        layouts = sites.graph.tensor_dims.get(name) if sites.graph is not None else None
        count = math.prod(size(layout, sizes) for layout in layouts) if layouts else tensors[name].numel()
        total += count * tensor.element_size()
    return total


def checked_units(units: object) -> Mapping[str, object]:
    """Units by site name, neither looked at yet."""
    if not isinstance(units, Mapping) or not all(isinstance(name, str) for name in units):
        raise GrowthError(f"units={units!r} was given; wanted a mapping {{site name: units}}")
    return units


def check_units(sites: Sites, widths: Mapping[str, int], name: str, count: object, how: How) -> int:
    """The units asked for at one site; raises `GrowthError` where the site or the method cannot grow by them.

    widths: the sites' present ones.
    """
    site: Site = sites[name]
    wanted = whole(f"site {name!r}", "units", count)
    multiple = site_multiple(site, widths[name])
    if wanted % multiple:
        raise GrowthError(f"site {name!r}: {wanted} units were asked for; it grows in multiples of {multiple}")
    how.check(site, wanted)
    return wanted
