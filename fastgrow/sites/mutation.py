"""Writes through views (``mask[:, 0] = 1``) made visible: an exported graph shows them as ops that nobody reads."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..errors import GrowthError

__all__ = ["show_mutations", "writes_first"]

_SCATTERS: dict[str, Callable[..., Any]] = {
    "slice": torch.ops.aten.slice_scatter.default,
    "select": torch.ops.aten.select_scatter.default,
}


def overwritten(base: Tensor, written: Tensor) -> Tensor:
    """Stands for a tensor that was written through a view which has no inverse here; what reads it cannot grow."""
    raise GrowthError(
        "a value between the site's layers was overwritten in place through a view that cannot be replayed; make the "
        "assignment out of place (torch.where, torch.cat)"
    )


def writes_first(node: Node) -> bool:
    """Whether an op writes its first argument in place."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not node.args or not isinstance(node.args[0], Node):
        return False
    first = target._schema.arguments[0].alias_info if target._schema.arguments else None
    return first is not None and first.is_write


def _viewed(node: Node) -> Node | None:
    """The tensor that this node is a view of."""
    target = node.target
    if target is operator.getitem:
        return _viewed(node.args[0])  # type: ignore[arg-type]
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or not node.args:
        return None
    first = target._schema.arguments[0].alias_info
    is_view = target.is_view or (first is not None and not first.is_write)
    return node.args[0] if is_view and isinstance(node.args[0], Node) else None


def show_mutations(module: GraphModule) -> None:
    """Let every later reader of a tensor that was written through a view read a node that says so."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or not writes_first(node):
            continue
        view, written = node.args[0], node
        if _viewed(view) is None:
            continue
        after = _later(node)
        while (base := _viewed(view)) is not None:
            readers = [user for user in base.users if user in after]
            kind = view.target._schema.name.rpartition("::")[2] if view.target is not operator.getitem else ""
            with graph.inserting_after(written):
                if kind in _SCATTERS:
                    shown = graph.call_function(_SCATTERS[kind], (base, written, *view.args[1:]), dict(view.kwargs))
                else:
                    shown = graph.call_function(overwritten, (base, written))
            shown.meta = {**base.meta, "nn_module_stack": node.meta.get("nn_module_stack")}
            for reader in readers:
                reader.replace_input_with(base, shown)
            after.discard(shown)
            view, written = base, shown


def _later(node: Node) -> set[Node]:
    found: set[Node] = set()
    current = node.next
    while current.op != "root":
        found.add(current)
        current = current.next
    return found
