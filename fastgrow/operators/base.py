"""The interface of a linear map, its scaling, and what every map checks of its tensors."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import GrowthError
from ..kernels.launch import products_in

__all__ = [
    "LARGEST_EXPONENT",
    "TF32_ROUNDS",
    "LinearMap",
    "checked_pair",
    "exponent_of",
    "power_of_two",
    "products_in",
    "scale_by_power",
    "split_scale",
    "upcast",
]

_IDENTITY_COLUMNS = 256  # width of the identity blocks a map is multiplied with to be written out
LARGEST_EXPONENT = {torch.float32: 120, torch.float64: 1000}  # 2^(+-that) is a normal number


TF32_ROUNDS = os.environ.get("FASTGROW_TF32_ROUNDS", "1") != "0"
"""Whether Krylov rounds multiply float32 in tf32 on GPUs that have it (compute capability 8), whatever torch's own
switches say: what they find is a basis, and directions, values and the captured norm come from one more product in
float32. ``FASTGROW_TF32_ROUNDS=0`` in the environment, or False here, keeps the rounds in float32."""


class LinearMap(ABC):
    """A matrix M (m, n) known by its products.

    ``M = 2^exponent * U``: U, the unit map, has entries that neither overflow nor vanish when float32
    squares them, whatever the units of the loss. The exponent is a tensor, so that no product waits for
    the device; it is NaN or infinite where the map's tensors are.

    shape: (m, n); dtype: of the products, float64 for float64 tensors, else float32; exponent: ();
    column_flops: of one column of `matmat`; dense_flops: of `dense`; granule: columns that a product is made
    in, so that fewer cost as much.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    exponent: Tensor
    column_flops: float
    granule: int = 1
    dense_flops: float

    @abstractmethod
    def unit_matmat(self, columns: Tensor) -> Tensor:
        """U X: (n, r) -> (m, r)."""

    @abstractmethod
    def unit_rmatmat(self, columns: Tensor) -> Tensor:
        """U^T Y: (m, r) -> (n, r)."""

    def unit_dense(self) -> Tensor:
        """U: (m, n), by its products with the identity."""
        rows, cols = self.shape
        by_rows = rows < cols
        multiply = self.unit_rmatmat if by_rows else self.unit_matmat
        side = min(rows, cols)
        eye = torch.eye(side, dtype=self.dtype, device=self.device)
        blocks = [multiply(block.contiguous()) for block in eye.split(_IDENTITY_COLUMNS, dim=1)]
        result = torch.cat(blocks, dim=1)
        return result.mT.contiguous() if by_rows else result

    def unit_factors(self) -> tuple[Tensor, Tensor] | None:
        """(m, p), (n, p) with U = L R^T and p < min(m, n), where the map has such factors at hand."""
        return None

    def unit_square(self) -> Tensor | None:
        """(): ``||U||_F^2``, where it costs little."""
        return None

    @property
    def may_round(self) -> bool:
        """Whether products inside `rounded` are less exact than others."""
        if not TF32_ROUNDS or self.dtype != torch.float32 or self.device.type != "cuda":
            return False
        return torch.version.hip is None and torch.cuda.get_device_capability(self.device) >= (8, 0)

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Products inside may round what they multiply to tf32's 11 bits; sums stay float32."""
        with products_in("tf32", self.device):
            yield

    @property
    def rank_bound(self) -> int:
        """An upper bound of the rank that is known without computing."""
        return min(self.shape)

    def matmat(self, columns: Tensor) -> Tensor:
        """M X: (n, r) -> (m, r)."""
        with products_in("float32", self.device):
            return scale_by_power(self.unit_matmat(columns), self.exponent)

    def rmatmat(self, columns: Tensor) -> Tensor:
        """M^T Y: (m, r) -> (n, r)."""
        with products_in("float32", self.device):
            return scale_by_power(self.unit_rmatmat(columns), self.exponent)

    def dense(self) -> Tensor:
        """M: (m, n)."""
        with products_in("float32", self.device):
            return scale_by_power(self.unit_dense(), self.exponent)


def scale_by_power(values: Tensor, exponent: Tensor) -> Tensor:
    """values * 2^exponent, in two halves: 2^exponent alone may leave the range that the product is in."""
    half = torch.floor(exponent / 2)
    return values * power_of_two(half, values.dtype) * power_of_two(exponent - half, values.dtype)


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor | float:
    """2^exponent: a number where the exponent is at hand on the CPU, else a tensor of this dtype on its device."""
    if exponent.device.type != "cpu":
        return torch.exp2(exponent.to(dtype))
    power = exponent.item()
    if not -1074 <= power <= 1023:
        return power if power != power else 0.0 if power < 0 else math.inf
    return float(2.0**power)


def exponent_of(tensor: Tensor, at_least: float = 0.0) -> Tensor:
    """(): the power of two just above the largest magnitude; not finite where the tensor is not."""
    if tensor.numel() == 0:
        return torch.zeros((), device=tensor.device)
    low, high = torch.aminmax(tensor)
    if tensor.device.type == "cpu":  # in plain numbers, which cost less than tensors of one element
        size = max(abs(low.item()), abs(high.item()), at_least)
        bound = LARGEST_EXPONENT[tensor.dtype]
        whole = min(max(math.frexp(size)[1], -bound), bound) if math.isfinite(size) else size
        return torch.tensor(float(whole), device="cpu")
    largest = torch.maximum(high, -low).clamp(min=at_least)
    limit = LARGEST_EXPONENT[tensor.dtype]
    power = torch.frexp(largest).exponent.clamp(-limit, limit).to(torch.float32)
    return torch.where(torch.isfinite(largest), power, largest.to(torch.float32))


def split_scale(scale: float) -> tuple[float, int]:
    """mantissa, exponent with scale = mantissa * 2^exponent."""
    if not math.isfinite(scale):
        raise GrowthError(f"a map can be scaled by a finite number only, got {scale}")
    return math.frexp(scale)


def upcast(tensor: Tensor, what: str) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise GrowthError(
            f"{what} has dtype {tensor.dtype}; a growth matrix needs float64, float32, bfloat16 or float16"
        )
    tensor = tensor.detach()
    return tensor if tensor.dtype in LARGEST_EXPONENT else tensor.float()


def checked_pair(grad_output: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    if grad_output.device != input.device:
        raise GrowthError(
            f"grad_output lies on {grad_output.device}, input on {input.device}; both must be on one device"
        )
    grad, data = upcast(grad_output, "grad_output"), upcast(input, "input")
    return (grad, data) if grad.dtype == data.dtype else (grad.double(), data.double())
