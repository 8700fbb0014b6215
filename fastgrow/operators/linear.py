"""Maps without convolutions: a matrix, two linear layers, and what combines maps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import GrowthError
from .base import LARGEST_EXPONENT, LinearMap, checked_pair, exponent_of, power_of_two, split_scale, upcast

_SQUARES = 40  # |log2| of magnitudes whose squares add up safely in float32

__all__ = ["DenseMap", "LinearPair", "ScaledMap", "SumMap"]


class DenseMap(LinearMap):
    """A matrix that is there: (m, n)."""

    def __init__(self, matrix: Tensor) -> None:
        if matrix.dim() != 2:
            raise GrowthError(f"a matrix of shape (m, n) is wanted, got {tuple(matrix.shape)}")
        self.matrix = upcast(matrix, "the matrix")
        rows, cols = matrix.shape
        self.shape, self.dtype, self.device = (rows, cols), self.matrix.dtype, matrix.device
        self.exponent = exponent_of(self.matrix)
        self._shrink = power_of_two(-self.exponent, self.dtype)
        self.column_flops, self.dense_flops = 2.0 * rows * cols, 0.0

    def unit_matmat(self, columns: Tensor) -> Tensor:
        return self.matrix @ (columns * self._shrink)

    def unit_rmatmat(self, columns: Tensor) -> Tensor:
        return self.matrix.mT @ (columns * self._shrink)

    def unit_dense(self) -> Tensor:
        return self.matrix * self._shrink

    def unit_square(self) -> Tensor | None:
        # On a CPU the exponent is at hand, and the scaled copy is only made where squares need it.
        if self.device.type == "cpu" and abs(self.exponent.item()) < _SQUARES:
            return (torch.linalg.vector_norm(self.matrix) * self._shrink).square()
        return torch.linalg.vector_norm(self.unit_dense()).square()


class LinearPair(LinearMap):
    """``M = scale * sum_n dz_n h_n^T`` of a linear producer and consumer (GradMax, eqs. 9, 10).

    grad_output: dL/dz of the consumer, (..., O); input: h of the producer, (..., I), same leading
    dimensions; M is (O, I), with ``bias`` (O, I + 1): the constant 1 that the producer's bias reads is its
    last input. For a mean loss dL/dz already carries 1/N, and scale is 1; for a sum loss 1/N makes a mean.
    """

    def __init__(self, grad_output: Tensor, input: Tensor, scale: float = 1.0, bias: bool = False) -> None:
        if grad_output.dim() < 1 or input.dim() < 1 or grad_output.shape[:-1] != input.shape[:-1]:
            raise GrowthError(
                f"grad_output {tuple(grad_output.shape)} and input {tuple(input.shape)} must be (..., O) and "
                "(..., I) with the same leading dimensions"
            )
        grad, data = checked_pair(grad_output, input)
        samples, outs = math.prod(grad.shape[:-1]), grad.shape[-1]
        self.grad, self.data = grad.reshape(samples, outs), data.reshape(samples, data.shape[-1])
        self.bias, ins = bias, data.shape[-1] + bias
        self.shape, self.dtype, self.device = (outs, ins), self.grad.dtype, grad.device
        self._mantissa, power = split_scale(scale)
        grad_exponent = exponent_of(self.grad)
        data_exponent = exponent_of(self.data, at_least=float(bias))
        self.exponent = grad_exponent + data_exponent + power
        self._shrink_grad = power_of_two(-grad_exponent, self.dtype)
        self._shrink_data = power_of_two(-data_exponent, self.dtype)
        self.column_flops = 2.0 * samples * (outs + ins)
        self.dense_flops = 2.0 * samples * outs * ins

    @property
    def rank_bound(self) -> int:
        return min(*self.shape, self.grad.shape[0])

    def unit_matmat(self, columns: Tensor) -> Tensor:
        columns = columns * self._shrink_data
        hidden = self.data @ columns[:-1] + columns[-1:] if self.bias else self.data @ columns  # (N, r)
        return self.grad.mT @ (hidden * (self._shrink_grad * self._mantissa))

    def unit_rmatmat(self, columns: Tensor) -> Tensor:
        hidden = self.grad @ (columns * (self._shrink_grad * self._mantissa))  # (N, r)
        return self._to_inputs(hidden) * self._shrink_data

    def _to_inputs(self, hidden: Tensor) -> Tensor:
        result = self.data.mT @ hidden
        return torch.cat([result, hidden.sum(0, keepdim=True)]) if self.bias else result

    def unit_dense(self) -> Tensor:
        grad = self.grad.mT * (self._shrink_grad * self._mantissa)  # (O, N); products with few rows beat few columns
        result = grad @ self.data
        if self.bias:
            result = torch.cat([result, grad.sum(1, keepdim=True)], dim=1)
        return result * self._shrink_data

    def unit_factors(self) -> tuple[Tensor, Tensor] | None:
        if self.grad.shape[0] >= min(self.shape):
            return None
        data = self.data * self._shrink_data
        if self.bias:
            ones = torch.ones_like(data[:, :1]) * self._shrink_data
            data = torch.cat([data, ones], dim=1)
        return (self.grad * (self._shrink_grad * self._mantissa)).mT, data.mT


class ScaledMap(LinearMap):
    """``factor * M``: a batch's share, N_b / sum N_b, of a mean over many batches."""

    def __init__(self, inner: LinearMap, factor: float) -> None:
        self.inner = inner
        self.shape, self.dtype, self.device = inner.shape, inner.dtype, inner.device
        self._mantissa, power = split_scale(factor)
        self.exponent = inner.exponent + power
        self.column_flops, self.dense_flops = inner.column_flops, inner.dense_flops
        self.granule = inner.granule

    @property
    def rank_bound(self) -> int:
        return self.inner.rank_bound

    def unit_matmat(self, columns: Tensor) -> Tensor:
        return self.inner.unit_matmat(columns) * self._mantissa

    def unit_rmatmat(self, columns: Tensor) -> Tensor:
        return self.inner.unit_rmatmat(columns) * self._mantissa

    def unit_dense(self) -> Tensor:
        return self.inner.unit_dense() * self._mantissa

    def unit_factors(self) -> tuple[Tensor, Tensor] | None:
        factors = self.inner.unit_factors()
        return factors and (factors[0] * self._mantissa, factors[1])


class SumMap(LinearMap):
    """``sum_b M_b``: several batches, or several paths between the same layers."""

    def __init__(self, maps: Sequence[LinearMap]) -> None:
        if not maps:
            raise GrowthError("a sum needs at least one map")
        first = maps[0]
        for other in maps:
            if (other.shape, other.dtype, other.device) != (first.shape, first.dtype, first.device):
                raise GrowthError(
                    f"maps of one shape, dtype and device add up; got {first.shape} {first.dtype} "
                    f"{first.device} and {other.shape} {other.dtype} {other.device}"
                )
        self.maps = tuple(maps)
        self.shape, self.dtype, self.device = first.shape, first.dtype, first.device
        self.granule = max(m.granule for m in maps)
        exponents = torch.stack([m.exponent for m in maps])
        self.exponent = exponents.amax()  # amax carries on NaN and inf: one bad batch makes a bad sum
        shares = (exponents - self.exponent).to(self.dtype).clamp(min=-LARGEST_EXPONENT[self.dtype])
        self._shares = torch.exp2(shares)
        self.column_flops = sum(m.column_flops for m in maps)
        self.dense_flops = sum(m.dense_flops for m in maps)

    @property
    def rank_bound(self) -> int:
        return min(*self.shape, sum(m.rank_bound for m in self.maps))

    def unit_matmat(self, columns: Tensor) -> Tensor:
        return _total(m.unit_matmat(columns * s) for m, s in zip(self.maps, self._shares, strict=True))

    def unit_rmatmat(self, columns: Tensor) -> Tensor:
        return _total(m.unit_rmatmat(columns * s) for m, s in zip(self.maps, self._shares, strict=True))

    def unit_dense(self) -> Tensor:
        return _total(m.unit_dense() * s for m, s in zip(self.maps, self._shares, strict=True))

    def unit_factors(self) -> tuple[Tensor, Tensor] | None:
        lefts, rights = [], []
        for member, share in zip(self.maps, self._shares, strict=True):
            factors = member.unit_factors()
            if factors is None:
                return None
            lefts.append(factors[0] * share)
            rights.append(factors[1])
        if sum(left.shape[1] for left in lefts) >= min(self.shape):
            return None
        return torch.cat(lefts, dim=1), torch.cat(rights, dim=1)


def _total(terms: Iterator[Tensor]) -> Tensor:
    result = next(terms).clone()
    for term in terms:
        result += term
    return result
