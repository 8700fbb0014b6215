"""The grown parameters of one dtype and device, updated by one call: of Triton's kernels or a CPU's compiled loop."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels import block_update_cpu
from ..kernels.block_table import SCALARS, BlockTable
from .blocks import UNDECIDED, Blocks, born_small
from .entry import Steps

__all__ = ["SCALARS", "Batch", "EtaSums", "Route", "refusal"]

Route = Literal["triton", "cpu"]


@cache
def _triton_kernels() -> ModuleType | None:
    try:
        from ..kernels import block_update
    except ImportError:
        return None
    return block_update


def refusal(parameter: Tensor, blocks: Blocks, route: Route) -> str | None:
    """Why the kernels of a route do not take a parameter; None where they do."""
    if route == "cpu":
        if parameter.device.type != "cpu":
            return f"a grown parameter lies on {parameter.device}"
        reason = block_update_cpu.missing()
        if reason is not None:
            return reason
        kernels: ModuleType = block_update_cpu
    else:
        found = _triton_kernels()
        if found is None:
            return "Triton is not installed"
        if not found.runs_on(parameter.device):
            return f"a grown parameter lies on {parameter.device}, where Triton does not run"
        kernels = found
    what = f"a grown {parameter.dtype} parameter of shape {tuple(parameter.shape)}"
    if not kernels.BlockTable.is_supported(parameter):
        return f"{what} is empty or of a dtype that its kernels do not take"
    if parameter.stride() != blocks.strides:
        return f"{what} is not dense in memory"
    return None


def _layout(parameter: Tensor) -> tuple[object, ...]:
    return parameter.shape, parameter.stride(), parameter.dtype, parameter.device


class Batch:
    """Tables on the device for a fixed list of parameters, and what one step leaves for the next.

    states: the optimizer's for each parameter; made_for: whatever else the choice of the parameters and of
    the route went by.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        blocks: Sequence[Blocks],
        adapt: Sequence[bool],
        states: Sequence[dict[str, Any]],
        made_for: object,
        route: Route,
    ) -> None:
        kernels = block_update_cpu if route == "cpu" else _triton_kernels()
        assert kernels is not None
        self.parameters, self.blocks = list(parameters), list(blocks)
        self.table: BlockTable = kernels.BlockTable(
            [p.detach() for p in parameters],
            [(b.rows, b.columns) for b in blocks],
            [b.counts for b in blocks],
        )
        device, acc = self.table.device, self.table.acc
        self.ratio = torch.ones(self.table.total, dtype=acc, device=device)
        self.sums = torch.zeros_like(self.ratio)
        self.adapt = torch.tensor([int(flag) for flag in adapt], dtype=torch.int32, device=device)
        self.adapts = any(adapt)
        self._made_for = made_for
        self._made_of = [(p, state.get("stages"), _layout(p)) for p, state in zip(parameters, states, strict=True)]
        self.steps = Steps(states)
        # parameters of one kind take the same numbers at the same step
        kinds: dict[object, int] = {}
        self.kinds = [
            kinds.setdefault((b.stages, *state.get("births", {}).values(), p.dim() > 1), len(kinds))
            for p, b, state in zip(parameters, blocks, states, strict=True)
        ]
        self._held: list[Tensor] = []  # alive until the kernel has been launched
        self._written: list[Tensor] = []
        self._stamp: object = None
        self._flags: list[list[float]] = [
            state.get("waiting") or [0.0] * len(b.counts) for state, b in zip(states, blocks, strict=True)
        ]
        flat = [flag for flags in self._flags for flag in flags]
        self.waiting = torch.tensor(flat, dtype=acc, device=device)
        self._unsettled = any(flat)
        self._undecided = UNDECIDED in flat

    def holds(self, parameters: Sequence[Tensor], states: Sequence[dict[str, Any]], made_for: object) -> bool:
        """Whether the batch was made for these very parameters, of the stages and laid out as they are now."""
        if len(parameters) != len(self.parameters) or made_for != self._made_for:
            return False
        for parameter, state, (own, stages, layout) in zip(parameters, states, self._made_of, strict=True):
            if parameter is not own or state.get("stages") is not stages or _layout(parameter) != layout:
                return False
        return self.steps.hold(states)

    def settle(self) -> None:
        """Write the kernel's flags back to the optimizer's state; waits for a GPU if any is up."""
        if self._unsettled:
            now = self.waiting.tolist()
            for base, flags in zip(self.table.bases, self._flags, strict=False):
                flags[:] = now[base : base + len(flags)]
            self._unsettled = any(now)

    def bind(self, gradients: Sequence[Tensor], moments: Sequence[Sequence[Tensor]]) -> None:
        """Take this step's gradients and state; one laid out otherwise than its parameter is copied."""
        dtype, strides = self.table.dtype, self.table.strides
        alike = [
            g if g.stride() == own and g.dtype == dtype and not g.is_neg() else torch.empty_like(p).copy_(g)
            for p, g, own in zip(self.parameters, gradients, strides, strict=True)
        ]
        self._written = [*self.parameters]
        for column in moments:
            for parameter, tensor, own in zip(self.parameters, column, strides, strict=True):
                if tensor.stride() != own or tensor.dtype != dtype:
                    tensor.set_(torch.empty_like(parameter).copy_(tensor))  # type: ignore[call-overload]
            self._written += column
        self._held = alike
        self.table.bind([self.parameters, alike, *moments])

    def measure_etas(self, scalars: Tensor, etas: Callable[[], Sequence[Tensor]], eta: EtaSums) -> None:
        """The sum of eta_t^2 over every block, of the second moments as they are; etas: these eta_t, if asked."""
        self.table.eta_norms(scalars, eta.partial, eta.sums, etas)

    def refresh(self) -> bool:
        """Make the ratios those of the parameters as they are; whether the step is to leave new ones."""
        if self.adapts and self._stamp != self._now():
            if self._undecided:
                self._decide()
            else:
                self.table.norms(self.sums, self.ratio, self.waiting, self.adapt)
        return self.adapts

    def _decide(self) -> None:
        """The first norms of blocks that were just born: which of them wait, told without waiting for a GPU."""
        self.table.norms(self.sums)
        bases = torch.tensor(self.table.bases, device="cpu")
        seeds = bases[:-1].repeat_interleave(bases.diff()).to(self.table.device, non_blocking=True)
        counts = self.table.counts
        small = born_small(self.sums, counts, self.sums[seeds], counts[seeds]).to(self.waiting.dtype)
        self.waiting.copy_(torch.where(self.waiting == UNDECIDED, small, self.waiting))
        self.table.finish(self.table.partial, self.sums, self.ratio, self.waiting, self.adapt)
        self._undecided = False

    def finish(self) -> None:
        """Behind the update kernel: turn its partial sums into the next step's ratios."""
        self.mark_written()
        if self.adapts:
            self.table.finish(self.table.partial, self.sums, self.ratio, self.waiting, self.adapt)
            self._stamp = self._now()
        self._held = []

    def mark_written(self) -> None:
        """Raise the version counters of what the kernel wrote, as an in-place operation would."""
        torch.autograd.graph.increment_version(self._written)
        self._written = []

    def _now(self) -> object:
        return [parameter._version for parameter in self.parameters], self.table.bound(0)

    def scalars(self, rows: Sequence[float], common: Sequence[float]) -> Tensor:
        """The per-block numbers, SCALARS of each, and those of all blocks, as the kernels read them."""
        numbers = torch.frombuffer(array("d", (*rows, *common)), dtype=torch.float64)
        return numbers.to(self.table.device, self.table.acc, non_blocking=True)

    def sgd(self, scalars: Tensor, **options: bool) -> None:
        self.table.sgd(scalars, self.ratio, **options)

    def adam(self, scalars: Tensor, **options: bool) -> None:
        self.table.adam(scalars, self.ratio, **options)

    def avagrad(self, scalars: Tensor, eta: EtaSums, **options: bool) -> None:
        self.table.avagrad(scalars, self.ratio * eta.normalisers(), eta.partial, **options)
        self.table.finish(eta.partial, eta.sums)


class EtaSums:
    """AvaGrad's ||eta||^2 of every block of a batch, kept on the device from step to step."""

    def __init__(self, batch: Batch) -> None:
        self._batch = weakref.proxy(batch)
        table = batch.table
        self.partial = torch.zeros_like(table.partial)
        self.sums = torch.zeros_like(batch.sums)
        stages = [stage for blocks in batch.blocks for stage in blocks.stages]
        distinct = sorted(set(stages))
        members = [[at for at, stage in enumerate(stages) if stage == one] for one in distinct]
        width = max(map(len, members))
        # padded with a block past the end, whose sum is zero: adding up needs no atomics
        padded = [row + [len(stages)] * (width - len(row)) for row in members]
        self._members = torch.tensor(padded, device=table.device)
        self._slots = torch.tensor([distinct.index(stage) for stage in stages], device=table.device)
        self._elements = self._pooled(table.counts)
        self._stamp: object = None

    def _pooled(self, of_blocks: Tensor) -> Tensor:
        return torch.cat([of_blocks, of_blocks.new_zeros(1)])[self._members].sum(1)

    def normalisers(self) -> Tensor:
        """sqrt(d) / ||eta||, d and the norm over all blocks of one stage, for each block: (total,)."""
        return (self._elements / self._pooled(self.sums)).sqrt()[self._slots]

    def renew(self, stamp: object, scalars: Tensor, etas: Callable[[], Sequence[Tensor]]) -> None:
        """Take the sums for the step that has these scalars, unless those held were left under this stamp."""
        if stamp != self._stamp:
            self._batch.measure_etas(scalars, etas, self)

    def left(self, stamp: object) -> None:
        """Note what the sums now belong to."""
        self._stamp = stamp
