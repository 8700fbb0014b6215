"""Sum of squares and activation backward by ATen calls: the way on the CPU, and wherever Triton is not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .launch import dense_flat

__all__ = ["activation_backward", "sum_of_squares"]

# a dot product adds up one chunk; its float32 rounding error grows with the chunk (1e-3 over 2^24 elements
# in one go), its overhead with their number
_CHUNK = 1 << 19  # elements converted to float32 at a time
_ROW = 1 << 14  # elements of a norm: float32 sums of so many are exact to 3e-7
_RUN = 1 << 15  # elements of one dot product, which adds more of them side by side than a norm does
_WIDE = (torch.float32, torch.float64)

_SMALLEST = {
    torch.float64: 2.0**-1074,
    torch.float32: 2.0**-149,
    torch.bfloat16: 2.0**-133,
    torch.float16: 2.0**-24,
}


def sum_of_squares(x: Tensor) -> Tensor:
    """() float32 (float64 for float64), accumulated in that dtype."""
    if x.is_cuda:
        return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).square()
    if x.dtype in _WIDE and (flat := dense_flat(x)) is not None:
        return _square(flat)
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = [_square(part) for part in _chunks(x, wide)]
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts).sum() if parts else x.new_zeros((), dtype=wide)


def _square(flat: Tensor) -> Tensor:
    """(): by rows, which ATen sums side by side; one long run loses three digits at 1e7 elements."""
    elements = flat.numel()
    if elements <= _RUN:
        return torch.dot(flat, flat)
    rows, rest = divmod(elements, _ROW)
    norms = torch.linalg.vector_norm((flat[:-rest] if rest else flat).view(rows, _ROW), dim=1)
    total = torch.dot(norms, norms)
    return total + torch.dot(flat[-rest:], flat[-rest:]) if rest else total


def _chunks(x: Tensor, wide: torch.dtype) -> Iterator[Tensor]:
    """Contiguous vectors of the wide dtype that make up x; converted or gathered a piece at a time."""
    flat = dense_flat(x)
    buffer = torch.empty(min(_CHUNK, x.numel()), dtype=wide, device=x.device)
    for piece in [x] if flat is None else flat.split(_CHUNK):
        for part in _pieces(piece):
            yield buffer[: part.numel()].view(part.shape).copy_(part).view(-1)


def _pieces(x: Tensor) -> Iterator[Tensor]:
    """Views of at most a chunk, cut along the leading dimensions."""
    if x.numel() == 0:
        return
    if x.numel() <= _CHUNK:
        yield x
    else:
        dim = next(d for d, size in enumerate(x.shape) if size > 1)
        for part in x.split(max(1, x.shape[dim] * _CHUNK // x.numel()), dim):
            yield from _pieces(part)


def activation_backward(grad: Tensor, x: Tensor, activation: str, negative_slope: float) -> Tensor:
    """grad f'(x) by ATen's own backward ops."""
    aten = torch.ops.aten
    match activation:
        case "identity":
            return grad.clone()
        case "relu":
            return aten.threshold_backward(grad, x, 0)
        case "relu1":  # x <= -(smallest positive number) is x < 0
            return aten.threshold_backward(grad, x, -_SMALLEST[x.dtype])
        case "relu6":
            return aten.hardtanh_backward(grad, x, 0, 6)
        case "leaky_relu":
            return aten.leaky_relu_backward(grad, x, negative_slope, False)
        case "gelu":
            return aten.gelu_backward(grad, x)
        case "gelu_tanh":
            return aten.gelu_backward(grad, x, approximate="tanh")
        case "silu":
            return aten.silu_backward(grad, x)
        case "tanh":
            return aten.tanh_backward(grad, torch.tanh(x))
    raise AssertionError(activation)
