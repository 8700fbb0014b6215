"""Layers that are function calls: ``F.linear(x, self.weight)`` has no module to hook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["FunctionalLayers"]


class FunctionalLayers(TorchFunctionMode):
    """Sees F.linear, F.conv2d, ... with weights that no layer module owns."""

    def __init__(
        self,
        places: Mapping[str, tuple[nn.Module, str]],
        producers: set[str],
        consumers: set[str],
        saw: Callable[..., None],
    ) -> None:
        super().__init__()
        self._places = places
        self._producers = producers
        self._consumers = consumers
        self._saw = saw

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        kind = getattr(func, "__name__", "")
        if kind not in _WEIGHTED or not isinstance(result, Tensor):
            return result
        # Looked up anew: FSDP puts full parameters in the places of sharded ones for the call.
        by_weight = {id(getattr(module, leaf)): name for name, (module, leaf) in self._places.items()}
        name, at = ("mat1", 1) if kind == "addmm" else ("input", 0)  # addmm takes the bias first
        x = kwargs.get(name, args[at] if len(args) > at else None)
        for operand in (*args[at + 1 :], *kwargs.values()):
            if not isinstance(operand, Tensor) or operand is x or operand.dim() < 2:
                continue
            layer = by_weight.get(id(operand)) or by_weight.get(id(operand._base))
            if layer is not None and isinstance(x, Tensor):
                self._saw(layer, layer in self._producers, layer in self._consumers, x, result)
        return result


_WEIGHTED = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d embedding addmm mm matmul "
    "__matmul__".split()
)
