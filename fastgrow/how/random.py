"""Random outgoing weights: the baseline that GradMax is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import choice, number
from ..blocks import gate_rows
from ..newborns import Newborns, Start
from ..sites import Site
from .base import How, refuse_dead, refuse_mixing

__all__ = ["Random"]


class Random(How):
    """Incoming weights zero, outgoing weights random, with GradMax's norms: the function stays what it was.

    Each unit's outgoing column is drawn from N(0, 1) (or U[-1, 1]) and given the norm `scale` times the
    mean norm of the present units' outgoing weights (as in GradMax), or `scale` itself with norm="fixed"; in each
    group of a grouped convolution and each member of a stack by itself.
    Gates, and attention's queries and keys, start at random as in GradMax: what multiplies zeros would never learn.
    Costs nothing. Raises `GrowthError` where a LayerNorm mixes the channels, and for a ReLU that is a function call.
    (GradMax paper, section 4; the public code draws from U[0, 1], all positive.)
    """

    starts_at_zero = True

    def __init__(self, scale: float = 0.5, norm: str = "mean", distribution: str = "normal") -> None:
        self.scale = number("how.Random", "scale", scale, above=0)
        self.norm = choice("how.Random", "norm", norm, ("mean", "fixed"))
        self.distribution = choice("how.Random", "distribution", distribution, ("normal", "uniform"))

    def check(self, site: Site, units: int) -> None:
        refuse_mixing(self, site, ("layer_norm",))
        if not site.gates:  # theirs start away from zero
            refuse_dead(self, site, "how.ZeroOutgoing, or how.GradMax (signed pairs)")

    def start(self, newborns: Newborns) -> Start:
        columns = random_columns(newborns, self.distribution)
        target: Tensor | float
        if newborns.site.separate:
            parts = newborns.outgoing_part_norms(self.scale, self.norm)[:, None]
            target = newborns.channels.out.spread(parts)
        else:
            target = newborns.outgoing_norm(self.scale, self.norm)
        incoming = {}
        if newborns.site.gates:
            gates = gate_rows(newborns.tensors, newborns.sizes, newborns.site, newborns.steps).to(columns)
            incoming = newborns.split(gates, "producer")
        return Start(incoming, outgoing=newborns.split(columns * target, "consumer"))


def random_columns(newborns: Newborns, distribution: str = "normal") -> Tensor:
    """(length, steps) float32: a random outgoing vector for each new unit.

    Of norm 1; of a unit that has channels in several groups or members (`Site.separate`) in each of them.
    """
    parts = [newborns.shape(name, "consumer") for name in newborns.site.consumers]
    length = sum(torch.Size(shape).numel() for shape in parts) // newborns.steps
    device = newborns.weight(newborns.site.consumers[0], "consumer").device
    drawn = torch.empty(length, newborns.steps, dtype=torch.float32)
    drawn = drawn.normal_() if distribution == "normal" else drawn.uniform_(-1, 1)
    if newborns.site.separate:
        out = newborns.channels.out
        norms = out.spread(out.parts(drawn).norm(dim=1))
    else:
        norms = drawn.norm(dim=0)
    return (drawn / norms).to(device)
