"""Ops that change values: normalisations, elementwise ops, reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node

from ...layout import Layout, Product
from ..nodes import is_rms, module_of, plain_name, shape_of, short_name
from ..propagation import POINTWISE, Dims, NormCall, Propagation, rule
from ..tracker import ONE


def _norm_parameters(p: Propagation, node: Node, dim: Layout, named: Sequence[tuple[Any, str]]) -> None:
    for value, role in named:
        if isinstance(value, Node):
            p.tracker.unify(p.of(value)[-1], dim, "a normalisation's parameter has another size")
            p.use(p.tensor(value), len(p.of(value)) - 1, role, module_of(node))


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit", "native_batch_norm")
def _batch_norm(p: Propagation, node: Node, a: dict[str, Any]) -> Any:
    dims = p.of(a["input"])
    statistics = ((a["running_mean"], "running_mean"), (a["running_var"], "running_var"))
    _norm_parameters(p, node, dims[1], ((a["weight"], "norm_weight"), (a["bias"], "norm_bias"), *statistics))
    return list(dims)


@rule("layer_norm")
def _layer_norm(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    return _channel_mixing_norm(p, node, a, "layer_norm")


@rule("rms_norm")
def _rms_norm(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    return _channel_mixing_norm(p, node, a, "rms_norm")


def _channel_mixing_norm(p: Propagation, node: Node, a: dict[str, Any], kind: str) -> Dims:
    dims = p.of(a["input"])
    if len(a["normalized_shape"]) > 1:
        for dim in dims[-len(a["normalized_shape"]) :]:
            p.tracker.freeze(dim, f"{module_of(node) or kind} normalises over several dimensions at once")
        return list(dims)
    _norm_parameters(p, node, dims[-1], ((a["weight"], "norm_weight"), (a.get("bias"), "norm_bias")))
    p.norms.append(NormCall(module_of(node), kind, node, dims[-1]))
    return list(dims)


@rule("group_norm")
def _group_norm(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    dims = p.of(a["input"])
    groups = int(a["num_groups"])
    size = p.tracker.size(dims[1])
    group = p.tracker.axis(groups)
    inner = p.tracker.axis(size // groups, "GroupNorm grows by whole groups")
    p.tracker.unify(dims[1], Product((group, inner)) if size > groups else group, "GroupNorm's groups cut across it")
    _norm_parameters(p, node, dims[1], ((a["weight"], "norm_weight"), (a["bias"], "norm_bias")))
    p.norms.append(NormCall(module_of(node), "group_norm", node, p.tracker.resolve(group)))
    return list(dims)


@rule(POINTWISE, "where", "masked_fill", "copy")
def _pointwise(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    operands = [value for value in _tensors(node.args) + _tensors(node.kwargs.values()) if value in p.dims]
    role = "scale" if plain_name(node) in ("mul", "div") else "shift"
    for value in operands:
        name = p.tensor(value)
        if name is not None:
            for dim in range(len(p.of(value))):
                p.use(name, dim, role, name.rpartition(".")[0])
    shape = shape_of(node)
    dims = p.tracker.broadcast([p.of(value) for value in operands], f"{short_name(node)} joins it with another tensor")
    return dims if len(dims) == len(shape) else p.fresh(shape, "its shape is not that of its operands")


def _tensors(values: Any) -> list[Node]:
    found: list[Node] = []
    for value in values:
        if isinstance(value, Node):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(_tensors(value))
    return found


@rule(
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "contiguous",
    "clone",
    "detach",
    "alias",
)
@rule("to", "_to_copy", "type_as", "relu", "hardtanh", "gelu", "native_dropout", "rrelu")
@rule("hardswish", "mish", "threshold", "bernoulli", "uniform", "normal", "fill")
def _same(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    return list(p.of(node.args[0]))


@rule("prelu")
def _prelu(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    dims, weight = p.of(a["self"]), p.of(a["weight"])
    if p.tracker.size(weight[0]) > 1:
        p.tracker.unify(weight[0], dims[1], "PReLU has another number of channels")
        p.use(p.tensor(a["weight"]), 0, "slope", module_of(node))
    return list(dims)


@rule(
    "softmax",
    "log_softmax",
    "_softmax",
    "_log_softmax",
    "logsumexp",
    "cumsum",
    "flip",
    "roll",
    "sort",
    "topk",
)
def _mixes_one(p: Propagation, node: Node, a: dict[str, Any]) -> Any:
    dims = p.of(node.args[0])
    along = a.get("dim", a.get("dims", -1))
    for position in along if isinstance(along, (list, tuple)) else (-1 if along is None else along,):
        p.tracker.freeze(dims[position], f"{short_name(node)} runs along it")
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.dim() == len(dims):
        return list(dims)
    return p.opaque(node, f"{short_name(node)} runs along it")


@rule("glu")
def _glu(p: Propagation, node: Node, a: dict[str, Any]) -> Dims:
    dims = list(p.of(a["self"]))
    half = p.tracker.size(dims[a["dim"]]) // 2
    cut = p.tracker.split_concat(dims[a["dim"]], [half, half])
    if cut is None:
        return p.opaque(node, "glu's halves cut across it")
    dims[a["dim"]] = p.tracker.unify(cut[0], cut[1], "glu's halves differ")
    return dims


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "var",
    "std",
    "prod",
    "linalg_vector_norm",
    "norm",
    "any",
    "all",
    "max",
    "min",
)
def _reduce(p: Propagation, node: Node, a: dict[str, Any]) -> Any:
    dims = p.of(node.args[0])
    along = a.get("dim")
    if along is None or along == []:
        along = range(len(dims))
    positions = (
        {int(d) % len(dims) for d in (along if isinstance(along, (list, tuple, range)) else [along])} if dims else set()
    )
    root_mean_square = is_rms(node) and positions == {len(dims) - 1}
    for position in positions:
        if not root_mean_square:
            p.tracker.freeze(dims[position], f"{short_name(node)} runs along it")
    if root_mean_square:
        p.norms.append(NormCall(module_of(node), "rms_norm", node, dims[-1]))
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return p.opaque(node, f"{short_name(node)} runs along it")
    if value.dim() == len(dims):
        return [ONE if position in positions else dim for position, dim in enumerate(dims)]
    return [dim for position, dim in enumerate(dims) if position not in positions]
