"""Models and inputs with shapes and no values."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .sharded import as_written, wrapped_modules
from .sites import tensors_of, unwrap, without_hooks

__all__ = ["fake_copy", "fake_inputs", "for_export"]


def fake_copy(model: nn.Module, mode: FakeTensorMode, shapes: Mapping[str, Sequence[int]] | None = None) -> nn.Module:
    """The model's modules with tensors that have shapes and no values; hooks are left behind.

    shapes: those that differ from the model's, by state-dict name.
    """
    inner = unwrap(model)
    shapes = shapes or {}
    memo: dict[int, Any] = {}
    with mode:
        for name, tensor in tensors_of(inner).items():
            if id(tensor) not in memo or name in shapes:
                shape = shapes.get(name, tensor.shape)
                fake = torch.empty(tuple(shape), dtype=tensor.dtype, device=tensor.device)
                memo[id(tensor)] = nn.Parameter(fake, False) if isinstance(tensor, nn.Parameter) else fake
    with without_hooks(inner), as_written(inner), _CopyShapes(mode):
        return copy.deepcopy(inner, memo)


class _CopyShapes(TorchFunctionMode):
    """Deep copies of tensors wherever they lie (kept activations, what hooks computed) are shapes: some have a history
    and refuse to be copied."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.fake = mode

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        with self.fake:
            memo[id(tensor)] = torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device)
        return memo[id(tensor)]


def fake_inputs(mode: FakeTensorMode, tensors: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: mode.from_tensor(t.detach(), static_shapes=True), tensors)


def for_export(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    """The model and its inputs as torch.export takes them: no export follows parameters that are sharded."""
    if not wrapped_modules(model):
        return model, inputs
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return fake_copy(model, mode), fake_inputs(mode, inputs)
