"""Ops with weights, and products of activations: linear, convolutions, embedding, attention."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ...layout import Layout, Product
from ..graph import LayerCall
from ..nodes import module_of, shape_of, short_name
from ..propagation import Dims, Propagation, rule

__all__ = ["contract", "inside", "matrix_product"]


def _record_layer(p: Propagation, node: Node, kind: str, weight: Any, bias: Any, out_dim: int, channel: int) -> None:
    name, bias_name, part = p.tensor(weight), p.tensor(bias), None
    if name is None:
        cut, bias_cut = p.slice_of(weight, out_dim), p.slice_of(bias, 0)
        if cut is None or (bias is not None and (bias_cut is None or not _same_place(p, cut, bias_cut))):
            for dim in p.of(weight):
                p.tracker.freeze(dim, "it is a dimension of a weight that is computed from other tensors")
            return
        name, part = cut[0], cut[1:]
        bias_name = None if bias_cut is None else bias_cut[0]
    layer = p.layer_name(node, name)
    p.use(name, out_dim, "producer", layer)
    p.use(name, 1 - out_dim, "consumer", layer)
    p.use(bias_name, 0, "bias", layer)
    bare = _is_bare(node, layer)
    p.layers.append(LayerCall(layer, kind, node, name, bias_name, out_dim, 1 - out_dim, channel, bare, part))


def _same_place(p: Propagation, cut: tuple[str, Layout, Layout], other: tuple[str, Layout, Layout]) -> bool:
    """Whether two slices start and end at the same positions."""
    return all(p.tracker.size(mine) == p.tracker.size(its) for mine, its in zip(cut[1:], other[1:], strict=True))


_WRAPPING = {"view", "to", "_to_copy", "contiguous", "_assert_tensor_metadata"}


def _is_bare(node: Node, layer: str) -> bool:
    """Whether the layer's module, if there is one, does more than this op: what it takes and gives is not the op's.

    Views and casts around the op do not count (Hugging Face's Conv1D).
    """
    if module_of(node) != layer:
        return True
    source: Any = node.args[1 if short_name(node) == "addmm" else 0]
    while inside(source, layer) and short_name(source) in _WRAPPING:
        source = source.args[0]
    readers, waiting = [], list(node.users)
    while waiting:
        reader = waiting.pop()
        if inside(reader, layer) and short_name(reader) in _WRAPPING:
            waiting += reader.users
        else:
            readers.append(reader)
    return any(inside(at, layer) for at in (source, *readers))


def inside(node: Any, layer: str) -> bool:
    """Whether a node is an op of the layer's own module."""
    return isinstance(node, Node) and node.op == "call_function" and module_of(node) == layer


def _matmul_weight(p: Propagation, node: Node, x: Any, weight: Any, bias: Any, out_dim: int) -> Dims:
    """x (..., in) times a weight whose ``out_dim`` is its output dimension."""
    weight_dims, dims = p.of(weight), p.of(x)
    reason = "its input's channels cannot be followed"
    p.tracker.unify(dims[-1], weight_dims[1 - out_dim], reason)
    if isinstance(bias, Node):
        bias_dims = p.of(bias)
        p.tracker.unify(bias_dims[-1], weight_dims[out_dim], reason)
    _record_layer(p, node, "linear", weight, bias, out_dim, -1)
    return [*dims[:-1], weight_dims[out_dim]]


@rule("linear")
def _linear(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    weight, columns = _weight_of(p, a["weight"])  # of F.linear(x, layer.weight.t()) the tensor itself
    if weight is None:
        return _matmul_weight(p, node, a["input"], a["weight"], a["bias"], out_dim=0)
    return _matmul_weight(p, node, a["input"], weight, a["bias"], out_dim=1 - columns)


def _weight_of(p: Propagation, value: Any) -> tuple[Node | None, int]:
    """The weight behind a matrix operand, and which of its dimensions the product's columns are."""
    if isinstance(value, Node) and short_name(value) in ("t", "transpose", "permute", "numpy_T"):
        source = value.args[0]
        if isinstance(source, Node) and p.tensor(source) is not None and len(p.of(source)) == 2:
            return source, 0
    if isinstance(value, Node) and p.tensor(value) is not None and len(p.of(value)) == 2:
        return value, 1
    return None, 0


@rule("addmm")
def _addmm(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    weight, out_dim = _weight_of(p, a["mat2"])
    if weight is not None:
        return _matmul_weight(p, node, a["mat1"], weight, a["self"], out_dim)
    result = contract(p, node, a["mat1"], a["mat2"])
    return p.tracker.broadcast([p.of(a["self"]), result], "it is added to another tensor")


@rule("mm")
def _mm(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    return matrix_product(p, node, a["self"], a["mat2"])


def matrix_product(p: Propagation, node: Node, left: Any, right: Any) -> Dims:
    """left (..., n, k) times right (k, m) or (..., k, m), which may be a weight of two dimensions."""
    weight, out_dim = _weight_of(p, right)
    if weight is not None:
        return _matmul_weight(p, node, left, weight, None, out_dim)
    return contract(p, node, left, right)


def contract(p: Propagation, node: Node, left: Any, right: Any) -> Dims:
    """A product of two activations: the contracted dimension is one axis (attention by hand)."""
    first, second = p.of(left), p.of(right)
    if len(first) < 2 or len(second) < 2:
        return p.opaque(node, "it is contracted with a vector")
    p.tracker.unify(first[-1], second[-2], "two tensors are multiplied along it")
    batch = p.tracker.broadcast([first[:-2], second[:-2]], "two tensors are multiplied along it")
    for dim in batch[1:]:
        p.tracker.mark_heads(dim)
        p.tracker.freeze(second[-1], "it is a head's size, or a sequence")
    p.tracker.freeze(first[-1], "two activations are contracted along it (the attention's scale depends on its size)")
    return [*batch, first[-2], second[-1]]


@rule("conv1d", "conv2d", "conv3d")
def _conv(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    return _any_conv(p, node, a, transposed=False)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    return _any_conv(p, node, a, transposed=True)


def _any_conv(p: Propagation, node: Node, a: dict[str, Any], *, transposed: bool) -> Dims:
    x, weight, groups = p.of(a["input"]), p.of(a["weight"]), int(a["groups"])
    shape = shape_of(node)
    spatial = len(weight) - 2
    channel = len(x) - spatial - 1
    out_dim = 1 if transposed else 0
    reason = "its input's channels cannot be followed"
    for dim in weight[2:]:
        p.tracker.freeze(dim, "it is a kernel's extent")
    for dim in x[channel + 1 :]:
        p.tracker.freeze(dim, "it is a spatial dimension")
    outer = p.fresh(shape[channel + 1 :], "it is a spatial dimension")
    name = p.tensor(a["weight"])
    in_channels = p.tracker.size(x[channel])
    out = weight[out_dim]
    if groups == 1:
        p.tracker.unify(x[channel], weight[1 - out_dim], reason)
        _record_layer(p, node, "conv_transpose" if transposed else "conv", a["weight"], a["bias"], out_dim, channel)
    elif groups == in_channels and not transposed:
        # depthwise: one filter (or several) a channel; the weight's rows follow the input's channels
        multiplier = shape[channel] // groups
        inner = p.tracker.axis(multiplier, "it is a depthwise convolution's multiplier")
        follows = Product((x[channel], inner)) if multiplier > 1 else x[channel]
        p.tracker.unify(follows, out, reason)
        layer = p.layer_name(node, name) if name else ""
        p.use(name, 0, "middle", layer)
        p.use(p.tensor(a["bias"]), 0, "middle_bias", layer)
        if name is not None:
            bias = p.tensor(a["bias"])
            p.layers.append(LayerCall(layer, "depthwise", node, name, bias, 0, 1, channel, _is_bare(node, layer)))
        else:
            p.tracker.freeze(out, "it is a dimension of a weight that is computed from other tensors")
        out = p.tracker.resolve(out)
    else:
        group = p.tracker.axis(groups, "the number of groups is fixed")
        inputs = p.tracker.axis(in_channels // groups)
        p.tracker.unify(x[channel], Product((group, inputs)), reason)
        if transposed:  # weight (in, out / groups): rows follow all inputs, columns one group's outputs
            p.tracker.unify(weight[0], x[channel], reason)
            out = Product((group, weight[1]))
        else:
            p.tracker.unify(weight[1], inputs, reason)
            p.tracker.unify(out, Product((group, p.tracker.axis(shape[channel] // groups))), reason)
        _record_layer(p, node, "grouped", a["weight"], a["bias"], out_dim, channel)
    if isinstance(a["bias"], Node):
        p.tracker.unify(p.of(a["bias"])[0], out, reason)
    return [*x[:channel], p.tracker.resolve(out), *outer]


@rule("embedding")
def _embedding(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    weight = p.of(a["weight"])
    name = p.tensor(a["weight"])
    if name is not None:
        layer = p.layer_name(node, name)
        p.use(name, 1, "producer", layer)
        bare = module_of(node) != layer or any(inside(user, layer) for user in node.users)
        p.layers.append(LayerCall(layer, "embedding", node, name, None, 1, 0, -1, bare))
    else:
        p.tracker.freeze(weight[1], "it is a dimension of a weight that is computed from other tensors")
    p.tracker.freeze(weight[0], "it is a vocabulary")
    return [*p.of(a["indices"]), weight[1]]


@rule("scaled_dot_product_attention")
def _attention(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    query, key, value = p.of(a["query"]), p.of(a["key"]), p.of(a["value"])
    p.tracker.unify(query[-1], key[-1], "query and key are contracted along it")
    p.tracker.freeze(query[-1], "it is a head's size, which sets the attention's scale")
    p.tracker.freeze(value[-1], "it is a head's size, which sets the attention's scale")
    for dims in (query, key, value):
        p.tracker.freeze(dims[-2], "it is a sequence")
    heads = query[1:-2]
    for other in (key[1:-2], value[1:-2]):
        for mine, its in zip(heads, other, strict=False):
            if p.tracker.size(mine) != p.tracker.size(its):  # enable_gqa: query heads are groups of key heads
                copies = p.tracker.axis(p.tracker.size(mine) // p.tracker.size(its), "it is a number of copies")
                p.tracker.unify(mine, Product((its, copies)), "query and key heads differ")
            else:
                p.tracker.unify(mine, its, "query and key heads differ")
    for dim in heads:
        p.tracker.mark_heads(dim)
    for its, dim in zip(reversed(p.of(a["attn_mask"])[:-2]), reversed(heads), strict=False):
        if p.tracker.size(its) > 1:
            if any(p.tracker.frozen(axis) is not None for axis in p.tracker.axes(its)):
                p.tracker.freeze(dim, "the attention mask has a part for each head, and none for a new one")
            p.tracker.unify(its, dim, "the attention mask has another number of heads")
    p.tracker.unify(key[-2], value[-2], "key and value have different lengths")
    return [*[p.tracker.resolve(dim) for dim in query[:-1]], value[-1]]
