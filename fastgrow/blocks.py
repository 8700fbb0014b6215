"""Directions at sites whose units are made of several channels, or multiply other channels.

A unit of attention is a head: its queries and keys start at random, which fixes the map from its values to
the output projection; its channels share that map. A unit of a gated MLP has a random gate of its own, and
so a map of its own. A unit of a grouped convolution has a channel in every group, each with its own map.
In each case one replay of the middle multiplies all the maps at once, and block Krylov runs on all of them
side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .cores import fixed_signs
from .errors import GrowthError
from .foresight import foreseen
from .layout import restricted_size
from .replay import Capture, Replay, ReplayMap
from .sites import Site, Sites, tensors_of
from .solve import Directions

__all__ = ["UnitDirections", "block_directions", "gate_rows", "has_blocks"]

_ROUNDS = 24
_CAPTURED = 0.999  # the captured norm that is waited for, as it is foreseen
_SPARE = 4


@dataclass(frozen=True, slots=True)
class UnitDirections(Directions):
    """Directions of whole units: left (m, k) has a unit's outgoing vector of norm 1 in each column.

    values: the norm of the gradient that it attains; incoming: (n, k), the units' random gates, zero elsewhere.
    """

    incoming: Tensor | None = None


def has_blocks(site: Site) -> bool:
    """Whether this site's units need more than one direction each, or gates."""
    return bool(site.gates) or site.separate


def gate_rows(model: nn.Module, sites: Sites, site: Site, units: int) -> Tensor:
    """(n, units): random incoming weights for the gates, each entry of the present weights' size; zero elsewhere."""
    tensors, sizes = tensors_of(model), sites.sizes(model)
    one = {**sizes, site.axis: 1}
    pieces = []
    for name in site.producers:
        slot = site.weight(name, "producer")
        weight = tensors[slot.tensor].detach()
        weight = weight if slot.dim == 0 else weight.transpose(0, 1)
        rows = restricted_size(slot.layout, site.axis, one)
        piece = torch.zeros(units, rows, math.prod(weight.shape[1:]), dtype=torch.float64)
        gates = [gate for gate in site.gates if gate.layer == name]
        if gates:
            size = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) / math.sqrt(weight.numel())
            for gate in gates:
                part = slice(gate.part * rows // gate.parts, (gate.part + 1) * rows // gate.parts)
                piece[:, part] = torch.randn(piece[:, part].shape, dtype=torch.float64) * size
        pieces.append(piece.reshape(units, -1))
    return torch.cat(pieces, 1).T


@dataclass(frozen=True)
class _Channels:
    """Where the channels of a unit lie in its incoming and outgoing vectors."""

    into: Tensor  # (channels, n_c)
    out: Tensor  # (channels, m_c)

    @classmethod
    def of(cls, model: nn.Module, sites: Sites, site: Site) -> _Channels:
        tensors, sizes = tensors_of(model), sites.sizes(model)
        one = {**sizes, site.axis: 1}
        into: list[Tensor] = []
        offset, channels = 0, 0
        for name in site.producers:
            slot = site.weight(name, "producer")
            weight = tensors[slot.tensor]
            rows = restricted_size(slot.layout, site.axis, one)
            length = weight.numel() // weight.shape[slot.dim]
            index = torch.arange(offset, offset + rows * length).reshape(rows, length)
            offset += rows * length
            gates = [gate for gate in site.gates if gate.layer == name]
            parts = gates[0].parts if gates else 1
            free = [p for p in range(parts) if p not in {gate.part for gate in gates}]
            for part in free:
                into.append(index[part * rows // parts : (part + 1) * rows // parts])
        if not into:
            raise GrowthError(f"site {site.name!r}: all its producers are gates; nothing is left for GradMax to aim at")
        channels = into[0].shape[0]
        if any(block.shape[0] != channels for block in into):
            raise GrowthError(
                f"site {site.name!r}: its producers write {[len(block) for block in into]} channels for one unit; "
                "GradMax needs as many from each; use how.ZeroOutgoing"
            )
        calls = sites.graph.calls if sites.graph is not None else ()
        grouped = {call.name for call in calls if call.kind == "grouped"}
        out: list[Tensor] = []
        offset = 0
        for name in site.consumers:
            slot = site.weight(name, "consumer")
            shape = tensors[slot.tensor].shape
            kernel = math.prod(shape[2:])
            outs = shape[1 - slot.dim]
            positions = restricted_size(slot.layout, site.axis, one)
            index = torch.arange(offset, offset + outs * positions * kernel).reshape(outs, positions, kernel)
            offset += outs * positions * kernel
            if site.heads:  # the head size is innermost
                split = index.reshape(outs, positions // channels, channels, kernel).movedim(2, 0)
            elif name in grouped:  # a group's outputs read its own channel
                split = index.reshape(channels, outs // channels, positions, kernel)
            else:  # the group is outermost
                split = index.reshape(outs, channels, positions // channels, kernel).movedim(1, 0)
            out.append(split.reshape(channels, -1))
        return cls(torch.cat(into, 1), torch.cat(out, 1))


class _Maps:
    """Maps (problems, m_c, n_c) of one site, known by their products; block columns are units or channels."""

    def __init__(self, maps: Sequence[ReplayMap], channels: _Channels, site: Site, units: int) -> None:
        self.maps = maps
        self.channels = channels
        self.by_channel = site.separate
        self.units = units
        self.m, self.n = maps[0].shape
        self.dtype, self.device = maps[0].dtype, maps[0].device
        self.into, self.out = channels.into.to(self.device), channels.out.to(self.device)
        count = self.into.shape[0]
        self.problems, self.block = (count, units) if self.by_channel else (units, count)

    def _scatter(self, blocks: Tensor, index: Tensor, length: int) -> Tensor:
        """(problems, d, block) -> unit vectors (length, units)."""
        per_unit = blocks.permute(2, 0, 1) if self.by_channel else blocks.permute(0, 2, 1)
        vectors = blocks.new_zeros(self.units, length)
        vectors[:, index.reshape(-1)] = per_unit.reshape(self.units, -1)
        return vectors.T

    def _gather(self, vectors: Tensor, index: Tensor) -> Tensor:
        per_unit = vectors.T[:, index.reshape(-1)].reshape(self.units, *index.shape)
        return per_unit.permute(1, 2, 0) if self.by_channel else per_unit.permute(0, 2, 1)

    def matmat(self, blocks: Tensor) -> Tensor:
        X = self._scatter(blocks, self.into, self.n)
        return self._gather(sum(m.matmat(X) for m in self.maps), self.out)  # type: ignore[arg-type]

    def rmatmat(self, blocks: Tensor) -> Tensor:
        Y = self._scatter(blocks, self.out, self.m)
        return self._gather(sum(m.rmatmat(Y) for m in self.maps), self.into)  # type: ignore[arg-type]

    def leading(self) -> tuple[Tensor, Tensor, float]:
        """Left vectors (problems, m_c, b), values (problems, b), and the captured norm as estimated."""
        rows = self.out.shape[1]
        wanted = min(self.block, rows, self.into.shape[1])
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(self.problems, rows, self.block, generator=generator, dtype=torch.float64)
        Y = torch.linalg.qr(start.to(self.device, self.dtype)).Q
        basis, images = Y[..., :0], Y.new_empty(self.problems, self.into.shape[1], 0)
        ritz = torch.zeros(self.problems, 0, 0, dtype=torch.float64)
        captured = 0.0
        while True:
            Y = Y - basis @ (basis.mT @ Y)
            Y = torch.linalg.qr(Y - basis @ (basis.mT @ Y)).Q
            Y = Y - basis @ (basis.mT @ Y)
            X = self.rmatmat(self._padded(Y))[..., : Y.shape[-1]]
            basis, images = torch.cat([basis, Y], -1), torch.cat([images, X], -1)
            ritz = self._grown(ritz, (images.double().mT @ X.double()).cpu())
            room = rows - basis.shape[-1]
            values, vectors = torch.linalg.eigh(ritz)
            captured = self._captured(ritz, values[..., -wanted:], room)
            if room == 0 or captured >= _CAPTURED or basis.shape[-1] >= self.block * _ROUNDS:
                break
            Y = self.matmat(self._padded(X))[..., : min(X.shape[-1], room)]
        best = vectors[..., -wanted:].flip(-1).to(self.device, self.dtype)
        attained = values[..., -wanted:].flip(-1).clamp(min=0).sqrt()
        left = basis @ best
        return left * fixed_signs(left), attained.to(self.device, self.dtype), captured

    def _padded(self, blocks: Tensor) -> Tensor:
        """Columns of zeros up to a full block."""
        return torch.nn.functional.pad(blocks, (0, self.block - blocks.shape[-1]))

    def _grown(self, ritz: Tensor, fresh: Tensor) -> Tensor:
        """``T = Q^T M M^T Q`` with the columns of one more block."""
        old, size = ritz.shape[-1], fresh.shape[-2]
        grown = ritz.new_empty(self.problems, size, size)
        grown[..., :old, :old] = ritz
        grown[..., old:] = fresh
        grown[..., old:, :] = fresh.mT
        return grown

    def _captured(self, ritz: Tensor, values: Tensor, room: int) -> float:
        """The least captured norm of all problems, as it is foreseen; 0 before two rounds."""
        if room == 0:
            return 1.0
        if ritz.shape[-1] < 2 * self.block:
            return 0.0
        total = values.clamp(min=0).sum(-1)
        reach = torch.maximum(foreseen(ritz, self.block, values.shape[-1], room), total)
        return math.sqrt(float(torch.where(reach > 0, total / reach, 1.0).min()))


def block_directions(
    model: nn.Module, sites: Sites, site: Site, captures: Sequence[Capture], weights: Sequence[float], units: int
) -> UnitDirections:
    """GradMax's directions for so many units, whole units at a time."""
    channels = _Channels.of(model, sites, site)
    replays = [Replay(model, sites, site, capture) for capture in captures]
    count = units + _SPARE if site.separate else units
    gates = gate_rows(model, sites, site, count) if site.gates else None
    maps = []
    for replay, weight in zip(replays, weights, strict=True):
        base = None if gates is None else gates.to(replay.device, replay.dtype)
        maps.append(ReplayMap(replay, weight, base=base))
    problem = _Maps(maps, channels, site, count)
    left, values, captured = problem.leading()
    if site.separate:  # unit j takes the j-th direction of every channel
        left, values = left[..., :units], values[..., :units]
        vectors, attained = left.permute(2, 0, 1), values.square().sum(0).sqrt()  # (units, channels, m_c)
    else:
        vectors, attained = left.permute(0, 2, 1), values.square().sum(-1).sqrt()
    used = vectors.shape[1]
    outgoing = vectors.new_zeros(vectors.shape[0], problem.m)
    outgoing[:, problem.out[:used].reshape(-1)] = vectors.reshape(vectors.shape[0], -1)
    incoming = None if gates is None else gates.to(problem.device, problem.dtype)
    return UnitDirections(
        outgoing.T / used**0.5, attained / used**0.5, vectors.new_zeros(problem.n, vectors.shape[0]), captured, incoming
    )
