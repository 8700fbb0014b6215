"""AvaGrad, stage by stage."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..arguments import number
from ..errors import GrowthError
from . import fused
from .adam import moments_of
from .base import Backend, GrowingOptimizer, State
from .blocks import Blocks
from .entry import BlockNumbers, Entry, unwrap

__all__ = ["AvaGrad"]

_ETA = "eta"


class AvaGrad(GrowingOptimizer):
    __doc__ = f"""AvaGrad (Savarese et al., "Domain-independent Dominance of Adaptive Methods", CVPR 2021).

    m_t = beta1 m_(t-1) + (1 - beta1) g_t;  eta_t = 1 / (sqrt(v_(t-1)) + eps)
    W_(t+1) = W_t - lr * eta_t / ||eta_t / sqrt(d)||_2 * m_t;  v_t = beta2 v_(t-1) + (1 - beta2) g_t^2
    with m and v corrected for their start at zero, as in the authors' code, whose norm is over a param group
    and so is ours. At the first step all eta are equal, so it is an SGD step (the authors' code makes none).

    After growth each stage of the group has its own ||eta / sqrt(d)|| and each block its own age (Table 9 of
    the growing paper; a likely reading): blocks of old stages move as if nothing had grown.

    {(GrowingOptimizer.__doc__ or "").partition(chr(10))[2].strip()}
    """

    _moment_names = ("exp_avg", "exp_avg_sq")
    _normalisers: Mapping[int, float] = {}  # of the group and step at hand
    _by_kernel = True
    _measures_moments = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 0.1,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        rate_adaptation: bool = False,
        output_scale: float = 1.0,
        stage_options: Mapping[int, Mapping[str, float]] | None = None,
        backend: Backend = "auto",
    ) -> None:
        for name, value in (("lr", unwrap(lr)), ("weight_decay", weight_decay)):
            number("optim.AvaGrad", name, value, least=0)
        number("optim.AvaGrad", "eps", eps, above=0)  # the first step divides by it
        for beta in betas:
            if number("optim.AvaGrad", "betas", beta, least=0) >= 1:
                raise GrowthError(f"optim.AvaGrad: betas={betas!r} was given; wanted numbers of at least 0 and below 1")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "maximize": maximize, "foreach": foreach})
        self._start(rate_adaptation, output_scale, stage_options, backend)

    def _reset(self) -> None:
        super()._reset()
        self._eta_sums: weakref.WeakKeyDictionary[fused.Batch, fused.EtaSums] = weakref.WeakKeyDictionary()

    def _blocked_from(self, group: dict[str, Any]) -> tuple[float, float]:
        return 0, 0

    def _moments(self, group: dict[str, Any], parameter: Tensor, state: State) -> list[Tensor]:
        return moments_of(parameter, state, self._moment_names)

    def _block_update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            self.check_growth(parameter)
            self._moments(group, parameter, self._counted(parameter))
        self._by_kernel, self._normalisers = True, {}
        kinds = {(p.device, p.dtype) for p in parameters if self._takes_kernel(group, p)}
        # one normaliser spans the group: the kernel takes all of it or nothing
        self._by_kernel = len(kinds) == 1 and all(
            (p.device, p.dtype) in kinds and self._takes_kernel(group, p) for p in parameters
        )
        if not self._by_kernel:
            if self.backend in ("triton", "cpu"):
                raise GrowthError(
                    f"backend={self.backend!r} needs all parameters of a group on one device, of one dtype"
                )
            self._normalisers = self._stage_normalisers(group, parameters)
        super()._block_update(group, parameters)

    def _takes_kernel(self, group: dict[str, Any], parameter: Tensor) -> bool:
        return self._by_kernel and super()._takes_kernel(group, parameter)

    def _stage_normalisers(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> dict[int, float]:
        """{stage: sqrt(d) / ||eta_t||} over the group's blocks of each stage."""
        squares: dict[int, float] = {}
        elements: dict[int, int] = {}
        for parameter in parameters:
            blocks = self._entry(parameter).blocks
            sums = self._eta_squares(group, parameter)
            for stage, square, count in zip(blocks.stages, sums, blocks.counts, strict=True):
                squares[stage] = squares.get(stage, 0.0) + square
                elements[stage] = elements.get(stage, 0) + count
        return {stage: (elements[stage] / square) ** 0.5 for stage, square in squares.items()}

    def _eta_stamp(self, group: dict[str, Any], parameter: Tensor) -> object:
        second = self.state[parameter]["exp_avg_sq"]
        return second._version, second.data_ptr(), group["eps"], group["betas"][1]

    def _eta_squares(self, group: dict[str, Any], parameter: Tensor) -> list[float]:
        """The sum of eta_t^2 over each block of a parameter, for the step to come."""
        entry = self._entry(parameter)
        stamp = self._eta_stamp(group, parameter)
        squares = entry.sums_of(_ETA, stamp)
        if squares is None:
            self._measure(entry, _ETA, stamp, self._etas(group, parameter))
            squares = entry.sums_of(_ETA, stamp)
            assert squares is not None
        return squares

    def _etas(self, group: dict[str, Any], parameter: Tensor) -> Tensor:
        """eta_t of every element, for the step to come; with the strides that the parameter's blocks have."""
        entry, state = self._entry(parameter), self.state[parameter]
        blocks = entry.blocks
        numbers = super()._numbers(group, parameter, state, blocks)
        etas = blocks.laid_out(state["exp_avg_sq"]).clone()
        for slab, values in zip(blocks.slabs, blocks.cut(etas), strict=True):
            for part in slab.parts:
                eta = _denominator(group, part.of(values), _correction(group, numbers[part.block].age - 1))
                part.put(values, eta.reciprocal_())
        return etas

    def _numbers(self, group: dict[str, Any], parameter: Tensor, state: State, blocks: Blocks) -> list[BlockNumbers]:
        numbers = super()._numbers(group, parameter, state, blocks)
        for of, stage in zip(numbers, blocks.stages, strict=True):
            of.gain = self._normalisers.get(stage, 1.0)
        return numbers

    def _aten_update(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        super()._aten_update(group, parameters)
        for parameter in parameters:
            self._entry(parameter).remember(_ETA, self._eta_stamp(group, parameter))

    def _coefficients(self, group: dict[str, Any], of: BlockNumbers) -> tuple[float, ...]:
        before, after = _correction(group, of.age - 1), _correction(group, of.age)
        return of.rate * of.gain, of.decay, 1 - group["betas"][0] ** of.age, before, after

    def _step_list(self, group: dict[str, Any], of: BlockNumbers, tensors: Sequence[list[Tensor]]) -> None:
        rate, decay, correction, before, _ = self._coefficients(group, of)
        beta1, beta2 = group["betas"]
        for parameter, gradient, first, second in zip(*tensors, strict=True):
            if group["maximize"]:
                gradient = -gradient
            if decay != 0:
                gradient = gradient.add(parameter, alpha=decay)
            denominator = _denominator(group, second, before)  # of v_(t-1)
            first.lerp_(gradient, 1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            parameter.addcdiv_(first, denominator, value=-rate / correction)

    def _measure_moments(
        self, group: dict[str, Any], entry: Entry, at: tuple[int, int], of: BlockNumbers, moment: Tensor
    ) -> None:
        eta = _denominator(group, moment, _correction(group, of.age)).reciprocal_()
        entry.measure(_ETA, *at, eta)

    def _fused_step(self, group: dict[str, Any], batch: fused.Batch, rows: Sequence[float], norms: bool) -> None:
        beta1, beta2 = group["betas"]
        eta = self._eta_sums.get(batch)
        if eta is None:
            eta = self._eta_sums[batch] = fused.EtaSums(batch)

        def stamp() -> object:
            return [self._eta_stamp(group, parameter) for parameter in batch.parameters]

        scalars = batch.scalars(rows, (1 - beta1, beta2, 1 - beta2, group["eps"]))
        eta.renew(stamp(), scalars, lambda: [self._etas(group, parameter) for parameter in batch.parameters])
        batch.avagrad(scalars, eta, maximize=group["maximize"], norms=norms)
        batch.mark_written()
        eta.left(stamp())


def _correction(group: dict[str, Any], age: int) -> float:
    """sqrt(1 - beta2^age); 1 at age 0, where the moment is zero and needs none."""
    return float((1 - group["betas"][1] ** age) ** 0.5 or 1.0)


def _denominator(group: dict[str, Any], second: Tensor, correction: float) -> Tensor:
    """1 / eta."""
    return second.sqrt().div_(correction).add_(group["eps"])
