"""What a policy sees when it decides where to grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..errors import GrowthError
from ..sites.site import Sites

__all__ = ["Evidence", "Spectrum", "effective_dimension"]


class Spectrum(Protocol):
    """What policies read of a site's `Directions`: its singular values, largest first."""

    @property
    def values(self) -> Tensor: ...  # (k,)


@dataclass(frozen=True)
class Evidence:
    """A network just before a growth. Mappings are by site name, but for NAGN, which is by layer name.

    Empty mappings and absent functions stand for what was not observed; a policy that reads one raises
    `GrowthError`.
    """

    sites: Sites
    widths: Mapping[str, int]
    """Present width in channels."""
    nagn: Mapping[str, float] = field(default_factory=dict)
    """Layer name -> NAGN at the layer's own output."""
    nagn_after_norm: Mapping[str, float] = field(default_factory=dict)
    """Layer name -> NAGN behind the norm that follows; layers without a norm may be missing."""
    directions: Callable[[int], Mapping[str, Spectrum]] | None = None
    """Leading k singular triplets of every site's growth matrix."""
    natural: Callable[[int], Mapping[str, Spectrum]] | None = None
    """The same for TINY's matrix: gradient no present weight can follow, whitened by the input covariance."""
    unit_parameters: Mapping[str, float] = field(default_factory=dict)
    """Parameters that one channel adds, at the present widths."""
    unit_flops: Mapping[str, float] = field(default_factory=dict)
    """FLOPs that one channel adds to a sample's forward pass, at the present widths."""
    parameters: int = 0
    flops: float = 0.0
    norm_factor: Mapping[str, float] = field(default_factory=dict)
    """What singular values of a site's growth matrix are multiplied by to stand for evaluation mode; 1 where missing.

    A batch norm measured in training mode multiplies a new channel's gradient by gamma/sqrt(eps), in evaluation mode by
    gamma/sqrt(running_var + eps): the factor is sqrt(eps/(running_var + eps)), multiplied over the norms in series (of
    norms without a running variance, instance and group norms too, with that of new channels, 1). Values of TINY's
    matrix need none: what the norms multiply, the covariance divides by.
    """
    ranks: Mapping[str, float] = field(default_factory=dict)
    """`effective_dimension` of each site's activations or weights."""
    price: Callable[[Mapping[str, int]], tuple[float, float]] | None = None
    """Units per site -> (parameters, FLOPs a sample) of the whole network with them.

    Without it they are estimated as linear in the units, which leaves out the weights between the new
    units of two neighbouring sites.
    """

    def priced(self, units: Mapping[str, int]) -> tuple[float, float]:
        """(parameters, FLOPs a sample) of the whole network with these units."""
        if self.price is not None:
            return self.price(units)
        return (
            self.parameters + sum(count * self.unit_cost("parameters", name) for name, count in units.items()),
            self.flops + sum(count * self.unit_cost("flops", name) for name, count in units.items()),
        )

    def unit_cost(self, cost: str, site: str) -> float:
        """What one channel adds at a site: 1 for "units", its parameters, or its FLOPs."""
        if cost == "units":
            return 1.0
        known = self.unit_parameters if cost == "parameters" else self.unit_flops
        if site not in known:
            raise GrowthError(
                f"site {site!r}: what a channel costs in {cost} is not known; wanted Evidence.unit_{cost}"
            )
        return known[site]


def effective_dimension(features: Tensor, epsilon: float = 0.01) -> int:
    """How many directions the channels span: ``|{sigma_i(H / sqrt(n)) > epsilon}|`` (NORTH*).

    features: (N, C) or (N, C, *spatial) activations, any float dtype; H is (n, C) with positions counted
    as samples. For weights, pass them as (in x kernel, out). Computed in float64 from the smaller of the
    two Gram matrices. Raises `GrowthError` for fewer than two dimensions and for non-finite values.
    """
    if features.dim() < 2:
        raise GrowthError(f"effective_dimension: features of shape {tuple(features.shape)}; wanted (N, C, *spatial)")
    matrix = features.detach().movedim(1, -1).flatten(0, -2).double()  # (n, C)
    if matrix.numel() == 0:
        return 0
    if not bool(matrix.isfinite().all()):
        raise GrowthError("effective_dimension: features hold NaN or infinity; wanted finite values")
    samples, channels = matrix.shape
    gram = matrix.mT @ matrix if channels <= samples else matrix @ matrix.mT
    return int((torch.linalg.eigvalsh(gram.div(samples)) > epsilon**2).sum())
