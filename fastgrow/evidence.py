"""What a policy is shown of a model at a growth: widths, norms, directions, and what units cost."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .costs import pricing, unit_costs
from .names import find_module
from .observation import Observation
from .sites import Sites, unwrap
from .stages import axes_of, live, live_part
from .where import Evidence

__all__ = ["evidence_of"]


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
        norm_factor=_norm_factors(model, sites),
        ranks=ranks,
        price=price,
    )


def _norm_factors(model: nn.Module, sites: Sites) -> dict[str, float]:
    """sqrt(eps / (running variance + eps)) of the batch norm behind each site, its channels' mean."""
    factors = {}
    for site in sites:
        for norm in site.norms:
            module = find_module(unwrap(model), norm.module)
            variance = getattr(module, "running_var", None)
            if norm.kind == "batch_norm" and module is not None and module.training and variance is not None:
                variance = live_part(variance, live(axes_of(module).get("running_var", {})))
                eps = float(module.eps)  # type: ignore[arg-type]
                factors[site.name] = float((eps / (variance + eps)).sqrt().mean())
                break
    return factors
