"""What no module's hook sees: layers that are function calls, and the bags of a flat text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .errors import GrowthError

__all__ = ["FlatTexts", "FunctionalLayers"]


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


class FlatTexts(TorchFunctionMode):
    """Sees what `nn.EmbeddingBag` is given as one row of indices with offsets: a row is no sample, a bag is.

    rows: of the model's first argument, which is one-dimensional.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows
        self._calls: list[tuple[int, int, int]] = []  # indices, offsets, bags

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.embedding_bag or func is torch.embedding_bag:
            name, at = ("input", 0) if func is F.embedding_bag else ("indices", 1)  # torch's own takes the weight first
            indices = kwargs.get(name, args[at] if len(args) > at else None)
            offsets = kwargs.get("offsets", args[2] if len(args) > 2 else None)
            bags = result if isinstance(result, Tensor) else result[0]
            if isinstance(indices, Tensor) and indices.dim() == 1 and isinstance(offsets, Tensor):
                self._calls.append((len(indices), len(offsets), len(bags)))
        return result

    @property
    def samples(self) -> int | None:
        """The bags, where the argument's rows are those of a flat text or of its offsets; None where they are samples.

        raises: GrowthError where neither can be told.
        """
        found = {bags for indices, offsets, bags in self._calls if self._rows in (indices, offsets)}
        if len(found) == 1:
            return found.pop()
        if not found and all(bags % max(self._rows, 1) == 0 for *_, bags in self._calls):
            return None  # as many bags for every row
        shown = "; ".join(f"{indices} indices in {bags} bags" for indices, _, bags in self._calls)
        raise GrowthError(
            f"the batch size cannot be told: the model's first argument has {self._rows} rows, nn.EmbeddingBag was "
            f"called with {shown}; let the forward pass take first a tensor whose rows are the samples"
        )
