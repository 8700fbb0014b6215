"""Two stacked layers: a matrix for each member, none of which meets another."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import GrowthError
from .base import LinearMap, checked_pair, exponent_of, power_of_two, split_scale

__all__ = ["StackedPair"]

_LEAST = 2.0**-40  # of magnitudes whose squares, and terms 2^-46 times smaller, float32 holds


class StackedPair(LinearMap):
    """``M_g = scale * sum_n dz_gn h_gn^T`` of every member g, side by side: a block-diagonal M.

    grad_output: dL/dz of the consumer, (G, N, O); input: h of the producer, (G, N, I). Rows of M are laid out as
    (O, G), columns as (I, G), with ``bias`` (I + 1, G): as the unit vectors of a stacked layer.
    """

    def __init__(self, grad_output: Tensor, input: Tensor, scale: float = 1.0, bias: bool = False) -> None:
        if grad_output.dim() != 3 or input.dim() != 3 or grad_output.shape[:2] != input.shape[:2]:
            raise GrowthError(
                f"grad_output {tuple(grad_output.shape)} and input {tuple(input.shape)} must be (G, N, O) and (G, N, I)"
            )
        grad, data = checked_pair(grad_output, input)
        if bias:
            data = torch.cat([data, data.new_ones(*data.shape[:2], 1)], 2)
        self.members, _, outs = grad.shape
        ins = data.shape[2]
        self.shape, self.dtype, self.device = (outs * self.members, ins * self.members), grad.dtype, grad.device
        mantissa, power = split_scale(scale)
        self.blocks = grad.mT @ data  # U_g: (G, O, I)
        if _is_tame(self.blocks):
            if mantissa == 0.5:  # a power of two, as the scale of one batch is
                mantissa, power = 1.0, power - 1
            else:
                self.blocks *= mantissa
            self.exponent = torch.full((), float(power), device="cpu")
        else:
            of_grad, of_data = exponent_of(grad), exponent_of(data)
            self.exponent = of_grad + of_data + power
            shrunk = grad * (power_of_two(-of_grad, self.dtype) * mantissa)
            self.blocks = shrunk.mT @ (data * power_of_two(-of_data, self.dtype))
        self.column_flops = 2.0 * outs * ins * self.members
        self.dense_flops = 0.0

    def unit_matmat(self, columns: Tensor) -> Tensor:
        return self._by_member(self.blocks, columns)

    def unit_rmatmat(self, columns: Tensor) -> Tensor:
        return self._by_member(self.blocks.mT, columns)

    def _by_member(self, blocks: Tensor, columns: Tensor) -> Tensor:
        parts = columns.reshape(blocks.shape[2], self.members, -1).movedim(1, 0)  # (G, I, r)
        return (blocks @ parts).movedim(0, 1).reshape(-1, columns.shape[1])


def _is_tame(product: Tensor) -> bool:
    """Whether nothing of a product overflowed or vanished in its making, told without waiting for a device."""
    if product.device.type != "cpu" or not product.numel():
        return False
    low, high = torch.aminmax(product)
    return _LEAST < max(-low.item(), high.item()) < 1 / _LEAST
