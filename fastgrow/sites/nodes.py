"""Reading a node of the exported graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

__all__ = ["activation_module", "bind", "conv_padding", "is_rms", "module_of", "plain_name", "shape_of", "short_name"]


def short_name(node: Node) -> str:
    """``aten.conv2d.default`` -> ``conv2d``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    return getattr(target, "__name__", str(target))


def plain_name(node: Node) -> str:
    """``aten.relu_.default`` -> ``relu``: the op's name out of place."""
    name = short_name(node)
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def bind(node: Node) -> dict[str, Any]:
    """The call's arguments by name, defaults filled in."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return {}
    bound: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def conv_padding(
    padding: int | str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """What a convolution pads before and after, in each spatial dimension, with "same" and "valid" in numbers."""
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        return [(each // 2, each - each // 2) for each in total]
    values = [padding] if isinstance(padding, int) else list(padding)
    return [(int(p), int(p)) for p in (values * len(kernel) if len(values) == 1 else values)]


def shape_of(node: Node) -> list[int]:
    return [int(extent) for extent in node.meta["val"].shape]


def module_of(node: Node) -> str:
    """The name of the innermost module whose forward pass made this call ("" for the model itself)."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


_ACTIVATIONS = ("torch.nn.modules.activation.", "fastgrow.nn.", "fastgrow.riding.")


def activation_module(node: Node) -> str | None:
    """The name of an activation's module; None where nothing can be put in its place: a function call in somebody's
    forward, or a Hardtanh that is flat at 0."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return None
    name, kind = stack[-1]
    kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    if kind.endswith(".Hardtanh") and bind(node)["min_val"] == 0:
        return None
    return name if kind.startswith(_ACTIVATIONS) else None


def is_rms(node: Node) -> bool:
    """mean(x ** 2) of an RMSNorm written out (Llama's, T5's): it is read by ``+ eps`` and ``rsqrt`` alone."""
    if short_name(node) != "mean":
        return False
    source = node.args[0]
    squared = isinstance(source, Node) and (
        (short_name(source) == "pow" and source.args[1] == 2)
        or short_name(source) == "square"
        or (short_name(source) == "mul" and source.args[0] is source.args[1])
    )
    followers = list(node.users)
    while len(followers) == 1 and short_name(followers[0]) == "add":
        followers = list(followers[0].users)
    return squared and len(followers) == 1 and short_name(followers[0]) in ("rsqrt", "sqrt", "pow")
