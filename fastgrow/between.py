"""Where a new layer can stand in a model as it is written: behind a module, before one, or beside one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from .errors import GrowthError
from .insertions import LayerSpec, Way
from .names import find_module
from .sites import Followed, LayerCall
from .sites.discover import ACTIVATIONS
from .sites.nodes import bind, module_of, plain_name, shape_of

__all__ = ["Spot", "activation_of", "find_spot", "keeps"]

_NORMS = frozenset(("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"))
_SAME = frozenset("contiguous clone alias detach to view reshape flatten _unsafe_view unsqueeze squeeze".split())
# What leaves a tensor without negative entries one without.
_MONOTONE = frozenset(
    [
        *("dropout", "feature_dropout", "permute", "transpose"),
        *(f"{kind}_pool{dims}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for dims in (1, 2, 3)),
        "mean",
    ]
)


@dataclass(frozen=True)
class Spot:
    """A place for a new layer.

    place: the module that makes room. source: the layer that writes what the new one reads. shape: of what it
    reads. dims: spatial dimensions of a convolution; None: linear. activation: the op whose values it reads, if
    they are such an op's. reader: the layer at `place`, for a branch beside it.
    """

    place: str
    way: Way
    source: LayerCall
    shape: tuple[int, ...]
    dims: int | None
    activation: Node | None
    norm: str | None
    reader: LayerCall | None = None

    @property
    def channels(self) -> int:
        return self.shape[-1] if self.dims is None else self.shape[1]


def find_spot(model: nn.Module, graph: Followed, after: str, before: str | None, beside: bool) -> Spot:
    """The place of a new layer after a module, and before a layer where one is named.

    Behind the activation, norm or layer that ends the run where it is a module of its own that is called once;
    before the one layer that reads the run otherwise. beside: a branch past that layer.
    """
    return _Search(model, graph, after).spot(before, beside)


class _Search:
    def __init__(self, model: nn.Module, graph: Followed, after: str) -> None:
        self.model, self.graph, self.after = model, graph, after
        self.calls = {call.node: call for call in graph.calls if call.kind != "embedding"}
        self.nodes = [node for node in graph.trace.nodes if node.op == "call_function"]
        self.owner = {node: find_module(model, module_of(node)) for node in self.nodes}

    def spot(self, before: str | None, beside: bool) -> Spot:
        source, end = self._source()
        self._refuse_stack(self.calls.get(end))
        run = self._run(end) if end in self.calls else [end]
        last = run[-1]
        norms = [node for node in run if plain_name(node) in _NORMS]
        norm = module_of(norms[0]) if norms else None
        if not beside and before is None:
            place = self._alone(last) if last is not end else self.after
            if place is not None:
                return Spot(place, "behind", source, *self._form(source, last), self._known(last), norm)
        reader, path = self._reader(last, before, beside)
        self._refuse_stack(reader)
        module = find_module(self.model, reader.name)
        if module is None:
            raise self._error(f"its reader {reader.name!r} is a function call, not a module; make it one")
        if sum(self._is(call, module) for call in self.calls.values()) != 1:
            raise self._error(f"its reader {reader.name!r} is called several times; give each call a module of its own")
        source_node = path[-1]
        dims = len(self.graph.tensor_dims[reader.weight]) - 2 if reader.kind != "linear" else None
        known = self._known(last, path)
        way: Way = "beside" if beside else "before"
        return Spot(reader.name, way, source, tuple(shape_of(source_node)), dims, known, norm, reader)

    def _is(self, call: LayerCall, module: nn.Module) -> bool:
        return find_module(self.model, call.name) is module

    def _error(self, what: str) -> GrowthError:
        return GrowthError(f"insert_layer: no layer can be put after {self.after!r}: {what}")

    def _refuse_stack(self, call: LayerCall | None) -> None:
        if call is not None and call.kind == "stacked":
            raise self._error(
                f"{call.name!r} holds a matrix for each of several members, and the new layer would be one for all of "
                "them; put a stack of its own into the model"
            )

    def _source(self) -> tuple[LayerCall, Node]:
        """The last layer in the module named, and the node whose value the module returns."""
        module = find_module(self.model, self.after)
        own = [call for call in self.calls.values() if call.name == self.after or (module and self._is(call, module))]
        if own:
            if len(own) > 1:
                raise self._error("it is called several times; give each call a module of its own")
            return own[0], own[0].node
        if module is None or self.after == "":
            known = ", ".join(call.name for call in self.calls.values())
            raise self._error(f"the model has no such module; its layers are {known}")
        inside = {node for node in self.nodes if self._within(node, module)}
        writers = [call for node, call in self.calls.items() if node in inside]
        ends = [node for node in inside if any(user not in inside for user in _readers(node))]
        if len(ends) != 1:
            seen = "the example inputs do not reach it" if not inside else f"{len(ends)} tensors leave it"
            raise self._error(f"{seen}, wanted a module that is called once and returns one tensor")
        before = [call for node, call in self.calls.items() if self.nodes.index(node) < self.nodes.index(ends[0])]
        if not (writers or before):
            raise self._error("no layer with weights lies in it or before it")
        return (writers or before)[-1], ends[0]

    def _within(self, node: Node, module: nn.Module) -> bool:
        stack = node.meta.get("nn_module_stack") or {}
        return any(find_module(self.model, name) is module for name, _ in stack.values())

    def _run(self, end: Node) -> list[Node]:
        """The layer, the norm behind it, the activation behind that: as far as nothing else reads in between."""
        run, wanted = [end], [_NORMS, ACTIVATIONS]
        for node in _chain(end):
            kind = plain_name(node)
            while wanted and kind not in wanted[0] and kind not in _SAME | {"dropout"}:
                wanted.pop(0)
            if not wanted:
                break
            if kind in wanted[0]:
                run.append(node)
                wanted.pop(0)
        return run

    def _alone(self, node: Node) -> str | None:
        """The name of the module that does this op and nothing else, once."""
        module, name = self.owner[node], module_of(node)
        whole = module is None or module is self.model or bool(module._modules)
        return None if whole or sum(other is module for other in self.owner.values()) != 1 else name

    def _reader(self, last: Node, before: str | None, beside: bool) -> tuple[LayerCall, list[Node]]:
        """The layer that reads a node's value, and the nodes from there to what it reads."""
        paths: dict[Node, list[Node]] = {last: [last]}
        found: dict[str, tuple[LayerCall, list[Node]]] = {}
        waiting = [last]
        while waiting:
            node = waiting.pop(0)
            for user in _readers(node):
                call = self.calls.get(user)
                if call is not None:
                    found.setdefault(call.name, (call, paths[node]))
                elif user.op == "call_function" and user not in paths:
                    paths[user] = [*paths[node], user]
                    waiting.append(user)
        if before is None:
            if not found:
                raise self._error("no layer with weights reads it")
            (call, path), names = next(iter(found.values())), ", ".join(map(repr, found))
            if len(found) == 1 and (beside or all(len(_readers(node)) == 1 for node in path)):
                return call, path
            if beside:
                raise self._error(f"several layers read it ({names}): name the one to put units beside with before=")
            raise self._error(
                f"what ends its run is no module of its own, and not {names} alone reads it: name a layer with before= "
                "to stand on the way to that one, or make the activation a module"
            )
        module = find_module(self.model, before)
        for call, path in found.values():
            if call.name == before or (module is not None and self._is(call, module)):
                return call, path
        raise self._error(
            f"{before!r} is no layer that reads it without another between; those are "
            f"{', '.join(map(repr, found)) or 'none'}"
        )

    def _form(self, source: LayerCall, node: Node) -> tuple[tuple[int, ...], int | None]:
        shape = tuple(shape_of(node))
        rank = len(self.graph.tensor_dims[source.weight])
        return shape, rank - 2 if source.kind not in ("linear", "stacked") and len(shape) == rank else None

    def _known(self, last: Node, path: Sequence[Node] = ()) -> Node | None:
        """The activation whose values are read: the last node, if only what keeps its range lies between."""
        kind = plain_name(last)
        keeps = _SAME | _MONOTONE if kind == "relu" else _SAME
        return last if kind in ACTIVATIONS and all(plain_name(node) in keeps for node in path[1:]) else None


def _readers(node: Node) -> list[Node]:
    return [user for user in node.users if plain_name(user) != "_assert_tensor_metadata"]


def _chain(node: Node) -> list[Node]:
    """The nodes behind one, as long as each is the only reader of the one before."""
    chain: list[Node] = []
    while len(users := _readers(node)) == 1 and users[0].op == "call_function":
        node = users[0]
        chain.append(node)
    return chain


def activation_of(node: Node) -> LayerSpec | None:
    """The module that does what an activation's node does; None where it has weights, or torch has no such module."""
    bound = bind(node)
    kinds: dict[str, tuple[str, tuple[str, ...]]] = {
        "relu": ("ReLU", ()),
        "relu6": ("ReLU6", ()),
        "gelu": ("GELU", ("approximate",)),
        "silu": ("SiLU", ()),
        "tanh": ("Tanh", ()),
        "sigmoid": ("Sigmoid", ()),
        "mish": ("Mish", ()),
        "hardswish": ("Hardswish", ()),
        "hardsigmoid": ("Hardsigmoid", ()),
        "hardtanh": ("Hardtanh", ("min_val", "max_val")),
        "leaky_relu": ("LeakyReLU", ("negative_slope",)),
        "elu": ("ELU", ("alpha",)),
        "selu": ("SELU", ()),
        "celu": ("CELU", ("alpha",)),
        "softplus": ("Softplus", ("beta", "threshold")),
        "log_sigmoid": ("LogSigmoid", ()),
        "softsign": ("Softsign", ()),
    }
    kind = plain_name(node)
    if kind not in kinds:
        return None
    name, arguments = kinds[kind]
    if name == "Hardtanh" and (bound["min_val"], bound["max_val"]) == (0, 6):
        return LayerSpec("ReLU6")
    return LayerSpec(name, {argument: bound[argument] for argument in arguments})


def keeps(new: nn.Module, known: nn.Module | None) -> bool:
    """Whether f(g(t)) = g(t), exactly, for a new activation f behind a known one g (None: behind anything)."""
    grid = torch.cat(
        [torch.linspace(-30, 30, 6001, device="cpu"), torch.tensor([0.0, 1e-6, -1e-6, 1e4, -1e4], device="cpu")]
    )
    with torch.no_grad():
        values: Tensor = grid if known is None else known(grid)
        return torch.equal(new(values), values)
