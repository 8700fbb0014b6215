"""Units that fall into channels: where each channel's weights lie in a unit's incoming and outgoing vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import GrowthError
from .layout import restricted_size
from .sites import Site, Sites

__all__ = ["Channels", "Side"]


@dataclass(frozen=True)
class Side:
    """Where the channels lie in a unit's incoming (or outgoing) vector.

    given: (channels, n_c), the entries of each; None where they take turns, as a stack's members do.
    """

    channels: int
    length: int
    given: Tensor | None = None

    @cached_property
    def index(self) -> Tensor:
        """(channels, n_c): the entries of each channel."""
        turns = torch.arange(self.length, device="cpu").reshape(-1, self.channels).T
        return turns if self.given is None else self.given

    def parts(self, vectors: Tensor) -> Tensor:
        """Units' vectors (n, k) -> (channels, n_c, k)."""
        if self.given is None:
            return vectors.reshape(-1, self.channels, vectors.shape[1]).transpose(0, 1)
        return vectors[self.given.to(vectors.device)]

    def whole(self, parts: Tensor) -> Tensor:
        """The inverse of `parts`; entries of no channel are zero."""
        if self.given is None:
            return parts.transpose(0, 1).reshape(self.length, parts.shape[2])
        vectors = parts.new_zeros(self.length, parts.shape[2])
        vectors[self.given.reshape(-1).to(parts.device)] = parts.flatten(0, 1)
        return vectors

    def spread(self, values: Tensor) -> Tensor:
        """A value for each channel (channels, k) at that channel's entries (n, k)."""
        if self.given is None:
            return values.expand(self.length // self.channels, *values.shape).reshape(self.length, values.shape[1])
        return self.whole(values[:, None].expand(-1, self.given.shape[1], -1))


@dataclass(frozen=True)
class Channels:
    """Of each channel of one unit: its entries in the unit's vectors.

    Channels are an attention head's, or the one in each group of a grouped convolution, or in each member of a stack.
    into leaves out what gates.
    """

    into: Side
    out: Side

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], sizes: Mapping[int, int], sites: Sites, site: Site, *, bias: bool = False
    ) -> Channels:
        """bias: incoming vectors hold the biases' entries too, as `fastgrow.replay.ReplayMap` lays them out."""
        ends = [slot for slot in site.slots if slot.role in ("producer", "consumer")]
        if site.separate and not site.gates and all(slot.members is not None for slot in ends):
            shapes = [tensors[slot.tensor].shape for slot in ends]
            members = shapes[0][ends[0].members or 0]
            lengths = {"producer": 0, "consumer": 0}
            for slot, shape in zip(ends, shapes, strict=True):
                lengths[slot.role] += math.prod(shape) // shape[slot.dim]
            if bias:
                lengths["producer"] += members * len(site.slots_of("bias"))
            return cls(Side(members, lengths["producer"]), Side(members, lengths["consumer"]))
        one = {**sizes, site.axis: 1}
        into, length = _incoming(tensors, one, sites, site, bias)
        channels = into[0].shape[0]
        if any(block.shape[0] != channels for block in into):
            raise GrowthError(
                f"site {site.name!r}: its producers write {[len(block) for block in into]} channels for one unit; "
                "GradMax needs as many from each; use how.ZeroOutgoing"
            )
        out = torch.cat(_outgoing(tensors, one, sites, site, channels), 1)
        return cls(Side(channels, length, torch.cat(into, 1)), Side(channels, out.numel(), out))


def _incoming(
    tensors: Mapping[str, Tensor], one: Mapping[int, int], sites: Sites, site: Site, bias: bool
) -> tuple[list[Tensor], int]:
    """Each layer's entries (channels, n_c) that do not gate, and the length of a unit's incoming vector."""
    calls = sites.graph.calls if sites.graph is not None else ()
    fans = {call.name: call.fan for call in calls if call.fan > 1}
    into: list[Tensor] = []
    offset = 0
    for name in site.producers:
        slot = site.weight(name, "producer")
        shape = tensors[slot.tensor].shape
        rows = restricted_size(slot.layout, site.axis, one)
        members = shape[slot.members] if slot.members is not None and site.separate else None
        counts = [math.prod(shape) // shape[slot.dim]]
        if bias and any(each.layer == name for each in site.slots_of("bias")):
            counts.append(members or 1)
        gates = [gate for gate in site.gates if gate.layer == name]
        parts = gates[0].parts if gates else 1
        gating = {gate.part for gate in gates}
        for count in counts:
            index = torch.arange(offset, offset + rows * count, device="cpu").reshape(rows, count)
            offset += rows * count
            if name in fans:  # one row for the unit's channels in all groups, each fed by its own inputs
                into.append(index.reshape(rows, fans[name], -1).movedim(1, 0).flatten(1))
                continue
            for part in range(parts):
                own = index[part * rows // parts : (part + 1) * rows // parts]
                if part not in gating:
                    into.append(own if members is None else own.reshape(-1, members).T)
    if not into:
        raise GrowthError(f"site {site.name!r}: all its producers are gates; nothing is left for GradMax to aim at")
    return into, offset


def _outgoing(
    tensors: Mapping[str, Tensor], one: Mapping[int, int], sites: Sites, site: Site, channels: int
) -> list[Tensor]:
    """Each layer's entries (channels, m_c)."""
    calls = sites.graph.calls if sites.graph is not None else ()
    grouped = {call.name for call in calls if call.kind == "grouped" and not call.transposed}
    out: list[Tensor] = []
    offset = 0
    for name in site.consumers:
        slot = site.weight(name, "consumer")
        outs, _, *kernel = (tensors[slot.tensor].shape[dim] for dim in slot.order(tensors[slot.tensor].dim()))
        taps = math.prod(kernel)
        positions = restricted_size(slot.layout, site.axis, one)
        index = torch.arange(offset, offset + outs * positions * taps, device="cpu").reshape(outs, positions, taps)
        offset += outs * positions * taps
        if site.heads:  # the head size is innermost
            split = index.reshape(outs, positions // channels, channels, taps).movedim(2, 0)
        elif name in grouped:  # a group's outputs read its own channel
            split = index.reshape(channels, outs // channels, positions, taps)
        elif slot.members is not None and site.separate:  # the members stand last
            split = index.movedim(2, 0)
        else:  # the group is outermost
            split = index.reshape(outs, channels, positions // channels, taps).movedim(1, 0)
        out.append(split.reshape(channels, -1))
    return out
