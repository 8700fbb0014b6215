"""What a policy is shown of a model at a growth: widths, norms, directions, and what units cost."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .costs import pricing, unit_costs
from .norm_series import evaluation_factor
from .observation import Observation
from .sites import Sites
from .where import Evidence

__all__ = ["evidence_of", "norm_factors"]


def evidence_of(model: nn.Module, sites: Sites, seen: Observation | None, ranks: Mapping[str, float]) -> Evidence:
    """sites: with the multiples in which they grow. seen: what was measured, if anything had to be."""
    price = pricing(model, sites)
    unit_parameters, unit_flops = unit_costs(model, sites, price)
    parameters, flops = price({})
    return Evidence(
        sites=sites,
        widths=sites.widths(model),
        nagn=seen.nagn if seen is not None else {},
        nagn_after_norm=seen.nagn_after_norm if seen is not None else {},
        # Each site was observed to the rank that it can grow by, which differs from site to site.
        directions=(lambda k: seen.all_directions()) if seen is not None and seen.has_directions else None,
        natural=seen.natural if seen is not None and seen.solved("natural") else None,
        unit_parameters=unit_parameters,
        unit_flops=unit_flops,
        parameters=parameters,
        flops=flops,
        norm_factor=norm_factors(model, sites),
        ranks=ranks,
        price=price,
    )


def norm_factors(model: nn.Module, sites: Sites) -> dict[str, float]:
    """What takes each site's singular values to evaluation mode; sites without norms are left out."""
    return {site.name: evaluation_factor(model, sites, site) for site in sites if site.norms}
