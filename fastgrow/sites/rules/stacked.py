"""Stacks: weights that hold one matrix for each of several members (experts, ensembles), by bmm, matmul and einsum."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ...layout import Layout
from ..graph import LayerCall
from ..nodes import module_of, shape_of, short_name
from ..propagation import Dims, Propagation, rule
from .layers import contract, inside, matrix_product

_CASTS = ("to", "_to_copy", "type_as", "detach", "alias", "contiguous", "clone")
_VIEWS = ("view", "reshape", "unsqueeze", "expand", *_CASTS)


@dataclass(frozen=True)
class _Stack:
    """A parameter of three dimensions as a product reads it: ``order[i]`` is the parameter's i-th dimension read."""

    tensor: str
    order: tuple[int, int, int]


def _stack(p: Propagation, value: Any) -> _Stack | None:
    """The parameter behind a product's operand, through casts and transposes."""
    order = [0, 1, 2]
    while isinstance(value, Node) and value.op == "call_function":
        if len(p.of(value)) != 3:
            return None
        kind, args = short_name(value), value.args
        if kind in ("transpose", "swapaxes", "swapdims"):
            moved = [0, 1, 2]
            first, second = int(args[1]), int(args[2])  # type: ignore[arg-type]
            moved[first], moved[second] = moved[second], moved[first]
        elif kind == "permute":
            moved = [int(dim) % 3 for dim in args[1]]  # type: ignore[union-attr, arg-type]
        elif kind == "mT":
            moved = [0, 2, 1]
        elif kind in _CASTS:
            moved = [0, 1, 2]
        else:
            return None
        order = [moved[dim] for dim in order]
        value = args[0]
    name = p.tensor(value)
    if name is None or len(p.of(value)) != 3 or value.name not in p.trace.parameters:
        return None
    return _Stack(name, (order[0], order[1], order[2]))


def _fits(p: Propagation, stack: _Stack, own: str, x: Any, read: str) -> bool:
    """Whether the weight has several members, and the input a part for each of them, or one for all."""
    members = p.tracker.size(p.tensor_dims[stack.tensor][stack.order[own.index("g")]])
    given = p.tracker.size(p.of(x)[read.index("g")]) if "g" in read else 1
    return members > 1 and given in (1, members)


@rule("matmul", "bmm")
def _matmul(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    left, right = a["self"], a.get("other", a.get("mat2"))
    return _product(p, node, left, right) or matrix_product(p, node, left, right)


def _product(p: Propagation, node: Node, left: Any, right: Any) -> Dims | None:
    """left @ right where one is a stack; None where neither is."""
    for at, weight, x in ((1, right, left), (0, left, right)):
        stack = _stack(p, weight)
        if stack is None or _stack(p, x) is not None or len(p.of(x)) < 2:
            continue
        rank = len(p.of(x))
        batch = string.ascii_uppercase[: max(0, rank - 3)]
        if at == 1:  # x (..., g, b, i) @ weight (g, i, o)
            read, own, out = ("gbi" if rank > 2 else "bi"), "gio", "gbo"
        else:  # weight (g, o, i) @ x (..., g, i, b)
            read, own, out = ("gib" if rank > 2 else "ib"), "goi", "gob"
        if _fits(p, stack, own, x, batch + read):
            return _record(p, node, x, stack, own, batch + read, batch + out, None)
    return None


@rule("baddbmm")
def _baddbmm(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    bias, source = a["self"], a["self"]
    while isinstance(source, Node) and short_name(source) in _VIEWS:
        source = source.args[0]
    stack = _stack(p, a["batch2"])
    if (
        stack is not None
        and p.tensor(source) is not None
        and (a["beta"], a["alpha"]) == (1, 1)
        and _fits(p, stack, "gio", a["batch1"], "gbi")
    ):
        result = _record(p, node, a["batch1"], stack, "gio", "gbi", "gbo", bias)
    else:
        result = contract(p, node, a["batch1"], a["batch2"])
    return p.tracker.broadcast([p.of(bias), result], "it is added to another tensor")


@rule("einsum")
def _einsum(p: Propagation, node: Node, a: dict[str, Any]) -> Any:
    """A product of an activation with a stack; the members' letter, the contracted one and the outputs' are told."""
    operands = list(a["tensors"])
    equation = str(a["equation"]).replace(" ", "")
    read, arrow, out = equation.partition("->")
    letters = read.split(",")
    for at, x in ((1, 0), (0, 1)):
        if len(operands) != 2 or not arrow or "." in equation:
            break
        stack, own, taken = _stack(p, operands[at]), letters[at], letters[x]
        if stack is None or _stack(p, operands[x]) is not None:
            continue
        contracted = [each for each in own if each in taken and each not in out]
        shared = [each for each in own if each in taken and each in out]
        fresh = [each for each in own if each not in taken and each in out]
        if not shared and len(fresh) == 2:  # all members read one input: the outputs' channels stand later
            fresh.sort(key=out.index)
            shared = [fresh.pop(0)]
        plain = len(set(taken)) == len(taken) and set(out) == set(taken + own) - set(contracted)
        if len(contracted) == len(shared) == len(fresh) == 1 and plain:
            named = {contracted[0]: "i", shared[0]: "g", fresh[0]: "o"}
            rest = iter(string.ascii_uppercase)
            named |= {each: next(rest) for each in taken if each not in named}
            own, taken, out = ("".join(named[each] for each in word) for word in (own, taken, out))
            if _fits(p, stack, own, operands[x], taken):
                return _record(p, node, operands[x], stack, own, taken, out, None)
    return p.opaque(node, "einsum mixes or reorders its channels in a way fastgrow does not know")


def _record(
    p: Propagation, node: Node, x: Any, stack: _Stack, own: str, read: str, out: str, bias: Node | None
) -> Dims:
    """One call of a stacked layer. own: the letters of the weight as the op reads it; g: members, i: in, o: out."""
    tracker = p.tracker
    dims = p.tensor_dims[stack.tensor]
    at = {letter: stack.order[place] for place, letter in enumerate(own)}
    inputs: dict[str, Layout] = dict(zip(read, p.of(x), strict=True))
    reason = "its input's channels cannot be followed"
    tracker.unify(inputs["i"], dims[at["i"]], reason)
    group = tracker.resolve(dims[at["g"]])
    if "g" in inputs and tracker.size(inputs["g"]) > 1:
        group = tracker.unify(inputs["g"], group, "another number of members reads it")
    tracker.freeze(group, "it is a stack's number of members")
    results = {**inputs, "g": group, "o": dims[at["o"]]}
    name = p.layer_name(node, stack.tensor)
    p.use(stack.tensor, at["o"], "producer", name)
    p.use(stack.tensor, at["i"], "consumer", name)
    bias_name = None
    if bias is not None and shape_of(bias) == [tracker.size(group), 1, tracker.size(dims[at["o"]])]:
        bias_name = p.tensor(bias)
        p.use(bias_name, 2, "bias", name)
    bare = module_of(node) != name or any(inside(each, name) for each in (x, *node.users))
    call = LayerCall(
        name,
        "stacked",
        node,
        stack.tensor,
        bias_name,
        at["o"],
        at["i"],
        out.index("o"),
        bare,
        None,
        f"{read},oig->{out}",
        x,
    )
    p.layers.append(call)
    return [tracker.resolve(results[letter]) for letter in out]
