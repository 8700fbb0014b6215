"""NAGN's growth operator: fresh incoming weights, silent outgoing ones."""

from __future__ import annotations

import torch

from ..newborns import Newborns, Start
from ..sites import Site
from .base import How, refuse_mixing

__all__ = ["ZeroOutgoing"]


class ZeroOutgoing(How):
    """Incoming rows N(0, 2 / fan_in) (Kaiming), outgoing columns zero, biases zero: the function stays.

    The growth operator of the NAGN paper. The block between the new units of two neighbouring sites is
    zero. Costs nothing; only the outgoing weights have a gradient at the first step.
    Raises `GrowthError` where norms mix the channels: new ones that are not zero would change the others.
    """

    def check(self, site: Site, units: int) -> None:
        refuse_mixing(self, site)

    def start(self, newborns: Newborns) -> Start:
        incoming = {}
        for name in newborns.site.producers:
            shape = newborns.shape(name, "producer")
            weight = newborns.weight(name, "producer")
            fan_in = max(1, newborns.fan_in(name))
            rows = torch.randn(shape, dtype=torch.float32) * (2.0 / fan_in) ** 0.5
            incoming[name] = rows.to(weight.device, weight.dtype)
        return Start(incoming=incoming)
