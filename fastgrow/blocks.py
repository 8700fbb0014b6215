"""Directions at sites whose units are made of several channels, or multiply other channels.

A unit of attention is a head: its queries and keys start at random, which fixes the map from its values to
the output projection; its channels share that map. A unit of a gated MLP has a random gate of its own, and
so a map of its own. A unit of a grouped convolution has a channel in every group, a unit of a stack of matrices one
in every member, each with its own map. In each case one replay of the middle multiplies all the maps at once, and
block Krylov runs on all of them side by side; a stack with an elementwise middle needs no replay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cores import fixed_signs, svd
from .errors import GrowthError
from .foresight import FORESEEN_FROM, foreseen
from .growth_map import stacked_pairs
from .layout import restricted_size
from .members import Channels, Side
from .operators import StackedPair, scale_by_power
from .reduction import SMALL_SIDE
from .replay import ReplayMap
from .site_data import SiteData
from .sites import Site, tensors_of
from .solve import Directions, solve

__all__ = ["UnitDirections", "block_directions", "gate_rows", "has_blocks"]

_ROUNDS = 24
_CAPTURED = 0.999  # the captured norm that is waited for, as it is foreseen
_SPARE = 4


@dataclass(frozen=True, slots=True)
class UnitDirections(Directions):
    """Directions of whole units: left (m, k) has a unit's outgoing vector of norm 1 in each column.

    values: the norm of the gradient that it attains; incoming: (n, k), the units' random gates, zero elsewhere.
    parts: (channels, k), where a unit has a channel in each of several groups or members (`Site.separate`): the
    gradient that each attains. The part of left in each of them, and of right, has norm 1, and values are those of
    whole vectors of norm 1.
    """

    incoming: Tensor | None = None
    parts: Tensor | None = None


def has_blocks(site: Site) -> bool:
    """Whether this site's units need more than one direction each, or gates."""
    return bool(site.gates) or site.separate


def gate_rows(tensors: Mapping[str, Tensor], sizes: Mapping[int, int], site: Site, units: int) -> Tensor:
    """(n, units): random incoming weights for the gates, each entry of the present weights' size; zero elsewhere."""
    one = {**sizes, site.axis: 1}
    pieces = []
    for name in site.producers:
        slot = site.weight(name, "producer")
        weight = slot.canonical(tensors[slot.tensor].detach())
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


class _Maps:
    """Maps (problems, m_c, n_c) of one site, known by their products.

    A problem is a unit, and block columns are its channels; or it is a channel that units have apart from each other,
    and block columns are units; or, where each unit has maps of its own there (single), a channel of a unit.
    """

    def __init__(
        self, maps: Sequence[ReplayMap], channels: Channels, site: Site, units: int, *, single: bool = False
    ) -> None:
        self.maps = maps
        self.by_channel, self.single = site.separate, single
        self.units = units
        self.m, self.n = maps[0].shape
        self.dtype, self.device = maps[0].dtype, maps[0].device
        self.into, self.out = channels.into.index.to(self.device), channels.out.index.to(self.device)
        count = self.into.shape[0]
        self.problems, self.block = (count, units) if self.by_channel else (units, count)
        if single:
            self.problems, self.block = units * count, 1

    def by_unit(self, blocks: Tensor) -> Tensor:
        """(problems, d, block) -> (units, channels, d)."""
        if self.single:
            return blocks.reshape(self.units, -1, blocks.shape[1])
        return blocks.permute(2, 0, 1) if self.by_channel else blocks.permute(0, 2, 1)

    def _scatter(self, blocks: Tensor, index: Tensor, length: int) -> Tensor:
        """(problems, d, block) -> unit vectors (length, units)."""
        vectors = blocks.new_zeros(self.units, length)
        vectors[:, index.reshape(-1)] = self.by_unit(blocks).reshape(self.units, -1)
        return vectors.T

    def _gather(self, vectors: Tensor, index: Tensor) -> Tensor:
        per_unit = vectors.T[:, index.reshape(-1)].reshape(self.units, *index.shape)
        if self.single:
            return per_unit.reshape(self.problems, -1, 1)
        return per_unit.permute(1, 2, 0) if self.by_channel else per_unit.permute(0, 2, 1)

    def matmat(self, blocks: Tensor) -> Tensor:
        X = self._scatter(blocks, self.into, self.n)
        return self._gather(sum(m.matmat(X) for m in self.maps), self.out)  # type: ignore[arg-type]

    def rmatmat(self, blocks: Tensor) -> Tensor:
        Y = self._scatter(blocks, self.out, self.m)
        return self._gather(sum(m.rmatmat(Y) for m in self.maps), self.into)  # type: ignore[arg-type]

    def leading(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """Left (problems, m_c, b), values (problems, b), right (problems, n_c, b), the captured norm as estimated."""
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
        left, right = basis @ best, images @ best
        sign = fixed_signs(left)
        right = right / torch.linalg.vector_norm(right, dim=1, keepdim=True).clamp(min=torch.finfo(self.dtype).tiny)
        return left * sign, attained.to(self.device, self.dtype), right * sign, captured

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
        """The least captured norm of all problems, as it is foreseen; 0 before there is enough to foresee it from."""
        if room == 0:
            return 1.0
        if ritz.shape[-1] < FORESEEN_FROM * self.block:
            return 0.0
        total = values.clamp(min=0).sum(-1)
        reach = torch.maximum(foreseen(ritz, self.block, values.shape[-1], room), total)
        return math.sqrt(float(torch.where(reach > 0, total / reach, 1.0).min()))


def block_directions(data: SiteData, units: int, *, signed: Tensor | None = None) -> UnitDirections:
    """GradMax's directions for so many units, whole units at a time.

    The producers' biases count as columns of M where units are alone in each channel: not beside gates, and not in
    signed pairs. signed: the units come as such, with incoming weights of this size (n, 1) at each entry; this is the
    outgoing direction of each under its own mask.
    """
    model, sites, site = data.model, data.sites, data.site
    if site.separate and not site.gates:
        weights_alone = data.bias and signed is not None
        return _separate_directions(replace(data, bias=False) if weights_alone else data, units, signed)
    channels = Channels.of(tensors_of(model), sites.sizes(model), sites, site)
    gates = gate_rows(tensors_of(model), sites.sizes(model), site, units)
    maps = []
    for capture, weight in data.batches():
        replay = data.replay(capture)
        maps.append(ReplayMap(replay, weight, base=gates.to(replay.device, replay.dtype)))
    problem = _Maps(maps, channels, site, units, single=site.separate)
    left, values, _, captured = problem.leading()
    vectors = problem.by_unit(left)  # (units, channels, m_c)
    found = values.reshape(units, -1)
    used = vectors.shape[1]
    outgoing = vectors.new_zeros(vectors.shape[0], problem.m)
    outgoing[:, problem.out[:used].reshape(-1)] = vectors.reshape(vectors.shape[0], -1)
    return UnitDirections(
        outgoing.T if site.separate else outgoing.T / used**0.5,
        found.square().sum(-1).sqrt() / used**0.5,
        vectors.new_zeros(problem.n, units),
        captured,
        gates.to(problem.device, problem.dtype),
        found.T if site.separate else None,
    )


def _separate_directions(data: SiteData, units: int, signed: Tensor | None) -> UnitDirections:
    """Unit j takes the j-th direction of every channel."""
    model, sites, site = data.model, data.sites, data.site
    pairs = stacked_pairs(data)
    if pairs:
        rows, columns = (Side(pairs[0].members, length) for length in pairs[0].shape)
        channels = Channels(columns, rows)
        left, values, right, captured = _of_members(pairs, units, site.name)
    else:
        channels = Channels.of(tensors_of(model), sites.sizes(model), sites, site, bias=data.bias)
        count = units + _SPARE
        left, values, right, captured = _Maps(data.maps(), channels, site, count).leading()
        left, values, right = left[..., :units], values[..., :units], right[..., :units]
    if signed is not None:
        vectors = channels.into.whole(right) * signed
        masked = data.maps(torch.cat([vectors, -vectors], 1), live=True)
        problem = _Maps(masked, channels, site, 2 * vectors.shape[1], single=True)
        both, attained, _, captured = problem.leading()
        options = problem.by_unit(both).unflatten(0, (2, -1))  # (2, units, channels, m_c)
        reached = attained.reshape(2, -1, options.shape[2])
        chosen = reached.argmax(0)  # (units, channels)
        values = reached.amax(0).T
        left = options.gather(0, chosen[None, :, :, None].expand(1, *options.shape[1:]))[0].permute(1, 2, 0)
        right = right * (1 - 2 * chosen.T)[:, None]
    return UnitDirections(
        channels.out.whole(left),
        torch.linalg.vector_norm(values, dim=0) / len(values) ** 0.5,
        channels.into.whole(right),
        captured,
        parts=values,
    )


def _of_members(pairs: Sequence[StackedPair], units: int, name: str) -> tuple[Tensor, Tensor, Tensor, float]:
    """Left (members, O, k), values (members, k), right (members, I, k) of all members' matrices, in one SVD."""
    first = pairs[0]
    exponent, blocks = first.exponent, first.blocks
    if len(pairs) > 1:
        exponent = torch.stack([pair.exponent for pair in pairs]).amax()
        shares = [torch.exp2((pair.exponent - exponent).to(first.dtype)) for pair in pairs]
        blocks = torch.stack([pair.blocks * share for pair, share in zip(pairs, shares, strict=True)]).sum(0)
    power = float(exponent)
    if not math.isfinite(power):
        raise GrowthError(
            f"non-finite values (NaN or inf) in layer {name!r}; the loss has diverged or overflowed: skip this batch, "
            "lower the learning rate, or pass the GradScaler as loss_scale"
        )
    rank = min(units, *blocks.shape[1:])
    captured = 1.0
    if min(blocks.shape[1:]) <= SMALL_SIDE:
        wide = blocks.to("cpu", torch.float64)
        if blocks.dtype == torch.float32 and wide.shape[1] <= wide.shape[2]:
            # float64 holds the squares of what float32 tells apart
            left = torch.linalg.eigh(wide @ wide.mT).eigenvectors[..., -rank:].flip(-1)
        else:
            left = svd(wide)[0][..., :rank]
        left = left * fixed_signs(left)
        pulled = wide.mT @ left
        values = torch.linalg.vector_norm(pulled, dim=1)
        right = pulled / values.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        left, values, right = (each.to(first.device, first.dtype) for each in (left, values * 2.0**power, right))
    else:
        solved = solve(list(blocks), rank, names=[name] * len(blocks))
        left, values, right = (torch.stack(each) for each in zip(*solved, strict=True))
        captured, values = min(found.captured for found in solved), scale_by_power(values, exponent)
    return left, values, right, captured
