"""One parameter on the ATen path: its slabs, the numbers of its blocks, the norms left by the last step."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .blocks import Blocks, blocks_of

__all__ = ["BlockNumbers", "Entry", "Steps", "unwrap"]

_CPU_SLAB = 1 << 18  # elements: parameter, gradient and moments of a slab stay in the cache together


def unwrap(value: Any) -> float:
    """A learning rate, beta or weight decay as a number, whether a float or a one-element tensor."""
    return value.item() if isinstance(value, Tensor) else value


@dataclass(slots=True)
class BlockNumbers:
    """What one block is updated with; age counts its steps, the present one included."""

    rate: float
    decay: float
    age: int
    gain: float = 1.0  # SGD: 1 - dampening, but 1 at a block's first step; AvaGrad: sqrt(d) / ||eta||


class Steps:
    """The "step" of many parameters' states, from now on views of one memory that Python reads and raises.

    A tensor operation on one number that has left the caches takes longer than all of these together.
    """

    def __init__(self, states: Sequence[dict[str, Any]]) -> None:
        steps = torch.stack([state["step"] for state in states])
        wide = steps.dtype == torch.float64
        self._memory = array("d" if wide else "f", steps.tolist())
        views = torch.frombuffer(self._memory, dtype=torch.float64 if wide else torch.float32)
        self._views = [views[at] for at in range(len(states))]
        for state, view in zip(states, self._views, strict=True):
            state["step"] = view

    def hold(self, states: Sequence[dict[str, Any]]) -> bool:
        """Whether these are the states, in this order, and their steps still the views."""
        return len(states) == len(self._views) and all(
            state["step"] is view for state, view in zip(states, self._views, strict=True)
        )

    def values(self) -> Sequence[float]:
        return self._memory

    def add(self) -> None:
        """One more step of each."""
        for at, count in enumerate(self._memory):
            self._memory[at] = count + 1


class _Norms:
    """The norm of every row of every part of a parameter, those of one block side by side."""

    def __init__(self, blocks: Blocks, like: Tensor) -> None:
        rows = [1 if blocks.along else slab.size for slab in blocks.slabs]
        order = sorted(
            (part.block, at, number) for at, slab in enumerate(blocks.slabs) for number, part in enumerate(slab.parts)
        )
        wide = torch.promote_types(like.dtype, torch.float32)
        room = torch.empty(sum(rows[at] for _, at, _ in order), dtype=wide, device=like.device)
        pieces = room.split([rows[at] for _, at, _ in order])
        self.of = {(at, number): piece for (_, at, number), piece in zip(order, pieces, strict=True)}
        self.cast = wide if wide != like.dtype else None
        sizes = [sum(rows[at] for block, at, _ in order if block == one) for one in range(len(blocks.stages))]
        self._blocks = room.split(sizes)
        self.stamp: object = None
        self._squares: list[float] | None = None

    def renew(self, stamp: object) -> None:
        """Say what the norms now belong to."""
        self.stamp, self._squares = stamp, None

    def squares(self) -> list[float]:
        """The sum of squares over each block; the first call after `renew` waits for the device."""
        if self._squares is None:
            norms = torch._foreach_norm(self._blocks) if self._blocks else ()
            self._squares = [norm**2 for norm in torch.stack(norms).tolist()] if norms else []
        return self._squares


class Entry:
    """What is remembered of one parameter between steps; everything here can be recomputed."""

    def __init__(self, parameter: Tensor, stages: Mapping[int, Any] | None) -> None:
        self.stages = stages
        self.given_strides = parameter.stride()
        size = _CPU_SLAB if parameter.device.type == "cpu" else max(1, parameter.numel())
        self.blocks: Blocks = blocks_of(parameter, stages or {}, size)
        self.asked: object = None  # the kernels that were asked about, and why they refuse
        self.refusal: str | None = None
        self._norms: dict[str, _Norms] = {}
        self._views: dict[str, tuple[Tensor, tuple[object, ...], Sequence[Tensor]]] = {}
        self._parts: dict[tuple[str, int, int], Tensor] = {}
        self._rooms: dict[tuple[torch.Size, ...], list[list[Tensor]]] = {}

    def views(self, name: str, tensor: Tensor) -> Sequence[Tensor]:
        """The slabs of a tensor that stays the same from step to step."""
        key = (tensor.data_ptr(), tensor.stride())
        held = self._views.get(name)
        if held is None or held[0] is not tensor or held[1] != key:
            held = self._views[name] = (tensor, key, self.blocks.cut(tensor))
            self._parts = {key: view for key, view in self._parts.items() if key[0] != name}
        return held[2]

    def part(self, name: str | None, at: int, number: int, slab: Tensor) -> Tensor:
        """Part `number` of slab `at`; the same view as last time where `slab` is one of `views(name, ..)`."""
        view = self._parts.get((name, at, number)) if name is not None else None
        if view is None:
            part = self.blocks.slabs[at].parts[number]
            view = part.of(slab)
            if name is not None and not isinstance(part.columns, Tensor):
                self._parts[name, at, number] = view
        return view

    def rooms(self, buffer: Callable[[int], Tensor], views: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Contiguous tensors of the shapes of `views`, in the shared buffer."""
        key = tuple(view.shape for row in views for view in row[:1])
        if key not in self._rooms:
            sizes = [view.numel() for row in views for view in row]
            room = iter(buffer(sum(sizes))[: sum(sizes)].split(sizes))
            self._rooms[key] = [[next(room).view(view.shape) for view in row] for row in views]
        return self._rooms[key]

    def measure(self, name: str, at: int, number: int, values: Tensor) -> None:
        """Keep the row norms of `values`, (rows, n): part `number` of slab `at`, in float32 at least."""
        norms = self._norms.get(name)
        if norms is None:
            norms = self._norms[name] = _Norms(self.blocks, values)
        torch.linalg.vector_norm(values, 2, 1, dtype=norms.cast, out=norms.of[at, number])

    def remember(self, name: str, stamp: object) -> None:
        """Put a stamp on what was measured last."""
        if name in self._norms:
            self._norms[name].renew(stamp)

    def sums_of(self, name: str, stamp: object) -> list[float] | None:
        """The sum of squares of each block, if what was measured last carries this stamp."""
        held = self._norms.get(name)
        return held.squares() if held is not None and held.stamp == stamp else None
