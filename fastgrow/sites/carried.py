"""A graph as plain data, which pickles: its nodes one by one, each with its arguments, its modules and its shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from ..errors import GrowthError

__all__ = ["Place", "Record", "node_at", "pack", "place_of", "unpack"]


@dataclass(frozen=True, slots=True)
class Place:
    """Stands for a node: its position in the graph."""

    position: int


@dataclass(frozen=True, slots=True)
class _Op:
    """Stands for an operator of torch: "aten", "conv2d", "default"; a higher-order one has no overload."""

    namespace: str
    name: str
    overload: str


@dataclass(frozen=True, slots=True)
class _Shape:
    """Stands for a tensor of no values."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Record:
    """One node; nodes among its arguments are `Place`s."""

    name: str
    op: str
    target: Any
    args: Any
    kwargs: Any
    value: Any
    modules: tuple[tuple[str, str, str], ...]  # its call stack: key, the module's name, its class


def place_of(nodes: Sequence[Node]) -> dict[Node, Place]:
    return {node: Place(position) for position, node in enumerate(nodes)}


def node_at(value: Any, nodes: Sequence[Node]) -> Any:
    """The node that a `Place` stands for; any other value as it is."""
    return nodes[value.position] if isinstance(value, Place) else value


def pack(graph: Graph) -> tuple[Record, ...]:
    """What of a graph is read after its sites are found."""
    places = place_of(list(graph.nodes))
    once: dict[Any, Any] = {}  # what is said of many nodes is one object, which pickles once

    def placed(value: Any) -> Any:
        return places[value] if isinstance(value, Node) else value

    return tuple(
        Record(
            node.name,
            node.op,
            _packed_target(node.target),
            map_aggregate(node.args, placed),
            map_aggregate(node.kwargs, placed),
            _packed_value(node.meta.get("val")),
            tuple(
                once.setdefault(entry, entry)
                for key, (name, kind) in (node.meta.get("nn_module_stack") or {}).items()
                for entry in [(key, name, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}")]
            ),
        )
        for node in places
    )


def unpack(records: Sequence[Record]) -> Graph:
    """The graph again. Raises `GrowthError` where an operator is not known in this process."""
    graph = Graph()
    nodes: list[Node] = []
    for record in records:
        args, kwargs = (map_aggregate(of, lambda value: node_at(value, nodes)) for of in (record.args, record.kwargs))
        node = graph.create_node(record.op, _target(record.target), args, kwargs)
        node.name = record.name
        node.meta = {
            "val": _value(record.value),
            "nn_module_stack": {key: (name, kind) for key, name, kind in record.modules},
        }
        nodes.append(node)
    return graph


def _packed_target(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return _Op(namespace, name, target._overloadname)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return _Op("higher_order", target.name(), "")
    return target


def _target(target: Any) -> Any:
    if not isinstance(target, _Op):
        return target
    try:
        found = getattr(getattr(torch.ops, target.namespace), target.name)
        return getattr(found, target.overload) if target.overload else found
    except AttributeError as error:
        raise GrowthError(
            f"these sites are of a model that calls the operator {target.namespace}::{target.name}, which this process "
            "does not know; import what defines it before they are unpickled, or find the sites again"
        ) from error


def _packed_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Shape(tuple(int(extent) for extent in value.shape), value.dtype)
    if isinstance(value, (tuple, list)):
        return type(value)(map(_packed_value, value))
    return value if isinstance(value, (bool, int, float)) else None


def _value(value: Any) -> Any:
    if isinstance(value, _Shape):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return type(value)(map(_value, value)) if isinstance(value, (tuple, list)) else value
