"""Sums of squares that ride on a pass the training step makes anyway: the activation's backward on a GPU.

The activation's gradient arrives at the layer, the norm or the residual sum before it as the very tensor that its
backward wrote, and that tensor carries its sum along. Whoever finds no sum, because something else reads the same
values and the gradients were added, or because a hook changed it or put another tensor in its place, reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import kernel_ops
from .kernels.aten import activation_backward
from .kernels.launch import dense_flat, triton_missing
from .names import modules_in
from .nn import ReLU
from .nn.activations import relu

__all__ = ["carried_sum", "carry", "riding"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SUM = "_fastgrow_sum_of_squares"


def carried_sum(gradient: Tensor) -> Tensor | None:
    """sum g^2 of a gradient whose backward took it along; None where it must be read."""
    version, total = getattr(gradient, _SUM, (None, None))
    return total if version == gradient._version else None


def carry(gradient: Tensor, total: Tensor) -> None:
    """Let the gradient take its sum along, to whoever else it arrives at as it is."""
    setattr(gradient, _SUM, (gradient._version, total))


@contextlib.contextmanager
def riding(model: nn.Module) -> Iterator[None]:
    """The model's activation modules take the sum along, where `rides` says so of their input.

    Their outputs and gradients keep every bit; a second derivative goes through ATen's ops. Function calls
    (``F.relu``) and activations whose kernel rounds differently from ATen's (gelu, silu, tanh) are left alone.
    The modules stay the same objects, of another class while this lasts.
    """
    swapped: list[tuple[nn.Module, type[nn.Module]]] = []
    first = next(model.parameters(), None)
    if first is not None and rides(first):
        swapped = [(module, type(module)) for module in modules_in(model) if type(module) in _CARRIERS]
    try:
        for module, kind in swapped:
            module.__class__ = _CARRIERS[kind]
        yield
    finally:
        for module, kind in swapped:
            if type(module) is _CARRIERS[kind]:
                module.__class__ = kind


def rides(x: Tensor) -> bool:
    """Whether the Triton kernel takes tensors like this one."""
    return x.is_cuda and x.dtype in _DTYPES and triton_missing(x) is None


def _can_carry(x: Tensor, inplace: bool) -> bool:
    return (
        type(x) is Tensor
        and x.requires_grad
        and torch.is_grad_enabled()
        and not x.is_nested
        and not (inplace and x._is_view())
        and not torch._C._are_functorch_transforms_active()
        and rides(x)
    )


class _Carrying(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, slope: float, inplace: bool) -> Tensor:
        y = _FORWARD[activation](x, slope, inplace)
        if inplace:
            ctx.mark_dirty(x)
        ctx.activation, ctx.slope = activation, slope
        # What ATen's own backward keeps: y > 0 says what x > 0 does, and one of the two is gone or kept elsewhere.
        ctx.save_for_backward(y if inplace or activation == "relu" else x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad, (x,) = grads[0], ctx.saved_tensors
        if torch.is_grad_enabled() or grad.stride() != x.stride() or grad.dtype != x.dtype or dense_flat(x) is None:
            return activation_backward(grad, x, ctx.activation, ctx.slope), None, None, None
        out, total = kernel_ops.activation_backward(grad, x, ctx.activation, negative_slope=ctx.slope, backend="triton")
        carry(out, total)
        return out, None, None, None


_FORWARD = {
    "relu": lambda x, slope, inplace: F.relu(x, inplace),
    "relu1": lambda x, slope, inplace: relu(x),
    "relu6": lambda x, slope, inplace: F.relu6(x, inplace),
    "leaky_relu": lambda x, slope, inplace: F.leaky_relu(x, slope, inplace),
}


class _CarryingReLU(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        if _can_carry(input, self.inplace):
            return _Carrying.apply(input, "relu", 0.0, self.inplace)
        return super().forward(input)


class _CarryingReLU6(nn.ReLU6):
    def forward(self, input: Tensor) -> Tensor:
        if _can_carry(input, self.inplace):
            return _Carrying.apply(input, "relu6", 0.0, self.inplace)
        return super().forward(input)


class _CarryingLeakyReLU(nn.LeakyReLU):
    def forward(self, input: Tensor) -> Tensor:
        if self.negative_slope >= 0 and _can_carry(input, self.inplace):
            return _Carrying.apply(input, "leaky_relu", self.negative_slope, self.inplace)
        return super().forward(input)


class _CarryingTwin(ReLU):
    def forward(self, input: Tensor) -> Tensor:
        if _can_carry(input, False):
            return _Carrying.apply(input, "relu1", 0.0, False)
        return super().forward(input)


_CARRIERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: _CarryingReLU,
    nn.ReLU6: _CarryingReLU6,
    nn.LeakyReLU: _CarryingLeakyReLU,
    ReLU: _CarryingTwin,
}
