"""NAGN: the layers whose activation gradients stand out from their neighbours' grow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Literal

from typing_extensions import Unpack

from ..arguments import choice, number, whole
from ..errors import GrowthError
from ..sites.site import Site, Sites
from .base import Where
from .evidence import Evidence
from .limits import LimitOptions, Limits

__all__ = ["NAGN"]


class NAGN(Where):
    """Grows the sites whose Normalized Activation Gradient Norm exceeds their neighbours' (NAGN, section 3).

    With NAGN_l of site l = 1 ... L in forward order and n_l its width:

    - contrast ``r_l = NAGN_l / ((NAGN_{l-1} + NAGN_{l+1}) / 2) - 1`` (eq. 2); at the ends the neighbour
      average is ``NAGN_2 - m`` and ``NAGN_{L-1} + m``, m the median of ``NAGN_{l+1} - NAGN_l``;
    - ``p_l = max(r_l - threshold, 0)``, ``s_l = p_l / max_j p_j``, ``dn_l = min(max_new, floor(s_l n_l))``,
      at least one unit where p_l > 0 (ours); no width more than doubles, but for the one step that
      `Site.multiple` or `round_to` may need;
    - if no contrast exceeds the threshold, each site with ``NAGN_l > NAGN_{l-1}`` grows by `conservative`
      units;
    - with `monotone`, widths are then made non-decreasing in forward order, within the same limits.

    max_new: Delta_max, the most units that a site gains in one growth.
    Over how many steps NAGN is averaged, and how far they lie apart: `fastgrow.Grower(batches=, every=)`.
    read: "after_norm" takes NAGN behind the norm that follows a layer, "before_norm" at the layer's own
    output, the paper's letter. **Open**: planted bottlenecks show reliably only behind a batch norm.
    conservative: 0 switches the rule off. **Open**: the paper gives no number.
    output_neighbour: let the output layer (of several heads the one with the largest value) stand as the
    neighbour of the last site; it never grows. Its gradients are far larger and hide the last site, so L is the
    last site by default. **Open**.

    Off a chain (ours; **open**): sites in the order of their first producer, the value of a site the
    largest over its producers, projection shortcuts left out; `monotone` compares plain layers, streams
    that several layers write, gated layers and attention heads each with their own kind only. Where an
    extrapolated neighbour average is not positive, the one neighbour stands for it; the only site there
    is has no neighbours and grows conservatively.

    Raises `GrowthError` for arguments out of range, and where NAGN of a site's layers was not observed or
    is not finite, naming the layer.
    """

    def __init__(
        self,
        threshold: float = 0.05,
        max_new: int | None = None,
        monotone: bool = True,
        read: Literal["after_norm", "before_norm"] = "after_norm",
        *,
        conservative: int = 1,
        output_neighbour: bool = False,
        **limits: Unpack[LimitOptions],
    ) -> None:
        super().__init__(Limits(**limits, max_new=max_new))
        self.threshold = number("where.NAGN", "threshold", threshold, least=0)
        self.max_new = max_new
        self.monotone = monotone
        self.read = choice("where.NAGN", "read", read, ("after_norm", "before_norm"))
        self.reads = frozenset({"nagn_after_norm" if self.read == "after_norm" else "nagn_own"})
        self.conservative = whole("where.NAGN", "conservative", conservative, least=0)
        self.output_neighbour = output_neighbour

    def most(self, site: Site, width: int) -> int:
        return width if self.max_new is None else min(self.max_new, width)

    def rounded(self, site: Site, width: int, wish: int) -> int:
        return self.limits.rounded(site, width, wish, most=width)

    def allocate(self, evidence: Evidence) -> dict[str, int]:
        shortcuts = projection_shortcuts(evidence.sites)
        chain, values = [], []
        for site, layers in _forward_order(evidence.sites, shortcuts):
            chain.append(site)
            values.append(max(self._value(evidence, layer) for layer in layers))
        profile = list(values)
        if self.output_neighbour:
            profile += self._output(evidence)
        found = contrasts(profile)[: len(chain)]
        excess = [max(contrast - self.threshold, 0.0) for _, contrast in found]
        top = max(excess, default=0.0)

        wish: dict[str, int] = {}
        for place, site in enumerate(chain):
            width, most = evidence.widths[site.name], self.most(site, evidence.widths[site.name])
            share, reason, units = 0.0, "", 0
            if excess[place] > 0:
                share = excess[place] / top if math.isfinite(top) else float(math.isinf(excess[place]))
                units, reason = min(most, math.floor(share * width)), "contrast"
                units = max(units, 1)
            elif top == 0 and (len(chain) == 1 or (place and values[place] > values[place - 1])):
                units = min(most, self.conservative)
                reason = "conservative" if units else ""
            wish[site.name] = units
            self.explanation[site.name] = {
                "nagn": values[place],
                "neighbours": found[place][0],
                "contrast": found[place][1],
                "excess": excess[place],
                "share": share,
                "reason": reason,
            }
        if self.monotone:
            self._make_monotone(evidence, chain, wish)
        return wish

    def _make_monotone(self, evidence: Evidence, chain: Sequence[Site], wish: dict[str, int]) -> None:
        previous: dict[tuple[bool, bool, bool], int] = {}
        for site in chain:
            kind = (site.heads, bool(site.gates), len(site.producers) > 1)
            width = evidence.widths[site.name]
            lacking = min(previous.get(kind, 0) - width, self.most(site, width))
            if lacking > wish[site.name]:
                wish[site.name] = lacking
                self.explanation[site.name]["reason"] = "monotone"
            previous[kind] = width + wish[site.name]

    def _value(self, evidence: Evidence, layer: str) -> float:
        values, read = evidence.nagn, "nagn"
        # Without a norm there is one place to read only.
        if self.read == "after_norm" and (
            layer in evidence.nagn_after_norm or evidence.sites.layers[layer].norm is not None
        ):
            values, read = evidence.nagn_after_norm, "nagn_after_norm"
        if layer not in values:
            raise GrowthError(
                f"where.NAGN: layer {layer!r} has no value in {read}; wanted NAGN observed over a backward "
                "pass that reaches the layer: run one inside observe(nagn=True)"
            )
        value = float(values[layer])
        if not math.isfinite(value) or value < 0:
            raise GrowthError(
                f"where.NAGN: layer {layer!r} has {read} {value}; wanted a finite number of at least 0; the "
                "gradients of that batch overflowed"
            )
        return value

    def _output(self, evidence: Evidence) -> list[float]:
        outputs = [name for name, info in evidence.sites.layers.items() if info.is_output]
        return [max(self._value(evidence, name) for name in outputs)] if outputs else []


def contrasts(values: Sequence[float]) -> list[tuple[float, float]]:
    """(neighbour average, relative contrast) of each value (eq. 2), the ends by the median slope."""
    if len(values) < 2:
        return [(value, 0.0) for value in values]
    slope = median(later - earlier for earlier, later in pairwise(values))
    averages = [(before + after) / 2 for before, after in zip(values, values[2:], strict=False)]
    first = values[1] - slope if values[1] > slope else values[1]
    last = values[-2] + slope if values[-2] + slope > 0 else values[-2]
    return [
        (average, _contrast(value, average)) for value, average in zip(values, [first, *averages, last], strict=True)
    ]


def _contrast(value: float, average: float) -> float:
    if average > 0:
        return value / average - 1
    return math.inf if value > 0 else 0.0


def _forward_order(sites: Sites, shortcuts: dict[str, set[str]]) -> list[tuple[Site, list[str]]]:
    """Sites in the order of their first producer, each with the layers that are read."""
    ordered = []
    for site in sites:
        layers = [name for name in site.producers if name in sites.layers and not sites.layers[name].is_output]
        read = [name for name in layers if name not in shortcuts.get(site.name, ())] or layers
        if read:
            ordered.append((min(sites.layers[name].position for name in read), site, read))
    ordered.sort(key=lambda entry: entry[0])
    return [(site, read) for _, site, read in ordered]


def projection_shortcuts(sites: Sites) -> dict[str, set[str]]:
    """Site name -> its producers that bridge a path through other sites (a ResNet's downsampling layer).

    A layer from site R to site S is one where other layers lead from R to S through at least one more
    site, without coming back to R.
    """
    every = (*sites, *sites.left_out)
    edges = [
        (layer, source.name, site.name)
        for site in every
        for layer in site.producers
        for source in every
        if layer in source.consumers and source.name != site.name
    ]
    found: dict[str, set[str]] = {}
    for layer, start, end in edges:
        others = [(a, b) for name, a, b in edges if name != layer]
        seen = {b for a, b in others if a == start} - {end}
        front = list(seen)
        while front:
            here = front.pop()
            further = {b for a, b in others if a == here} - seen - {start}
            seen |= further
            front += further
        if end in seen:
            found.setdefault(end, set()).add(layer)
    return found
