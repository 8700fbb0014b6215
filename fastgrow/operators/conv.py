"""Maps whose producer is a convolution: h is convolved with r filters, never unfolded."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import GrowthError
from ..kernel_ops import ConvGeometry, conv2d_growth_matrix
from .base import LinearMap, checked_pair, exponent_of, power_of_two, split_scale

__all__ = ["ConvFlattenLinearPair", "ConvPair", "Geometry"]

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class Geometry(Protocol):
    """What a map reads of `fastgrow.ops.ConvGeometry`: ints, or one int per spatial dimension."""

    @property
    def kernel_size(self) -> int | tuple[int, ...]: ...
    @property
    def stride(self) -> int | tuple[int, ...]: ...
    @property
    def padding(self) -> int | tuple[int, ...]: ...
    @property
    def dilation(self) -> int | tuple[int, ...]: ...


class _ConvProducer(LinearMap):
    """The half that maps with a convolution as producer share: h, its geometry, the hidden map."""

    granule = 16  # channels that a convolution's inner loops take at a time

    def _set_producer(self, data: Tensor, producer: Geometry, bias: bool) -> None:
        dims = data.dim() - 2
        if dims not in _CONVOLUTIONS:
            raise GrowthError(f"input {tuple(data.shape)} must be (N, I, *spatial) with 1, 2 or 3 spatial dimensions")
        self.data, self.bias, self.dims = data, bias, dims
        self.producer = _expand(producer, dims, "producer")
        kernel, stride, padding, dilation = self.producer
        self.hidden = tuple(
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(data.shape[2:], kernel, stride, padding, dilation, strict=True)
        )
        if min(self.hidden) < 1:
            raise GrowthError(
                f"input {tuple(data.shape)} is smaller than the producer's kernel {kernel} with dilation {dilation}"
            )
        self.taps = data.shape[1] * math.prod(kernel)
        self.inputs = self.taps + bias

    def _set_scale(self, grad: Tensor, scale: float) -> None:
        self.grad, self.dtype, self.device = grad, grad.dtype, grad.device
        self._mantissa, power = split_scale(scale)
        grad_exponent = exponent_of(grad)
        data_exponent = exponent_of(self.data, at_least=float(self.bias))
        self.exponent = grad_exponent + data_exponent + power
        self._shrink_grad = power_of_two(-grad_exponent, self.dtype) * self._mantissa
        self._shrink_data = power_of_two(-data_exponent, self.dtype)

    def _to_hidden(self, columns: Tensor) -> Tensor:
        """(I*kernel [+ 1], r) -> what r filters write: (N, r, *hidden)."""
        columns = columns * self._shrink_data
        kernel, stride, padding, dilation = self.producer
        filters = columns[: self.taps].mT.reshape(-1, self.data.shape[1], *kernel)
        return _CONVOLUTIONS[self.dims](
            self.data, filters, columns[-1].contiguous() if self.bias else None, stride, padding, dilation
        )

    def _from_hidden(self, hidden: Tensor) -> Tensor:
        """The adjoint of `_to_hidden`: (N, r, *hidden) -> (I*kernel [+ 1], r)."""
        kernel, stride, padding, dilation = self.producer
        channels = hidden.shape[1]
        weight_shape = (channels, self.data.shape[1], *kernel)
        grad = _weight_gradient(hidden, self.data, weight_shape, stride, padding, dilation)
        result = grad.reshape(channels, self.taps).mT
        if self.bias:
            constant = hidden.sum(dim=(0, *range(2, hidden.dim())))
            result = torch.cat([result, constant[None]])
        return result * self._shrink_data


class ConvPair(_ConvProducer):
    """The exact growth matrix of two convolutions, by its products.

    ``M[(o,a),(i,b)] = scale sum_{n, y in hidden map} dz[n, o, (y + p2 - d2 a)/s2] h[n, i, s1 y - p1 + d1 b]``

    ``M X`` convolves h with r producer filters and takes the consumer's weight gradient for that hidden
    map, whose border is zero; ``M^T Y`` goes the same way back. grad_output: dL/dz of the consumer,
    (N, O, *out); input: h of the producer, (N, I, *in); 1, 2 or 3 spatial dimensions, groups 1, zero
    padding. Rows (o, a) as ``consumer.weight[:, j].reshape(-1)``, columns (i, b) as
    ``producer.weight[j].reshape(-1)``, with ``bias`` one more column, the last, for the producer's bias.

    centred: a batch norm in training mode lies between: the hidden map loses its mean over samples and
    positions, M becomes a covariance (the factor gamma/sqrt(eps) is left to ``scale``).
    """

    def __init__(
        self,
        grad_output: Tensor,
        input: Tensor,
        producer: Geometry,
        consumer: Geometry,
        scale: float = 1.0,
        bias: bool = False,
        *,
        centred: bool = False,
    ) -> None:
        grad, data = checked_pair(grad_output, input)
        self.centred = centred
        self._set_producer(data, producer, bias)
        self.consumer = _expand(consumer, self.dims, "consumer")
        kernel, stride, padding, dilation = self.consumer
        wanted = tuple(
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(self.hidden, kernel, stride, padding, dilation, strict=True)
        )
        if grad.dim() != data.dim() or grad.shape[0] != data.shape[0] or tuple(grad.shape[2:]) != wanted:
            raise GrowthError(
                f"grad_output {tuple(grad.shape)} does not fit input {tuple(data.shape)}: a hidden map of "
                f"{self.hidden} gives the consumer an output of (N={data.shape[0]}, O, {wanted})"
            )
        self._set_scale(grad, scale)
        outs = grad.shape[1]
        self.rows = outs * math.prod(kernel)
        self.shape = (self.rows, self.inputs)
        batch = data.shape[0]
        self.column_flops = 2.0 * batch * (math.prod(self.hidden) * self.inputs + math.prod(wanted) * self.rows)
        self.dense_flops = (
            2.0 * batch * math.prod(wanted) * data.shape[1] * outs * self._offsets()
            if self.dims == 2
            else min(self.shape) * self.column_flops
        )

    def _offsets(self) -> int:
        """Distinct offsets s1 d2 a + d1 b: the correlations that `conv2d_growth_matrix` makes M from."""
        offsets = 1
        for k1, s1, _, d1, k2, _, _, d2 in zip(*self.producer, *self.consumer, strict=True):
            offsets *= len({s1 * d2 * a + d1 * b for a in range(k2) for b in range(k1)})
        return offsets

    def unit_matmat(self, columns: Tensor) -> Tensor:
        return self._correlate(self._centre(self._to_hidden(columns)))

    def unit_rmatmat(self, columns: Tensor) -> Tensor:
        kernel, stride, padding, dilation = self.consumer
        outs, channels = self.grad.shape[1], columns.shape[1]
        weight = (columns * self._shrink_grad).reshape(outs, *kernel, channels).movedim(-1, 1).contiguous()
        shape = (self.grad.shape[0], channels, *self.hidden)
        hidden = _convolution_backward(
            self.grad,
            self.grad.new_empty(1).expand(shape),
            weight,
            stride,
            padding,
            dilation,
            (True, False, False),
        )[0]
        return self._from_hidden(self._centre(hidden))

    @property
    def rank_bound(self) -> int:
        positions = self.data.shape[0] * math.prod(self.hidden)
        return min(*self.shape, positions) if self.dims == 2 else min(self.shape)

    def unit_factors(self) -> tuple[Tensor, Tensor] | None:
        """Small maps: a column for each hidden position, what it reads of h and what reads it of dz."""
        if self.rank_bound == min(self.shape):
            return None
        kernel, stride, padding, dilation = self.producer
        batch, positions = self.data.shape[0], math.prod(self.hidden)
        reads = functional.unfold(self.data * self._shrink_data, kernel, dilation, padding, stride)
        right = reads.movedim(1, 0).reshape(self.taps, batch * positions)
        if self.bias:
            right = torch.cat([right, torch.ones_like(right[:1]) * self._shrink_data])
        if self.centred:
            right = right - right.mean(dim=1, keepdim=True)
        kernel, stride, padding, dilation = self.consumer
        # the number of the hidden position behind each tap of each output; 0 where it lies in the padding
        numbers = torch.arange(1, positions + 1, dtype=self.dtype, device=self.device).reshape(1, 1, *self.hidden)
        behind = functional.unfold(numbers, kernel, dilation, padding, stride)[0].long()  # (kernel, outputs)
        grad = (self.grad * self._shrink_grad).flatten(2)  # (N, O, outputs)
        left = grad.new_zeros(grad.shape[1], len(behind), batch, positions + 1)
        for tap, index in enumerate(behind):
            left[:, tap].index_copy_(2, index, grad.movedim(1, 0))
        return left[..., 1:].reshape(self.rows, batch * positions), right

    def _correlate(self, hidden: Tensor) -> Tensor:
        """The consumer's weight gradient for a hidden map (N, r, *hidden): (O*kernel, r)."""
        kernel, stride, padding, dilation = self.consumer
        hidden = hidden * self._shrink_grad
        outs, channels = self.grad.shape[1], hidden.shape[1]
        grad = _weight_gradient(self.grad, hidden, (outs, channels, *kernel), stride, padding, dilation)
        return grad.movedim(1, -1).reshape(self.rows, channels)

    def _centre(self, hidden: Tensor) -> Tensor:
        if not self.centred:
            return hidden
        return hidden - hidden.mean(dim=(0, *range(2, hidden.dim())), keepdim=True)

    def unit_dense(self) -> Tensor:
        if self.dims != 2:
            return super().unit_dense()
        producer, consumer = (ConvGeometry(*geometry) for geometry in (self.producer, self.consumer))
        matrix = conv2d_growth_matrix(self.grad * self._shrink_grad, self.data * self._shrink_data, producer, consumer)
        if not (self.bias or self.centred):
            return matrix
        ones = self.grad.new_ones(1, 1, *[1] * self.dims).expand(self.grad.shape[0], 1, *self.hidden)
        constant = self._correlate(ones)  # (rows, 1)
        if self.bias:
            matrix = torch.cat([matrix, constant * self._shrink_data], dim=1)
        if self.centred:  # the covariance: less the product of the means
            mean = self._from_hidden(ones) / (ones.numel())  # (inputs, 1)
            matrix = matrix - constant @ mean.mT
        return matrix


class ConvFlattenLinearPair(_ConvProducer):
    """Convolution -> flatten -> linear: ``M[(o,y),(i,b)] = scale sum_n dz[n, o] h[n, i, s1 y - p1 + d1 b]``.

    grad_output: dL/dz of the linear consumer, (N, O); input: h of the producer, (N, I, *in). Rows (o, y)
    with y over the hidden map, as ``consumer.weight[:, j*Y : (j+1)*Y].reshape(-1)`` for Y positions;
    columns (i, b) as ``producer.weight[j].reshape(-1)``, then the bias.
    """

    def __init__(
        self,
        grad_output: Tensor,
        input: Tensor,
        producer: Geometry,
        scale: float = 1.0,
        bias: bool = False,
    ) -> None:
        grad, data = checked_pair(grad_output, input)
        self._set_producer(data, producer, bias)
        if grad.dim() != 2 or grad.shape[0] != data.shape[0]:
            raise GrowthError(
                f"grad_output {tuple(grad.shape)} must be (N={data.shape[0]}, O): the consumer reads a flattened map"
            )
        self._set_scale(grad, scale)
        samples, outs = grad.shape
        self.positions = math.prod(self.hidden)
        self.shape = (outs * self.positions, self.inputs)
        self.column_flops = 2.0 * samples * self.positions * (self.inputs + outs)
        self.dense_flops = min(self.shape) * self.column_flops

    def unit_matmat(self, columns: Tensor) -> Tensor:
        hidden = self._to_hidden(columns) * self._shrink_grad  # (N, r, *hidden)
        channels = hidden.shape[1]
        product = self.grad.mT @ hidden.reshape(hidden.shape[0], -1)  # (O, r*Y)
        return product.reshape(-1, channels, self.positions).mT.reshape(-1, channels)

    def unit_rmatmat(self, columns: Tensor) -> Tensor:
        channels = columns.shape[1]
        outs = self.grad.shape[1]
        weight = (columns * self._shrink_grad).reshape(outs, self.positions, channels).mT.reshape(outs, -1)
        return self._from_hidden((self.grad @ weight).reshape(-1, channels, *self.hidden))


_Expanded = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _expand(geometry: Geometry, dims: int, what: str) -> _Expanded:
    """kernel_size, stride, padding, dilation, each with one entry per spatial dimension."""

    def each(name: str, least: int) -> tuple[int, ...]:
        value = getattr(geometry, name)
        entries = (value,) * dims if isinstance(value, int) else tuple(value)
        if len(entries) != dims or any(not isinstance(e, int) or e < least for e in entries):
            raise GrowthError(f"the {what}'s {name} is {value!r}; an int >= {least}, or {dims} of them, is wanted")
        return entries

    return each("kernel_size", 1), each("stride", 1), each("padding", 0), each("dilation", 1)


def _convolution_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    mask: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    # What the mask leaves out is read for its shape alone, and may be an expanded scalar.
    return torch.ops.aten.convolution_backward(
        grad, input, weight, None, stride, padding, dilation, False, (0,) * len(stride), 1, mask
    )


def _weight_gradient(
    grad: Tensor,
    input: Tensor,
    weight_shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    weight = grad.new_empty(1).expand(weight_shape)
    return _convolution_backward(grad, input, weight, stride, padding, dilation, (False, True, False))[1]
