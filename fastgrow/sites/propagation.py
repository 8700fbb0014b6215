"""One walk over the exported graph that follows every dimension of every tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..layout import Concat, Layout
from .graph import Followed, LayerCall, Trace
from .nodes import bind, module_of, plain_name, short_name
from .tracker import ONE, Tracker

__all__ = ["POINTWISE", "Dims", "NormCall", "Propagation", "Use", "rule"]

Dims = list[Layout]
Rule = Callable[["Propagation", Node, dict[str, Any]], Any]

POINTWISE = "any pointwise op"
"""The name of the rule for ops that torch tags as pointwise."""

_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register what these ATen ops (or one of the classes above) say about dimensions."""

    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name] = function
        return function

    return register


@dataclass(frozen=True)
class Use:
    """A dimension of a parameter or buffer, and what it is there for."""

    tensor: str
    dim: int
    role: str
    layer: str


@dataclass(frozen=True)
class NormCall:
    """One call of a normalisation that mixes channels."""

    name: str
    kind: str  # "layer_norm", "group_norm", "rms_norm"
    node: Node
    mixed: Layout


@dataclass
class Propagation:
    """One walk over the graph, forward; afterwards every tensor's dimensions are known."""

    trace: Trace
    tracker: Tracker = field(default_factory=Tracker)
    dims: dict[Node, Any] = field(default_factory=dict)
    tensor_dims: dict[str, Dims] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    layers: list[LayerCall] = field(default_factory=list)
    norms: list[NormCall] = field(default_factory=list)

    def run(self) -> Propagation:
        for node in self.trace.nodes:
            if node.op == "placeholder":
                self.dims[node] = self._placeholder(node)
            elif node.op == "output":
                for value in node.all_input_nodes:
                    for dim in self._flat(self.dims.get(value)):
                        self.tracker.freeze(dim, "its output is the model's output")
            elif node.op == "call_function":
                self.dims[node] = self._call(node)
        return self

    def followed(self) -> Followed:
        """The result: all layouts resolved."""
        tensor_dims = {name: tuple(dims) for name, dims in self.tensor_dims.items()}
        return Followed(self.trace, self.dims, tensor_dims, tuple(self.layers)).with_layouts(self.tracker.resolve)

    def of(self, value: Any) -> Dims:
        return self.dims[value] if isinstance(value, Node) else []

    def tensor(self, value: Any) -> str | None:
        """The state-dict name of a parameter or buffer used directly, or through a cast or detach."""
        seen = value
        while isinstance(seen, Node) and seen.op == "call_function" and short_name(seen) in _TRANSPARENT_CASTS:
            seen = seen.args[0]
        return self.trace.tensors.get(seen.name) if isinstance(seen, Node) else None

    def slice_of(self, value: Any, dim: int) -> tuple[str, Layout, Layout] | None:
        """(tensor, the part before, its own) where a value is one piece of a parameter that was cut along ``dim``."""
        if not isinstance(value, Node) or value.target is not operator.getitem:
            return None
        source, index = value.args
        name = self.tensor(source.args[0]) if short_name(source) in _CUTS else None  # type: ignore[union-attr, arg-type]
        if name is None or bind(source)["dim"] % len(self.of(value)) != dim:  # type: ignore[arg-type]
            return None
        pieces = [piece[dim] for piece in self.dims[source]]  # type: ignore[index]
        return name, Concat(tuple(pieces[:index])), pieces[index]  # type: ignore[index]

    def layer_name(self, node: Node, tensor: str) -> str:
        """The called module if it is a layer of its own, else the weight's own name."""
        module = module_of(node)
        owner, _, leaf = tensor.rpartition(".")
        stack = node.meta.get("nn_module_stack") or {}
        kind = str(list(stack.values())[-1][1]).rpartition(".")[2] if stack else ""
        if leaf == "weight" and module == owner and owner:
            return module
        if leaf == "weight" and kind in _LAYER_CLASSES:  # a tied weight seen through its other owner
            return module
        return owner if leaf == "weight" and owner else tensor

    def use(self, tensor: str | None, dim: int, role: str, layer: str) -> None:
        if tensor is not None:
            self.uses.append(Use(tensor, dim, role, layer))

    def fresh(self, shape: Sequence[int], reason: str) -> Dims:
        return [ONE if extent == 1 else self.tracker.axis(int(extent), reason) for extent in shape]

    def _placeholder(self, node: Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return []
        name = self.trace.tensors.get(node.name)
        if name is None:
            reason = "it is a dimension of the model's input"
            if node.name not in self.trace.inputs:
                reason = "its size is written into the code"
            return self.fresh(value.shape, reason)
        if name not in self.tensor_dims:
            self.tensor_dims[name] = [self.tracker.axis(int(extent)) for extent in value.shape]
        return self.tensor_dims[name]

    def _call(self, node: Node) -> Any:
        if node.target is operator.getitem:
            source, index = node.args
            return self.dims[source][index]  # type: ignore[index]
        short = short_name(node)
        handler = _RULES.get(short) or _RULES.get(plain_name(node))
        if handler is not None:
            return handler(self, node, bind(node))
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
            return _RULES[POINTWISE](self, node, bind(node))
        return self.opaque(node, f"{short} mixes or reorders its channels in a way fastgrow does not know")

    def opaque(self, node: Node, reason: str) -> Any:
        """An op without a rule: nothing it reads or writes may change size."""
        for value in node.all_input_nodes:
            for dim in self._flat(self.dims.get(value)):
                self.tracker.freeze(dim, reason)
        return self.outputs(node, reason)

    def outputs(self, node: Node, reason: str) -> Any:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return self.fresh(value.shape, reason)
        if isinstance(value, (tuple, list)):
            return [self.fresh(item.shape, reason) if isinstance(item, Tensor) else [] for item in value]
        return []

    def _flat(self, dims: Any) -> Dims:
        if not dims:
            return []
        return [dim for part in dims for dim in part] if isinstance(dims[0], list) else list(dims)


_TRANSPARENT_CASTS = {"to", "detach", "alias", "contiguous", "clone", "_to_copy", "type_as"}
_CUTS = {"chunk", "split", "split_with_sizes", "tensor_split"}
_LAYER_CLASSES = {
    "Linear",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Conv1D",
    "Embedding",
    "NonDynamicallyQuantizableLinear",
}
