"""Ops that change shapes: views, joins, cuts, pooling, indexing, factories."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...layout import Concat, Product
from ..nodes import shape_of, short_name
from ..propagation import Dims, Propagation, rule
from ..tracker import ONE


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
def _view(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    return p.tracker.view(p.of(node.args[0]), shape_of(node), "a view cuts across it")


@rule("squeeze")
def _squeeze(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    dims = p.of(a["self"])
    along = a.get("dim")
    if along is None:
        along = [position for position, dim in enumerate(dims) if p.tracker.size(dim) == 1]
    gone = {int(d) % len(dims) for d in (along if isinstance(along, (list, tuple)) else [along])}
    gone = {position for position in gone if p.tracker.size(dims[position]) == 1}
    for position in gone:
        p.tracker.freeze(dims[position], "it is squeezed away")
    return [dim for position, dim in enumerate(dims) if position not in gone]


@rule("unsqueeze")
def _unsqueeze(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    dims = list(p.of(a["self"]))
    dims.insert(a["dim"] % (len(dims) + 1), ONE)
    return dims


@rule("permute")
def _permute(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    dims = p.of(a["self"])
    return [dims[position] for position in a["dims"]]


@rule("transpose", "swapaxes", "swapdims")
def _transpose(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    dims = list(p.of(node.args[0]))
    first, second = (int(position) for position in node.args[1:3])  # type: ignore[arg-type]
    dims[first], dims[second] = dims[second], dims[first]
    return dims


@rule("mT")
def _mt(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    *batch, rows, columns = p.of(node.args[0])
    return [*batch, columns, rows]


@rule("t", "numpy_T")
def _t(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    return list(p.of(node.args[0]))[::-1]


@rule("movedim", "moveaxis")
def _movedim(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    dims = p.of(node.args[0])
    source, destination = node.args[1:3]
    order = torch.movedim(torch.empty(tuple(range(2, 2 + len(dims)))), source, destination).shape  # type: ignore[arg-type]
    return [dims[extent - 2] for extent in order]


@rule("expand", "expand_as")
def _expand(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    dims, shape = p.of(node.args[0]), shape_of(node)
    padded = [ONE] * (len(shape) - len(dims)) + dims
    result: Dims = []
    for dim, extent in zip(padded, shape, strict=True):
        if p.tracker.size(dim) == extent:
            result.append(dim)
        else:  # repeated: a dimension of copies (grouped-query heads)
            p.tracker.freeze(dim, "its single channel is broadcast")
            result.append(p.tracker.axis(extent, "it is a number of copies"))
    if short_name(node) == "expand_as":
        return p.tracker.broadcast([result, p.of(node.args[1])], "it is expanded to another tensor")
    return result


@rule("repeat")
def _repeat(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    dims, repeats = p.of(a["self"]), a["repeats"]
    result: Dims = []
    for dim, count in zip([ONE] * (len(repeats) - len(dims)) + dims, repeats, strict=True):
        copies = [] if count == 1 else [p.tracker.axis(count, "it is a number of copies")]
        result.append(p.tracker.resolve(Product((*copies, dim))))
    return result


@rule("repeat_interleave")
def _repeat_interleave(p: Propagation, node: Node, a: dict[str, Any]) -> Any:
    if not isinstance(a.get("repeats"), int) or a.get("dim") is None:
        return p.opaque(node, "it is repeated unevenly")
    dims = list(p.of(a["self"]))
    copies = p.tracker.axis(a["repeats"], "it is a number of copies")
    dims[a["dim"]] = p.tracker.resolve(Product((dims[a["dim"]], copies)))
    return dims


@rule("cat", "concat")
def _cat(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    parts = [value for value in a["tensors"] if len(p.of(value)) == len(shape_of(node))]
    rank = len(shape_of(node))
    along = a["dim"] % rank
    result: Dims = []
    for value in parts:
        name = p.tensor(_base(value))
        if name is not None:
            for dim in range(len(p.tensor_dims[name])):
                p.use(name, dim, "shift", name.rpartition(".")[0])
    for position in range(rank):
        column = [p.of(value)[position] for value in parts]
        if position == along:
            result.append(p.tracker.resolve(Concat(tuple(column))))
        else:
            result.append(p.tracker.broadcast([[dim] for dim in column], "cat joins it with another tensor")[0])
    return result


def _base(value: Any) -> Any:
    while isinstance(value, Node) and short_name(value) in (
        "expand",
        "unsqueeze",
        "view",
        "reshape",
        "repeat",
        "to",
    ):
        value = value.args[0]
    return value


@rule("stack")
def _stack(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    dims = p.tracker.broadcast([p.of(value) for value in a["tensors"]], "stack joins it with another tensor")
    dims.insert(a["dim"] % (len(dims) + 1), p.tracker.axis(len(a["tensors"]), "it is a stack's own dimension"))
    return dims


def _pieces(p: Propagation, node: Node, along: int) -> Any:
    source = p.of(node.args[0])
    shapes = [item.shape for item in node.meta["val"]]
    cut = p.tracker.split_concat(source[along], [int(shape[along]) for shape in shapes])
    if cut is None:
        return p.opaque(node, "it is cut into pieces that fastgrow cannot follow")
    result = []
    for piece in cut:
        dims = list(source)
        dims[along] = piece
        result.append(dims)
    return result


@rule("chunk", "split", "split_with_sizes", "tensor_split")
def _split(p: Propagation, node: Node, a: dict[str, Any]) -> Any:
    return _pieces(p, node, a["dim"])


@rule("unbind")
def _unbind(p: Propagation, node: Node, a: dict[str, Any]) -> Any:
    dims = list(p.of(node.args[0]))
    p.tracker.freeze(dims.pop(a["dim"]), "it is taken apart, one index at a time")
    return [list(dims) for _ in node.meta["val"]]


@rule("select")
def _select(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    dims = list(p.of(node.args[0]))
    p.tracker.freeze(dims.pop(a["dim"]), "single indices are taken out of it")
    return dims


@rule("slice", "narrow")
def _slice(p: Propagation, node: Node, a: dict[str, Any]) -> Any:
    dims = list(p.of(node.args[0]))
    along = a["dim"] % len(dims)
    extent, kept = p.tracker.size(dims[along]), shape_of(node)[along]
    if kept == extent:
        return dims
    start = int(a.get("start") or 0)
    start = start + extent if start < 0 else start
    if a.get("step") not in (None, 1):
        p.tracker.freeze(dims[along], "a strided slice is taken of it")
        dims[along] = p.tracker.axis(kept, "it is a strided slice")
        return dims
    lengths = [start, kept, extent - start - kept]
    cut = p.tracker.split_concat(dims[along], [length for length in lengths if length])
    if cut is None:
        return p.opaque(node, "a slice cuts across it")
    dims[along] = cut[1 if start else 0]
    return dims


@rule("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "reflection_pad1d", "replication_pad1d")
def _pad(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    dims, padding = list(p.of(node.args[0])), list(a.get("pad") or a.get("padding") or ())
    shape = shape_of(node)
    for index in range(len(padding) // 2):
        position = len(dims) - 1 - index
        if padding[2 * index] or padding[2 * index + 1]:
            p.tracker.freeze(dims[position], "it is padded")
            dims[position] = p.tracker.axis(shape[position], "it is padded")
    return dims


_POOLS = [
    f"{prefix}{kind}_pool{n}d" for prefix in ("", "adaptive_") for kind in ("avg", "max", "lp") for n in (1, 2, 3)
]


@rule(*_POOLS, *(f"max_pool{n}d_with_indices" for n in (2, 3)), *(f"adaptive_max_pool{n}d" for n in (1, 2, 3)))
@rule(*(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "bilinear2d", "bicubic2d", "linear1d")))
@rule("_adaptive_avg_pool2d")
def _pool(p: Propagation, node: Node, a: dict[str, Any]) -> Any:
    dims = p.of(node.args[0])
    value = node.meta["val"]
    shape = [int(extent) for extent in (value if isinstance(value, Tensor) else value[0]).shape]
    spatial = 3 if "3d" in short_name(node) else 1 if "1d" in short_name(node) else 2
    channels = len(dims) - spatial
    for dim in dims[channels:]:
        p.tracker.freeze(dim, "it is a spatial dimension")
    result = [*dims[:channels], *p.fresh(shape[channels:], "it is a spatial dimension")]
    return result if isinstance(value, Tensor) else [list(result) for _ in value]


@rule("pixel_shuffle")
def _pixel_shuffle(p: Propagation, node: Node, a: dict[str, Any]) -> Any:
    """(..., C r^2, H, W) -> (..., C, H r, W r): a channel's r^2 pixels grow together."""
    dims, shape = p.of(a["self"]), shape_of(node)
    cut = p.tracker.split_product(dims[-3], [shape[-3], a["upscale_factor"] ** 2])
    if cut is None:
        return p.opaque(node, "pixel_shuffle cuts across it")
    p.tracker.freeze(cut[1], "it is a pixel's place within a channel")
    return [*dims[:-3], cut[0], *p.fresh(shape[-2:], "it is a spatial dimension")]


@rule("pixel_unshuffle")
def _pixel_unshuffle(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    dims, shape = p.of(a["self"]), shape_of(node)
    pixels = p.tracker.axis(a["downscale_factor"] ** 2, "it is a pixel's place within a channel")
    channels = p.tracker.resolve(Product((dims[-3], pixels)))
    return [*dims[:-3], channels, *p.fresh(shape[-2:], "it is a spatial dimension")]


@rule("slice_scatter", "select_scatter")
def _scatter(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    """A tensor with a part written over."""
    dims, written = list(p.of(a["self"])), list(p.of(a["src"]))
    along = a["dim"] % len(dims)
    p.tracker.freeze(dims[along], "a part of it is overwritten")
    if len(written) == len(dims):
        written.pop(along)
    others = [dim for position, dim in enumerate(dims) if position != along]
    joined = p.tracker.broadcast([others, written], "it is written over another tensor")
    return [*joined[:along], dims[along], *joined[along:]]


@rule("_assert_tensor_metadata", "_assert_async", "sym_size", "_assert_scalar")
def _nothing(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    return []


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
def _like(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    return list(p.of(node.args[0]))


@rule(
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "zeros",
    "ones",
    "full",
    "empty",
    "arange",
    "rand",
    "randn",
    "eye",
)
@rule("scalar_tensor", "lift_fresh_copy", "_tensor_constant", "linspace")
def _factory(p: Propagation, node: Node, a: dict[str, Any]) -> Any:
    return p.outputs(node, "its size is written into the code")


@rule("index", "gather", "take_along_dim", "index_select")
def _gather(p: Propagation, node: Node, a: dict[str, Any]) -> Any:
    dims = p.of(node.args[0])
    indices = a.get("indices")
    value = node.meta.get("val")
    if isinstance(indices, (list, tuple)) and isinstance(value, Tensor):
        indexed = [position for position, index in enumerate(indices) if index is not None]
        if indexed == list(range(len(indexed))):  # leading indices: the trailing dimensions are untouched
            for position in indexed:
                p.tracker.freeze(dims[position], "it is indexed")
            kept = dims[len(indexed) :]
            return [*p.fresh(value.shape[: value.dim() - len(kept)], "it is indexed"), *kept]
    return p.opaque(node, "it is indexed")
