"""Adam and AdamW that know growth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT

from . import fused
from .base import Backend, GrowingOptimizer, State
from .entry import BlockNumbers, unwrap

__all__ = ["Adam", "AdamW", "moments_of"]


def moments_of(parameter: Tensor, state: State, names: Sequence[str]) -> list[Tensor]:
    """The named state tensors of the parameter's shape, zero where they are missing."""
    for name in names:
        if name not in state:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return [state[name] for name in names]


class _AdamSteps(GrowingOptimizer):
    """What Adam and AdamW share: torch's step for whole parameters, the block-wise step for grown ones."""

    _moment_names = ("exp_avg", "exp_avg_sq")

    def _plain_update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
        has_complex = self._init_group({**group, "params": parameters}, *lists)  # type: ignore[attr-defined]
        params, grads, firsts, seconds, maxima, steps = lists
        beta1, beta2 = group["betas"]
        adam(
            params,
            grads,
            firsts,
            seconds,
            maxima,
            steps,
            amsgrad=group["amsgrad"],
            has_complex=has_complex,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            foreach=group["foreach"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            decoupled_weight_decay=group["decoupled_weight_decay"],
        )

    def _moments(self, group: dict[str, Any], parameter: Tensor, state: State) -> list[Tensor]:
        maximum = ("max_exp_avg_sq",) if group["amsgrad"] else ()
        return moments_of(parameter, state, (*self._moment_names, *maximum))

    def _coefficients(self, group: dict[str, Any], of: BlockNumbers) -> tuple[float, ...]:
        beta1, beta2 = (unwrap(beta) for beta in group["betas"])
        return of.rate, of.decay, 1 - beta1**of.age, (1 - beta2**of.age) ** 0.5

    def _step_list(self, group: dict[str, Any], of: BlockNumbers, tensors: Sequence[list[Tensor]]) -> None:
        params, grads, firsts, seconds, *maxima = tensors
        beta1, beta2 = (unwrap(beta) for beta in group["betas"])
        age = torch.full((), of.age, dtype=torch.float32, device=params[0].device)
        step = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        step(
            params,
            grads,
            firsts,
            seconds,
            maxima[0] if maxima else [],
            [age] * len(params),
            lr=of.rate,
            beta1=beta1,
            beta2=beta2,
            weight_decay=of.decay,
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
        )

    def _fused_step(self, group: dict[str, Any], batch: fused.Batch, rows: Sequence[float], norms: bool) -> None:
        beta1, beta2 = (unwrap(beta) for beta in group["betas"])
        batch.adam(
            batch.scalars(rows, (1 - beta1, beta2, 1 - beta2, group["eps"])),
            amsgrad=group["amsgrad"],
            decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
            norms=norms,
        )


_NOTES = f"""The bias correction of each block counts that block's own steps, from 0 at its birth (Table 9
    of the paper, a likely reading): as eps -> 0 a new block's first step is lr * sign(g), while old blocks
    move as if nothing had grown. That is all the paper does for Adam; rate_adaptation=True multiplies the
    norm ratio of SGD's rule on top (ours; open).

    {(GrowingOptimizer.__doc__ or "").partition(chr(10))[2].strip()}
    """


class Adam(_AdamSteps, torch.optim.Adam):
    __doc__ = f"""torch.optim.Adam, with an age, a rate, weight decay and warm-up of its own for each stage.

    All arguments of torch.optim.Adam, with its results bit for bit on parameters that never grew.
    {_NOTES}"""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        rate_adaptation: bool = False,
        output_scale: float = 1.0,
        stage_options: Mapping[int, Mapping[str, float]] | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._start(rate_adaptation, output_scale, stage_options, backend)


class AdamW(_AdamSteps, torch.optim.AdamW):
    __doc__ = f"""torch.optim.AdamW, with an age, a rate, weight decay and warm-up of its own for each stage.

    All arguments of torch.optim.AdamW, with its results bit for bit on parameters that never grew. A block's
    decay is W -= eta_k * weight_decay * W: its own rate, as for its gradient.
    {_NOTES}"""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        rate_adaptation: bool = False,
        output_scale: float = 1.0,
        stage_options: Mapping[int, Mapping[str, float]] | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._start(rate_adaptation, output_scale, stage_options, backend)
