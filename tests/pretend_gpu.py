"""A GPU that is not there: tensors in the CPU's memory that say they are on one, and refuse to meet others.

What a first run on a GPU would find is found without one: tensors of two devices in one call, tensors made on the wrong
one, and reads that the host waits for, which are counted. Triton's kernels run in its interpreter.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["OnGpu", "a_gpu", "bare", "moved", "waits_so_far"]

_GPU, _CPU = torch.device("cuda", 0), torch.device("cpu")
_TAKES_BOTH = ("copy_", "index", "index_put", "index_put_", "_index_put_impl_")
_WAITS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero", "_linalg_check_errors")
_own_device = torch._C.TensorBase.device.__get__  # type: ignore[attr-defined]
_is_transformed = torch._C._functorch.is_functorch_wrapped_tensor


class OnGpu(Tensor):
    """A tensor in the CPU's memory, in a wrapper that says it is on a GPU."""

    __slots__ = ("held",)
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        self.held = held
        return self  # type: ignore[no-any-return]

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied: Tensor = OnGpu(self.held.detach().clone())
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(_own_device(t).type == "meta" for t in tensors):  # shapes alone are asked for
            args, kwargs = tree_map(_as_shape, (args, kwargs))
            return func(*args, **kwargs)
        strange = [t for t in tensors if not isinstance(t, OnGpu) and (t.dim() or name in ("cat", "stack"))]
        # Zeros for a tangent that is missing are made below Python, where the pretence does not reach.
        if name not in _TAKES_BOTH and any(bool(t.count_nonzero()) for t in strange):
            raise RuntimeError(f"{func}: tensors on {_GPU} and {_CPU}, of shapes {[tuple(t.shape) for t in tensors]}")
        masked = name == "index" and any(t.dtype == torch.bool for t in tensors[1:])
        if masked or name in _WAITS or (name == "copy_" and not isinstance(args[0], OnGpu)):
            _Machine.wait(name)
        known = {id(t.held): t for t in tensors if isinstance(t, OnGpu)}
        args, kwargs = bare((args, kwargs))
        result = func(*args, **{**kwargs, **({"device": _CPU} if kwargs.get("device") else {})})
        return tree_map(lambda t: known.get(id(t)) if id(t) in known else _wrapped(t), result)


def bare(value: Any) -> Any:
    """Any structure, with the tensors that wrappers hold."""
    return tree_map(lambda t: t.held if isinstance(t, OnGpu) else t, value)


def _wrapped(value: Any) -> Any:
    return OnGpu(value) if isinstance(value, Tensor) and not isinstance(value, OnGpu) else value


def _as_shape(value: Any) -> Any:
    return bare(value).to("meta") if isinstance(value, Tensor) else value


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.held if isinstance(x, OnGpu) else OnGpu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.held if isinstance(grad, OnGpu) else OnGpu(grad)


def _moved(x: Tensor) -> Tensor:
    """On the other device."""
    if not x.is_floating_point():  # functorch wraps whatever is made under it, indices too
        x = _innermost(x)
    if x.requires_grad or _is_transformed(x):
        return _Move.apply(x)
    return x.held if isinstance(x, OnGpu) else OnGpu(x)


def _innermost(x: Tensor) -> Tensor:
    while _is_transformed(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _device_of(x: Tensor) -> torch.device:
    with torch._C.DisableTorchFunction():
        return _GPU if isinstance(_innermost(x), OnGpu) else _own_device(x)


def _named_device(value: Any) -> torch.device | None:
    if isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda"):
        return torch.device(value)
    return value if isinstance(value, torch.device) else None


class _Machine(TorchFunctionMode):
    """While entered, "cuda" is a device of this process."""

    waits: ClassVar[list[str]] = []

    @classmethod
    def wait(cls, name: str) -> None:
        """The host waits for the device here; the innermost lines of the library are kept."""
        lines = [f for f in traceback.extract_stack() if "/fastgrow/" in f.filename]
        cls.waits.append(" ".join([name, *(f"{f.filename.split('/')[-1]}:{f.lineno}" for f in lines[-3:])]))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name in ("to", "cpu", "cuda") and args and isinstance(args[0], Tensor):
            return self._to(name, args[0], list(args[1:]), kwargs)
        if name in ("tolist", "numpy") and isinstance(args[0], OnGpu):
            self.wait(name)
            return func(args[0].held)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        target = _named_device(kwargs.get("device"))
        if target is None:
            return func(*args, **kwargs)
        kwargs["device"] = _CPU
        if target.type == "cpu":
            return func(*bare(args), **kwargs)
        result = func(*args, **kwargs)
        return _wrapped(_innermost(result)) if isinstance(result, Tensor) else result

    def _to(self, name: str, x: Tensor, rest: list[Any], kwargs: dict[str, Any]) -> Tensor:
        target = {"cpu": _CPU, "cuda": _GPU}.get(name) or _named_device(kwargs.pop("device", None))
        left: list[Any] = []
        for value in rest:
            if isinstance(value, Tensor):  # x.to(other)
                target, value = value.device, value.dtype
            elif _named_device(value) is not None:
                target = _named_device(value)
                continue
            if isinstance(value, torch.dtype):
                left.append(value)
        kwargs.pop("non_blocking", None)
        if target is not None and target.type != x.device.type:
            if target.type == "cpu":
                self.wait("to the host")
            x = _moved(x).clone()
        return Tensor.to(x, *left, **kwargs) if name == "to" and (left or kwargs) else x


def waits_so_far() -> int:
    """How often the host has waited for the pretended GPU since it came."""
    return len(_Machine.waits)


@contextmanager
def a_gpu() -> Iterator[list[str]]:
    """A process with a GPU of capability 9.0; what the host waited for."""
    from triton.runtime.interpreter import GridExecutor

    engine, grid = torch.autograd._engine_run_backward, GridExecutor.__call__  # type: ignore[attr-defined]

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with _Machine():  # for the hooks
            return engine(*args, **kwargs)

    _Machine.waits = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "_engine_run_backward", run_backward)
        patch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: grid(self, *bare(args), **bare(kwargs)))
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(
            torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(multi_processor_count=132)
        )
        for attribute, value in {
            "device": _device_of,
            "is_cuda": lambda x: _device_of(x).type == "cuda",
            "is_cpu": lambda x: _device_of(x).type == "cpu",
        }.items():
            patch.setattr(torch.Tensor, attribute, property(value))
        patch.setattr("fastgrow.optimizer_state.FakeTensor", OnGpu)  # plain tensors, to those who ask for such
        patch.setattr("fastgrow.riding.Tensor", OnGpu)
        with _Machine():
            yield _Machine.waits


def moved(model: nn.Module) -> nn.Module:
    """The model with every parameter and buffer on the GPU."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(OnGpu(parameter.detach()), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnGpu(buffer)
    return model
