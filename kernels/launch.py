"""What every launcher shares: when Triton can run, the device context, the layout and precision rules."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

if not __name__.startswith("fastgrow."):
    raise ImportError("import fastgrow.kernels, not the source folder: the ops would be registered twice")

__all__ = ["dense_flat", "device_of", "interpreting", "products_in", "triton_missing"]


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's interpreter is on: kernels then run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def triton_missing(tensor: Tensor) -> str | None:
    """Why the Triton kernels cannot run on this tensor; None if they can."""
    if not _has_triton():
        return "Triton is not installed (pip install triton)"
    if not (tensor.is_cuda or interpreting()):
        return f"the tensor is on {tensor.device}; Triton needs a GPU, or TRITON_INTERPRET=1 on the CPU"
    return None


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one: Triton launches there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def dense_flat(x: Tensor) -> Tensor | None:
    """The elements as one vector in memory order, without a copy; None if there are gaps or overlaps."""
    if x.is_contiguous():
        return x.view(-1)
    order = sorted(range(x.dim()), key=lambda d: (x.stride(d), x.size(d)), reverse=True)
    permuted = x.permute(order)
    return permuted.view(-1) if permuted.is_contiguous() else None


@contextmanager
def products_in(precision: str, device: torch.device) -> Iterator[None]:
    """Library calls inside multiply float32 as `precision` says, whatever is set: "float32", or "tf32" on CUDA.

    No autocast casts them.
    """
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False), products_in(precision, device):
            yield
        return
    if precision == "tf32" and device.type != "cuda":
        yield
        return
    products: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    convolutions: Any = torch.backends.cudnn if device.type == "cuda" else torch.backends.mkldnn
    cudnn = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    wanted = ("tf32",) if precision == "tf32" else ("ieee", "none")  # none is float32 too
    changed = [(s, old) for s in (products.matmul, convolutions.conv) if (old := s.fp32_precision) not in wanted]
    try:
        for switch, _ in changed:
            switch.fp32_precision = wanted[0]
        yield
    finally:
        for switch, old in changed:
            if switch is not cudnn:  # its own default is tf32; that of the others is what torch.backends says
                switch.fp32_precision = "none"
            if switch.fp32_precision != old:
                switch.fp32_precision = old
