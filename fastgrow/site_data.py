"""What forward and backward passes left of one site: the record that everything solving it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .operators import LinearMap, SumMap
from .replay import Capture, Replay, ReplayMap
from .sites import Site, Sites

__all__ = ["SiteData", "summed"]


@dataclass(frozen=True)
class SiteData:
    """captures: one for each batch, with its weight in M = sum_b weight_b M_b.

    bias: whether the producers' biases are a column of M. tracing: the model may be traced at a batch's sizes.
    """

    model: nn.Module
    sites: Sites
    site: Site
    captures: Sequence[Capture]
    weights: Sequence[float]
    bias: bool = False
    tracing: bool = True

    @property
    def samples(self) -> int:
        return sum(capture.samples for capture in self.captures)

    def batches(self) -> Iterator[tuple[Capture, float]]:
        """Each capture with its weight."""
        return zip(self.captures, self.weights, strict=True)

    def replay(self, capture: Capture, **options: Any) -> Replay:
        """The middle of the site on new units, for one batch; options: those of `Replay`."""
        return Replay(self.model, self.sites, self.site, capture, tracing=self.tracing, **options)

    def maps(self, base: Tensor | None = None, *, live: bool = False) -> list[ReplayMap]:
        """M by replay, batch by batch, around these incoming weights."""
        return [
            ReplayMap(self.replay(capture, live=live), weight, bias=self.bias, base=base)
            for capture, weight in self.batches()
        ]


def summed(maps: Sequence[LinearMap]) -> LinearMap:
    """The sum of one or more batches' maps."""
    return maps[0] if len(maps) == 1 else SumMap(list(maps))
