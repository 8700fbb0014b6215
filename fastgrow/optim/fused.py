"""The grown parameters of one dtype and device, updated by one call: of Triton's kernels or a CPU's compiled loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels import block_update_cpu
from .blocks import Blocks

__all__ = ["Batch", "EtaSums", "Route", "refusal"]

Route = Literal["triton", "cpu"]


@cache
def _triton_kernels() -> tuple[ModuleType, ModuleType] | None:
    try:
        from ..kernels import block_norms, block_update
    except ImportError:
        return None
    return block_norms, block_update


def refusal(parameter: Tensor, blocks: Blocks, route: Route) -> str | None:
    """Why the kernels of a route do not take a parameter; None where they do."""
    if route == "cpu":
        if parameter.device.type != "cpu":
            return f"a grown parameter lies on {parameter.device}"
        reason = block_update_cpu.missing()
        if reason is not None:
            return reason
        supported = block_update_cpu.is_supported(parameter)
    else:
        kernels = _triton_kernels()
        if kernels is None:
            return "Triton is not installed"
        if not kernels[0].runs_on(parameter.device):
            return f"a grown parameter lies on {parameter.device}, where Triton does not run"
        supported = kernels[0].is_supported(parameter)
    what = f"a grown {parameter.dtype} parameter of shape {tuple(parameter.shape)}"
    if not supported:
        return f"{what} is empty or of a dtype that its kernels do not take"
    if parameter.stride() != blocks.strides:
        return f"{what} is not dense in memory"
    return None


class Batch:
    """Tables on the device for a fixed list of parameters, and what one step leaves for the next."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        blocks: Sequence[Blocks],
        adapt: Sequence[bool],
        states: Sequence[dict[str, Any]],
        rate_adaptation: bool,
        route: Route,
    ) -> None:
        kernels = (block_update_cpu, block_update_cpu) if route == "cpu" else _triton_kernels()
        assert kernels is not None
        self._norms_kernel: Any
        self._update_kernel: Any
        self._norms_kernel, self._update_kernel = kernels
        self._route = route
        self.parameters, self.blocks = list(parameters), list(blocks)
        self.table = self._norms_kernel.BlockTable(
            [p.detach() for p in parameters],
            [(b.rows, b.columns) for b in blocks],
            [b.counts for b in blocks],
        )
        device, acc = self.table.device, self.table.acc
        self.ratio = torch.ones(self.table.total, dtype=acc, device=device)
        self.sums = torch.zeros_like(self.ratio)
        self.adapt = torch.tensor([int(flag) for flag in adapt], dtype=torch.int32).to(device)
        self.adapts = any(adapt)
        self._rate_adaptation = rate_adaptation
        self._tensors: list[Tensor] = []
        self._stamps: list[tuple[int, int]] = []
        self._flags: list[list[float]] = [
            state.get("waiting") or [0.0] * len(b.counts) for state, b in zip(states, blocks, strict=True)
        ]
        flat = [flag for flags in self._flags for flag in flags]
        self.waiting = torch.tensor(flat, dtype=acc).to(device)
        self._unsettled = any(flat)

    def holds(self, parameters: Sequence[Tensor], rate_adaptation: bool) -> bool:
        """Whether the batch was made for these very parameters, laid out as they are now."""
        return (
            rate_adaptation == self._rate_adaptation
            and len(parameters) == len(self.parameters)
            and all(a is b for a, b in zip(parameters, self.parameters, strict=True))
            and all(p.stride() == s for p, s in zip(parameters, self.table.strides, strict=True))
        )

    def settle(self) -> None:
        """Write the kernel's flags back to the optimizer's state; waits for a GPU if any is up."""
        if self._unsettled:
            now = self.waiting.tolist()
            for base, flags in zip(self.table.bases, self._flags, strict=False):
                flags[:] = now[base : base + len(flags)]
            self._unsettled = any(now)

    def bind(self, gradients: Sequence[Tensor], moments: Sequence[Sequence[Tensor]]) -> None:
        """Take this step's gradients and state; one laid out otherwise than its parameter is copied."""
        dtype = self.table.dtype
        alike = [
            g.detach()
            if g.stride() == strides and g.dtype == dtype and not g.is_neg()
            else torch.empty_like(p).copy_(g)
            for p, g, strides in zip(self.parameters, gradients, self.table.strides, strict=True)
        ]
        for column in moments:
            for parameter, tensor, strides in zip(self.parameters, column, self.table.strides, strict=True):
                if tensor.stride() != strides or tensor.dtype != dtype:
                    tensor.set_(torch.empty_like(parameter).copy_(tensor))  # type: ignore[call-overload]
        self._columns = [self.parameters, alike, *moments]
        self._tensors = [*self.parameters, *(tensor for column in moments for tensor in column)]
        self.table.bind(self._columns)

    def measure_etas(self, scalars: Tensor, etas: Callable[[], Sequence[Tensor]], eta: EtaSums) -> None:
        """The sum of eta_t^2 over every block, of the second moments as they are; etas: these eta_t, if asked."""
        if self._route == "cpu":
            block_update_cpu.eta_norms(self.table, scalars, eta.partial, eta.sums)
            return
        tensors = etas()
        self.table.bind([tensors])
        self._norms_kernel.block_norms(self.table, eta.sums)
        self.table.bind(self._columns)

    def refresh(self) -> bool:
        """Make the ratios those of the parameters as they are; whether the step is to leave new ones."""
        if self.adapts and self._stamps != self._now():
            self._norms_kernel.block_norms(self.table, self.sums, self.ratio, self.waiting, self.adapt)
        return self.adapts

    def finish(self) -> None:
        """Behind the update kernel: turn its partial sums into the next step's ratios."""
        self.mark_written()
        if self.adapts:
            self._norms_kernel.launch_finish(
                self.table, self.table.partial, self.sums, self.ratio, self.waiting, self.adapt
            )
            self._stamps = self._now()
        self._columns = []

    def mark_written(self) -> None:
        """Raise the version counters of what the kernel wrote, as an in-place operation would."""
        torch.autograd.graph.increment_version(self._tensors)
        self._tensors = []

    def _now(self) -> list[tuple[int, int]]:
        return [(p._version, p.data_ptr()) for p in self.parameters]

    def scalars(self, rows: Sequence[Sequence[float]], common: Sequence[float]) -> Tensor:
        """The per-block numbers and those of all blocks, as the kernels read them."""
        width = self._update_kernel.SCALARS
        flat = [value for row in rows for value in (*row, *[0.0] * (width - len(row)))]
        return torch.tensor([*flat, *common], dtype=self.table.acc).to(self.table.device, non_blocking=True)

    def sgd(self, scalars: Tensor, **options: bool) -> None:
        self._update_kernel.sgd(self.table, scalars, self.ratio, **options)

    def adam(self, scalars: Tensor, **options: bool) -> None:
        self._update_kernel.adam(self.table, scalars, self.ratio, **options)

    def avagrad(self, scalars: Tensor, eta: EtaSums, **options: bool) -> None:
        self._update_kernel.avagrad(self.table, scalars, self.ratio * eta.normalisers(), eta.partial, **options)
        self._norms_kernel.launch_finish(self.table, eta.partial, eta.sums)


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
        self._members = torch.tensor(padded).to(table.device)
        self._slots = torch.tensor([distinct.index(stage) for stage in stages]).to(table.device)
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
