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
        operands = _operands(kind, args, kwargs)
        for at, operand in enumerate(operands):
            # a stack of matrices may stand on the left, a weight of two dimensions is read from the right
            if operand.dim() < (2 if at else 3):
                continue
            layer = by_weight.get(id(operand)) or by_weight.get(id(operand._base))
            if layer is not None and len(operands) > 1:
                self._saw(layer, layer in self._producers, layer in self._consumers, operands[not at], result)
        return result


def _operands(kind: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that are multiplied, what the layer reads first where the order is fixed; a bias may follow."""
    values = list(args)
    if kind == "einsum":
        values = [each for value in args[1:] for each in (value if isinstance(value, (list, tuple)) else [value])]
    elif kind in _BIAS_FIRST:
        names = ("batch1", "batch2") if kind == "baddbmm" else ("mat1", "mat2")
        given = [kwargs[name] for name in names if name in kwargs]
        values = [*values[1:], *given]
    else:
        first = [kwargs["input"]] if "input" in kwargs else []
        values = [*first, *values, *(value for name, value in kwargs.items() if name != "input")]
    return [value for value in values if isinstance(value, Tensor)]


_BIAS_FIRST = frozenset(("addmm", "baddbmm"))
_WEIGHTED = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d embedding addmm mm matmul "
    "__matmul__ bmm baddbmm einsum".split()
)
