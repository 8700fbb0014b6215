"""Net2Net: units copied at random, function unchanged (Chen, Goodfellow, Shlens, ICLR 2016)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import number
from ..errors import GrowthError
from ..newborns import Newborns, Start
from ..sites import Site
from .base import How

__all__ = ["Net2Net", "copied_together", "copy_sources"]


class Net2Net(How):
    """Net2WiderNet: each new unit is a copy of a present one, ``g(j)`` drawn at random.

    Incoming weights, biases, norms' weights and statistics are copied; the outgoing columns of a unit and
    its copies are divided by their number, ``W'[:, j] = W[:, g(j)] / |{i: g(i) = g(j)}|`` (the paper's eq. in
    section 3.1). Groups of channels that a norm or a grouped convolution ties together are copied whole; where
    a LayerNorm or RMSNorm runs over the units, all of them are copied equally often (units: a multiple of the
    width).

    noise: standard deviation of gaussian noise on the copies' incoming weights, relative to the root mean
    square of the layer's weights. Without it copies receive equal gradients and stay equal unless dropout or
    the optimizer's state parts them; the paper adds some.

    Keeps the function to float rounding with noise=0, in training and evaluation mode (dropout aside, which masks
    copies apart). Costs nothing. Optimizer state: kept for old entries, fresh for copies. The identity layer of
    Net2DeeperNet is `fastgrow.insert_layer`. Raises `GrowthError` for tied weights and for numbers of units that
    cannot be copied.
    """

    rewrites = True

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = number("how.Net2Net", "noise", noise, least=0)

    def multiple(self, site: Site, width: int) -> int:
        return copied_together(site, width)

    def start(self, newborns: Newborns) -> Start:
        incoming = {}
        if self.noise:
            for name in newborns.site.producers:
                weight = newborns.weight(name, "producer")
                size = float(weight.double().square().mean().sqrt())
                drawn = torch.randn(newborns.shape(name, "producer")) * (self.noise * size)
                incoming[name] = drawn.to(weight.device, weight.dtype)
        return Start(incoming, sources=copy_sources(newborns))


def copied_together(site: Site, width: int) -> int:
    """The units that are copied together at a site of this width."""
    mixing = any(norm.kind in ("layer_norm", "rms_norm") for norm in site.norms)
    return width if mixing or (site.multiple == site.width and site.multiple > site.step) else site.multiple


def copy_sources(newborns: Newborns) -> Tensor:
    """(steps,) int64: the present unit that each new one copies, so that norms over channels keep their output."""
    site, steps = newborns.site, newborns.steps
    width = newborns.sizes[site.axis]
    mixing = [norm for norm in site.norms if norm.kind in ("layer_norm", "rms_norm")]
    block = max(1, copied_together(site, width * site.step) // site.step)
    if steps % block or width % block:
        raise GrowthError(
            f"site {site.name!r}: {newborns.units} units were asked for, but its channels are copied "
            f"{block * site.step} at a time"
            + (f" ({mixing[0].module!r} runs over all of them)" if mixing else "")
            + f"; ask for a multiple of {block * site.step}"
        )
    drawn = torch.randint(width // block, (steps // block,)) if width > block else torch.zeros(steps // block)
    return (drawn.long()[:, None] * block + torch.arange(block)).reshape(-1)
