"""SPARKLING: copies that keep the scale of the activations, parted by the optimizer (arXiv 2602.02472)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..arguments import choice, whole
from ..errors import GrowthError
from ..newborns import Newborns, Start
from ..sites import Site
from ..stages import newest_stage
from .base import How
from .net2net import copied_together, copy_sources

__all__ = ["Sparkling"]

_WARMUP = 100


class Sparkling(How):
    """Units copied with the root mean square of the activations kept; the optimizer tells the copies apart.

    Width growth in the middle of training needs two things: the signal's scale must not jump, and copies
    must not stay copies. Incoming weights, biases and norms are copied. Read from the paper's abstract and
    summaries; open readings are options:

    scaling: "function" (default): the outgoing columns of a unit and its c - 1 copies are divided by c, so that
    every layer's output, and with it its RMS, is what it was; "rms": by sqrt(c), which keeps the RMS of weights
    times independent features, and the function only up to that factor.
    Asymmetric state reset: the copies' optimizer state starts anew, the old units keep theirs (this is what growth
    does to every optimizer's state).
    warmup: steps over which the new blocks' learning rate rises to the full one, the old ones' staying as it is;
    None: 100 with the optimizers of `fastgrow.optim`, none with others, which have one rate for a whole tensor.

    With plain SGD and no warm-up nothing tells the copies apart. Keeps the function to float rounding with
    scaling="function" (dropout aside). Costs nothing. Raises `GrowthError` as `Net2Net` does, and where a warm-up is
    asked of an optimizer that cannot do it.
    """

    rewrites = True

    def __init__(self, scaling: str = "function", warmup: int | None = None) -> None:
        self.scaling = choice("how.Sparkling", "scaling", scaling, ("function", "rms"))
        self.warmup = None if warmup is None else whole("how.Sparkling", "warmup", warmup, least=0)

    def check_optimizers(self, optimizers: Iterable[Any]) -> None:
        for optimizer in optimizers if self.warmup else ():
            if not callable(getattr(optimizer, "set_stage", None)):
                raise GrowthError(
                    f"how.Sparkling: warmup={self.warmup} was asked for, but {type(optimizer).__name__} has one "
                    "learning rate for old and new units; use fastgrow.optim, or warmup=0"
                )

    def multiple(self, site: Site, width: int) -> int:
        return copied_together(site, width)

    def start(self, newborns: Newborns) -> Start:
        return Start(sources=copy_sources(newborns), share=1.0 if self.scaling == "function" else 0.5)

    def settle(self, model: nn.Module, optimizers: Iterable[Any]) -> None:
        steps = _WARMUP if self.warmup is None else self.warmup
        for optimizer in optimizers:
            if steps and callable(getattr(optimizer, "set_stage", None)):
                optimizer.set_stage(newest_stage(model), warmup=steps)
