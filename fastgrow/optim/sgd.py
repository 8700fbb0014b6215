"""SGD that knows growth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from . import fused
from .base import Backend, GrowingOptimizer, State
from .blocks import Blocks
from .entry import BlockNumbers, Entry, Steps, unwrap

__all__ = ["SGD"]


class SGD(GrowingOptimizer, torch.optim.SGD):
    __doc__ = f"""torch.optim.SGD, with rates, weight decay and warm-up of their own for the units of a stage.

    All arguments of torch.optim.SGD, with its results bit for bit on parameters that never grew.
    reset_momentum: growth throws the momentum of every parameter away, as the paper does for SGD; otherwise
    old blocks keep theirs. A new block's first step has no dampening, as torch's first step has none.

    {(GrowingOptimizer.__doc__ or "").partition(chr(10))[2].strip()}
    """

    _moment_names = ("momentum_buffer",)
    _group_options = (*GrowingOptimizer._group_options, "reset_momentum")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        rate_adaptation: bool = False,
        output_scale: float = 1.0,
        reset_momentum: bool = False,
        stage_options: Mapping[int, Mapping[str, float]] | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._start(rate_adaptation, output_scale, stage_options, backend, reset_momentum=reset_momentum)

    def _reset(self) -> None:
        super()._reset()
        self._steps: dict[int, Steps] = {}

    def grown(self, parameter: Tensor, stages: Mapping[int, Tensor]) -> None:
        super().grown(parameter, stages)
        for group in self.param_groups:
            if group["reset_momentum"]:
                for one in group["params"]:
                    self.state.get(one, {}).pop("momentum_buffer", None)

    grown.__doc__ = GrowingOptimizer.grown.__doc__

    def _blocked_from(self, group: dict[str, Any]) -> tuple[float, float]:
        _, others = super()._blocked_from(group)
        if group["stage_options"] or (group["momentum"] != 0 and group["dampening"] != 0):
            return 0, others
        # otherwise all blocks of a vector take the same step, and torch's does for grown parameters too
        return 2 if group["rate_adaptation"] or group["output_scale"] != 1 else math.inf, others

    def _plain_update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        sparse = self._init_group({**group, "params": parameters}, params, grads, buffers)
        sgd(
            params,
            [self._gradient(parameter) for parameter in params],
            buffers,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            has_sparse_grad=sparse,
            foreach=group["foreach"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )
        if group["momentum"] != 0:
            for parameter, buffer in zip(params, buffers, strict=True):
                self.state[parameter]["momentum_buffer"] = buffer
        states = [state for state in map(self.state.get, params) if state and "stages" in state]
        if states:
            steps = self._steps.get(id(group))
            if steps is None or not steps.hold(states):
                steps = self._steps[id(group)] = Steps(states)
            steps.add()

    def _moments(self, group: dict[str, Any], parameter: Tensor, state: State) -> list[Tensor]:
        if group["momentum"] == 0:
            return []
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["momentum_birth"] = int(state["step"])
        return [state["momentum_buffer"]]

    def _numbers(self, group: dict[str, Any], parameter: Tensor, state: State, blocks: Blocks) -> list[BlockNumbers]:
        numbers = super()._numbers(group, parameter, state, blocks)
        begins = state.get("momentum_birth") == int(state["step"])
        for of in numbers:
            of.gain = 1.0 if begins or of.age == 1 else 1.0 - group["dampening"]
        return numbers

    def _coefficients(self, group: dict[str, Any], of: BlockNumbers) -> tuple[float, ...]:
        return of.rate, of.decay, of.gain

    def _step_list(self, group: dict[str, Any], of: BlockNumbers, tensors: Sequence[list[Tensor]]) -> None:
        params, grads, *moments = tensors
        buffers = moments[0] if moments else []
        options: dict[str, Any] = dict(
            weight_decay=of.decay,
            momentum=unwrap(group["momentum"]),
            lr=of.rate,
            dampening=1.0 - of.gain,
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        if params[0].device.type == "cpu" and params[0].dtype in (torch.float16, torch.bfloat16):
            # torch's fused SGD is wrong for these on the CPU, by tenths of the step (seen in 2.13)
            sgd(params, grads, list(buffers) or [None] * len(params), has_sparse_grad=False, foreach=True, **options)
        else:
            torch._fused_sgd_(params, grads, buffers, is_first_step=False, **options)

    def _slab_step(
        self,
        group: dict[str, Any],
        entry: Entry,
        at: int,
        numbers: Sequence[BlockNumbers],
        pieces: Sequence[Tensor],
        names: Sequence[str | None],
    ) -> None:
        slab = entry.blocks.slabs[at]
        buffered = len(slab.parts) > 1 and len(pieces) == 3 and not group["nesterov"]
        if not buffered or len({(numbers[part.block].decay, numbers[part.block].gain) for part in slab.parts}) > 1:
            super()._slab_step(group, entry, at, numbers, pieces, names)
            return
        # the buffers of all blocks at once; the step along them is one pass, so nothing needs a copy
        self._step_list(group, replace(numbers[slab.main], rate=0.0), [[piece] for piece in pieces])
        for number, part in enumerate(slab.parts):
            value = entry.part(names[0], at, number, pieces[0])
            value.add_(entry.part(names[2], at, number, pieces[2]), alpha=-numbers[part.block].rate)
            if isinstance(part.columns, Tensor):
                part.put(pieces[0], value)

    def _fused_step(self, group: dict[str, Any], batch: fused.Batch, rows: Sequence[float], norms: bool) -> None:
        momentum = float(unwrap(group["momentum"]))
        batch.sgd(
            batch.scalars(rows, (momentum, 0.0, 0.0, 0.0)),
            momentum=momentum != 0,
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            norms=norms,
        )
