"""New units that do nothing yet: all weights zero, activation 1."""

from __future__ import annotations

import torch

from ..errors import GrowthError
from ..newborns import Newborns, Start
from ..sites import Site
from .base import How, refuse_mixing

__all__ = ["ZeroBoth"]


class ZeroBoth(How):
    """Incoming and outgoing weights zero, bias 1 (GradMax paper, App. D, figure 13a).

    Each new unit's pre-activation is the constant 1, so only its outgoing weights and biases have a gradient at
    the first step. Where a batch norm follows, which would centre a constant away, its new bias is 1 instead of
    the layer's.

    Keeps the function exactly, in training and evaluation mode. Costs nothing. Raises `GrowthError` where the
    units have neither bias, where norms mix the channels, and for gates and attention heads.
    """

    def check(self, site: Site, units: int) -> None:
        refuse_mixing(self, site)
        if site.gates or site.heads:
            raise GrowthError(
                f"site {site.name!r}: units that multiply others stay at zero with weights that are all zero; "
                "use how.ZeroOutgoing"
            )
        if not site.slots_of("bias", "norm_bias"):
            raise GrowthError(
                f"site {site.name!r}: how.ZeroBoth sets new biases to 1, and neither {site.producers[0]!r} nor a norm "
                "behind it has one; build the layer with bias=True, or use how.ZeroOutgoing"
            )

    def start(self, newborns: Newborns) -> Start:
        site = newborns.site
        slot = (site.slots_of("norm_bias") or site.slots_of("bias"))[-1]
        shape = list(newborns.tensors[slot.tensor].shape)
        shape[slot.dim] = len(newborns.new_positions(slot))
        return Start(values={slot.tensor: torch.ones(shape)})
