"""The graph that a batch is replayed with: that of the example inputs, or one traced at the batch's own sizes.

A graph holds the sizes of the inputs that it was traced with: in masks, ranges, views, slices, in numbers computed
from them. A middle that holds none of these, and reads none, is replayed with it at any batch size; every other one
with a graph of the model as it was called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..errors import GrowthError
from ..fake import for_export
from ..layout import Concat, Layout, Leaf, Product, axes_of
from ..sites import Followed, Site, Sites, argument_paths, follow, tensors_of
from ..sites.nodes import bind, plain_name
from ..surroundings import callers_device
from .reads import nodes_read

__all__ = ["Traced", "graph_of", "same_shapes", "sizeless"]

_KEPT = 8  # graphs beside that of the example inputs

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Traced:
    """A graph, a site with its middle in it, and the sizes of the axes that only this graph has."""

    graph: Followed
    site: Site
    sizes: Mapping[int, int] = field(default_factory=dict)


def graph_of(
    model: nn.Module,
    sites: Sites,
    site: Site,
    arguments: Mapping[str, Tensor],
    call: Call | None,
    *,
    tracing: bool = True,
) -> Traced:
    """The graph to replay a site with, for a call of the model with these tensors, each by its place.

    It is that of the example inputs where all shapes agree, or where nothing that the replay works out depends on the
    batch size, the only thing that differs. Otherwise the model is traced again as it was called (`torch.export`, as
    long as finding the sites took; the last few graphs are kept with them), and is left as it was.

    call: the positional and keyword arguments, whose tensors give way to ``arguments``. tracing: False where the model
    is not to be traced now, within a backward pass.
    raises: GrowthError where the model cannot be traced at these sizes, or where the site is another one there.
    """
    graph = sites.graph
    assert graph is not None
    if same_shapes(graph, arguments) or _serves(graph, site, _shapes(arguments)):
        return Traced(graph, site)
    if call is None:
        raise _refusal(sites, site, arguments, "the call that it was given to is not known")
    found = _at(model, sites, site, arguments, call, tracing)
    return Traced(found.graph, found.of(site), found.sizes)


# -- whether the graph of the example inputs serves ------------------------------------------------------------


def same_shapes(graph: Followed, arguments: Mapping[str, Tensor]) -> bool:
    """Whether a call's tensors are those of the example inputs in all but their values.

    Nothing is known of the arguments of chains named by hand, and of a part of the model that was called on its own.
    """
    return not graph.trace.paths or not arguments or _shapes(arguments) == graph.shapes


def sizeless(node: Node) -> bool:
    """Whether an elementwise op holds no number that may have been computed from the inputs' sizes."""
    return plain_name(node) in _SIZELESS


def _shapes(arguments: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {place: tuple(tensor.shape) for place, tensor in arguments.items()}


_PER_SAMPLE = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d batch_norm instance_norm "
    "group_norm max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d pad "
    "constant_pad_nd".split()
)
"""Ops whose numbers are those of layers, as long as the first dimension is that of the samples."""
_SIZELESS = frozenset(
    "layer_norm rms_norm relu relu6 hardtanh leaky_relu prelu gelu silu tanh sigmoid elu selu celu mish softplus "
    "hardswish hardsigmoid log_sigmoid softsign threshold rrelu hardshrink softshrink tanhshrink dropout "
    "feature_dropout alpha_dropout feature_alpha_dropout native_dropout contiguous clone alias detach to _to_copy "
    "type_as permute transpose t mT movedim unsqueeze neg exp rsqrt sqrt square _assert_tensor_metadata".split()
)
"""Ops that say the same of tensors of any size."""
_CUTS = frozenset("cat chunk split split_with_sizes tensor_split slice narrow select".split())
_VIEWS = frozenset("view reshape _unsafe_view flatten unflatten".split())
_MIXING = frozenset("softmax _softmax scaled_dot_product_attention matmul bmm".split())
"""Ops that join positions: an argument that the example inputs lack (a mask) may have a say in them."""


def _serves(graph: Followed, site: Site, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether nothing that the replay of this site works out depends on what differs: the number of samples."""
    known = graph.shapes
    samples: set[int] = set()
    for place, old in known.items():
        new, along = shapes.get(place, old), graph.samples_at.get(place, 0)
        if old == new:
            continue
        if len(old) != len(new) or not old or old[along] == 1:  # one sample: its axis is not followed
            return False
        if any(a != b for dim, (a, b) in enumerate(zip(old, new, strict=True)) if dim != along):
            return False
        samples |= set(axes_of(graph.dims[graph.inputs[place]][along]))
    calls = {call.node for call in graph.calls if call.name in site.producers}
    middle = [node for node in graph.trace.nodes if node.name in set(site.middle) and node not in calls]
    read = nodes_read(graph, site)
    if any(graph.inputs[place] in read for place in known.keys() - shapes.keys()):
        return False
    worked_out = [*middle, *(node for node in read if node.op != "placeholder" or node.name in graph.trace.constants)]
    if shapes.keys() != known.keys() and any(plain_name(node) in _MIXING for node in worked_out):
        return False
    return all(_serves_op(graph, node, samples) for node in worked_out)


def _serves_op(graph: Followed, node: Node, samples: set[int]) -> bool:
    """Whether an op says the same of more samples, or fewer."""
    kind = plain_name(node)
    if sizeless(node) or kind in _MIXING or kind == "getitem":
        return True
    source = next(iter(node.all_input_nodes), None)
    if source is None:
        return False
    dims = graph.dims[source]
    if kind in _VIEWS:
        return bool(dims) and dims[0] == graph.dims[node][0]
    if kind in _CUTS:
        return int(bind(node)["dim"]) % len(dims) != 0
    if kind in ("add", "sub", "mul", "div"):
        return all(isinstance(arg, Node) for arg in node.args[:2]) and not node.kwargs
    if kind in ("mean", "sum"):
        over = bind(node).get("dim")
        return over is not None
    return kind in _PER_SAMPLE and (not samples or bool(samples & set(axes_of(dims[0]))))


# -- the model traced again ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Retraced:
    """A graph in the axes of the sites, where they have one; sizes: of the other axes."""

    graph: Followed
    sizes: Mapping[int, int]

    def of(self, site: Site) -> Site:
        """The site with its middle in this graph."""
        middle = tuple(
            node.name
            for node, dims in self.graph.dims.items()
            if node.op == "call_function" and any(site.axis in axes_of(dim) for dim in _flat(dims))
        )
        return replace(site, middle=middle)


def _at(
    model: nn.Module, sites: Sites, site: Site, arguments: Mapping[str, Tensor], call: Call, tracing: bool
) -> _Retraced:
    assert sites.graph is not None
    kept = sites.graph.retraced
    key = _key(model, arguments, call)
    if key in kept:
        kept[key] = found = kept.pop(key)  # the last to go
        return found
    if not tracing:
        raise _refusal(sites, site, arguments, "it is not traced within a backward pass")
    try:
        graph, sizes = _trace(model, sites.graph, arguments, call)
    except GrowthError as error:
        reason = str(error.__cause__ or error).strip().splitlines()
        raise _refusal(sites, site, arguments, reason[0] if reason else repr(error.__cause__)) from error
    names = _names(sites, site, graph, arguments)
    present = sites.sizes(model, room=True)
    for axis, name in names.items():
        if name in present and sizes[axis] != present[name]:
            raise _refusal(sites, site, arguments, "its layers have other sizes there")
    found = _renamed(graph, sizes, names, 1 + max([*present, *(s.axis for s in (*sites.items, *sites.left_out))]))
    while len(kept) >= _KEPT:
        del kept[next(iter(kept))]
    kept[key] = found
    return found


def _key(model: nn.Module, arguments: Mapping[str, Tensor], call: Call) -> Any:
    """What a graph depends on: the shapes of tensors and what kind they are, and all other plain arguments."""
    plain = [
        (place, leaf)
        for place, leaf in argument_paths(model, *call)
        if leaf is None or isinstance(leaf, (bool, int, float, str))
    ]
    tensors = [(place, tuple(tensor.shape), _kind(tensor)) for place, tensor in sorted(arguments.items())]
    return tuple(tensors), tuple(sorted(plain, key=lambda entry: entry[0]))


def _kind(tensor: Tensor) -> str:
    """Floating-point types are one kind: autocast changes them."""
    return "float" if tensor.is_floating_point() else str(tensor.dtype)


def _trace(
    model: nn.Module, first: Followed, arguments: Mapping[str, Tensor], call: Call
) -> tuple[Followed, dict[int, int]]:
    leaves, spec = pytree.tree_flatten(call)
    places = [place for place, _ in argument_paths(model, *call)]
    tensors = {place for place, leaf in zip(places, leaves, strict=True) if isinstance(leaf, Tensor)}
    if tensors != arguments.keys():
        other = ", ".join(sorted(tensors ^ arguments.keys()))
        raise GrowthError(f"the batches were not given the same arguments ({other})")

    own = {tensor.dtype for tensor in tensors_of(model).values()}

    def example(place: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        value = arguments[place].detach()
        traced = first.inputs[place].meta.get("val") if place in first.inputs else None
        # What autocast takes of an input, a model of another type does not take without it.
        floating = isinstance(traced, Tensor) and traced.is_floating_point() and value.is_floating_point()
        return value.to(traced.dtype) if floating and value.dtype not in own else value  # type: ignore[union-attr]

    args, kwargs = pytree.tree_unflatten(map(example, places, leaves), spec)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for device in {tensor.device.type for tensor in arguments.values()}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(callers_device())
        module, (args, kwargs) = for_export(model, (args, kwargs))
        return follow(module, args, kwargs)


def _names(sites: Sites, site: Site, graph: Followed, arguments: Mapping[str, Tensor]) -> dict[int, int]:
    """The axes of the sites' layouts in a graph -> the same in the sites."""
    names: dict[int, int] = {}
    for each in (*sites.items, *sites.left_out):
        for slot in each.slots:
            dims = graph.tensor_dims.get(slot.tensor)
            if dims is None and each.name != site.name:  # not called on these inputs
                continue
            if dims is None or not _match(dims[slot.dim], slot.layout, names):
                raise _refusal(sites, site, arguments, f"{slot.tensor!r} is put together in another way there")
    if len(set(names.values())) != len(names):
        raise _refusal(sites, site, arguments, "other channels grow together there")
    return names


def _match(new: Layout, old: Layout, names: dict[int, int]) -> bool:
    """Whether two layouts differ only in the numbers of their axes, which are told apart and noted."""
    match new, old:
        case Leaf(axis), Leaf(other):
            return names.setdefault(axis, other) == other
        case (Product(parts), Product(others)) | (Concat(parts), Concat(others)):
            return len(parts) == len(others) and all(_match(a, b, names) for a, b in zip(parts, others, strict=True))
    return False


def _renamed(graph: Followed, sizes: Mapping[int, int], names: dict[int, int], free: int) -> _Retraced:
    """The graph with its axes numbered as in the sites, the others from ``free`` on."""

    def number(axis: int) -> int:
        return names.get(axis, free + axis)

    def renamed(layout: Layout) -> Layout:
        match layout:
            case Leaf(axis):
                return Leaf(number(axis))
            case Product(parts):
                return Product(tuple(map(renamed, parts)))
            case Concat(parts):
                return Concat(tuple(map(renamed, parts)))

    followed = graph.with_layouts(renamed)
    return _Retraced(followed, {number(axis): extent for axis, extent in sizes.items() if axis not in names})


def _flat(dims: Iterable[Any]) -> list[Layout]:
    return [each for dim in dims for each in (dim if isinstance(dim, list) else [dim])]


def _refusal(sites: Sites, site: Site, arguments: Mapping[str, Tensor], reason: str) -> GrowthError:
    assert sites.graph is not None

    def shown(shapes: Mapping[str, tuple[int, ...]]) -> str:
        return ", ".join(f"{place} {shape}" for place, shape in shapes.items())

    seen = shown(_shapes(arguments))
    return GrowthError(
        f"site {site.name!r}: what lies between its layers depends on the inputs' sizes; it was found with "
        f"{shown(sites.graph.shapes)}, the batch has {seen}, and the model cannot be followed there: {reason}. "
        "Find the sites with inputs of the sizes that are observed, or leave such batches out of what is observed "
        "(drop_last=True for a last one that is smaller)"
    )
