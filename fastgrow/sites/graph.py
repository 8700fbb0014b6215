"""The model as a graph of ATen ops: `torch.export`, with names mapped back to the model's own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import OutputKind
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from ..arguments import instance
from ..errors import GrowthError
from ..layout import Layout
from ..nn import attention_traced
from .carried import Place, Record, node_at, pack, place_of, unpack
from .mutation import show_mutations
from .nodes import bind
from .untouched import untouched

__all__ = [
    "Followed",
    "LayerCall",
    "Trace",
    "argument_paths",
    "as_call",
    "evaluation",
    "open_outputs",
    "tensor_names",
    "trace_model",
    "unwrap",
    "without_hooks",
]


@dataclass(frozen=True)
class Trace:
    """An exported graph; it holds names and shapes, no parameter of the model. Pickles."""

    graph: Graph
    tensors: Mapping[str, str]  # placeholder -> state-dict name (tied tensors: the first of their names)
    inputs: tuple[str, ...]  # placeholders of the user's inputs, in order
    paths: tuple[str, ...]  # where each of these stands among the forward's arguments, as `argument_paths` says
    constants: Mapping[str, Tensor]  # placeholders of tensors that the code made itself
    shapes: tuple[tuple[int, ...], ...]  # of the example inputs, in order
    outputs: tuple[tuple[int, ...], ...]  # of the model's outputs, in order
    parameters: frozenset[str] = frozenset()  # placeholders of parameters
    returned: frozenset[str] = frozenset()  # nodes whose values are outputs of the model

    @property
    def nodes(self) -> list[Node]:
        return list(self.graph.nodes)

    def __reduce__(self) -> tuple[Any, ...]:
        rest = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.name != "graph"}
        return _trace, (pack(self.graph), rest)


def _trace(records: Sequence[Record], rest: Mapping[str, Any]) -> Trace:
    return Trace(unpack(records), **rest)


@dataclass(frozen=True)
class LayerCall:
    """One call of a linear, convolution or embedding layer in the graph.

    part: of a linear layer that is called with a slice of its weight (the queries' part of a packed one): the
    outputs before the slice, and its own.
    equation, source: of a stacked layer, whose weight holds a matrix for each of several members: its product with
    the weight as (out, in, members), in torch.einsum's letters ("gbi,oig->gbo"), and the node that it reads.
    """

    name: str
    kind: str  # "linear", "conv", "conv_transpose", "grouped", "depthwise", "embedding", "stacked"
    node: Node
    weight: str  # name in model.state_dict()
    bias: str | None
    out_dim: int  # of the weight
    in_dim: int
    channel: int  # the output's channel dimension
    bare: bool = False  # the op is not all that its module does, or is called without one
    part: tuple[Layout, Layout] | None = None
    equation: str = ""
    source: Node | None = None

    @property
    def transposed(self) -> bool:
        """Whether this is a transposed convolution, grouped or not."""
        return self.kind in ("conv_transpose", "grouped") and self.out_dim == 1

    @property
    def fan(self) -> int:
        """The channels that one output of the weight makes: of a grouped transposed convolution one in each group."""
        return int(bind(self.node)["groups"]) if self.kind == "grouped" and self.transposed else 1

    def letters(self) -> tuple[str, str, str]:
        """Of a stacked layer's input, weight and output."""
        x, _, rest = self.equation.partition(",")
        weight, _, out = rest.partition("->")
        return x, weight, out

    def span(self, length: Callable[[Layout], int]) -> slice:
        """Where the call's outputs lie among all of the weight's, in layouts of these lengths."""
        if self.part is None:
            return slice(None)
        start, own = map(length, self.part)
        return slice(start, start + own)


@dataclass(frozen=True)
class Followed:
    """The graph with every dimension of every tensor followed. Pickles."""

    trace: Trace
    dims: Mapping[Node, Any]  # node -> its layouts (a list of them for ops of several results)
    tensor_dims: Mapping[str, tuple[Layout, ...]]
    calls: tuple[LayerCall, ...]
    chains: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # site -> its middle, once read
    norm_series: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # site -> its norms, once read
    retraced: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # by sizes of batches, a few

    @functools.cached_property
    def inputs(self) -> dict[str, Node]:
        """The placeholders of the model's inputs, each by its place (`Trace.paths`)."""
        nodes = {node.name: node for node in self.trace.nodes if node.op == "placeholder"}
        return {path: nodes[name] for name, path in zip(self.trace.inputs, self.trace.paths, strict=True)}

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors among the inputs."""
        values = {path: node.meta.get("val") for path, node in self.inputs.items()}
        return {path: tuple(value.shape) for path, value in values.items() if isinstance(value, Tensor)}

    def with_layouts(self, changed: Callable[[Layout], Layout]) -> Followed:
        """The same with every layout changed."""

        def each(dims: Any) -> Any:
            return [each(dim) if isinstance(dim, list) else changed(dim) for dim in dims]

        return Followed(
            self.trace,
            {node: each(dims) for node, dims in self.dims.items()},
            {name: tuple(map(changed, dims)) for name, dims in self.tensor_dims.items()},
            tuple(
                call
                if call.part is None
                else dataclasses.replace(call, part=(changed(call.part[0]), changed(call.part[1])))
                for call in self.calls
            ),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        places = place_of(self.trace.nodes)
        calls = tuple(
            dataclasses.replace(call, node=places[call.node], source=call.source and places[call.source])  # type: ignore[arg-type]
            for call in self.calls
        )
        return _followed, (self.trace, {places[node]: of for node, of in self.dims.items()}, self.tensor_dims, calls)

    @functools.cached_property
    def samples_at(self) -> dict[str, int]:
        """Where an input has its samples: input (as in `Trace.paths`) -> dimension, where that is not the first.

        The first one numbers the members of a stack, where each of them reads samples of its own.
        """
        members = self.members
        inputs = self.inputs if members else {}
        return {path: 1 for path, node in inputs.items() if len(dims := self.dims[node]) > 1 and dims[0] in members}

    @functools.cached_property
    def members(self) -> set[Layout]:
        """What numbers the matrices of stacked weights."""
        stacks = [call for call in self.calls if call.kind == "stacked"]
        return {self.tensor_dims[call.weight][3 - call.out_dim - call.in_dim] for call in stacks}


def _followed(
    trace: Trace, dims: Mapping[Place, Any], tensor_dims: Mapping[str, tuple[Layout, ...]], calls: Sequence[LayerCall]
) -> Followed:
    nodes = trace.nodes
    return Followed(
        trace,
        {node_at(place, nodes): of for place, of in dims.items()},
        tensor_dims,
        tuple(
            dataclasses.replace(call, node=node_at(call.node, nodes), source=node_at(call.source, nodes))
            for call in calls
        ),
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The module a person wrote, out of ``torch.compile``'s and data-parallel wrappers; `GrowthError` for no module."""
    instance("fastgrow", "model", model, nn.Module)
    while True:
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif "module" in model._modules and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the call that ``example_inputs`` stands for."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def argument_paths(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The leaves of a call, each with its place: the parameter's name, then keys and positions inside it.

    The same whether an argument is given by position or by name, and whatever the order of the names.
    """
    forward = unwrap(model).forward
    positional, rest = _positional(getattr(forward, "__func__", forward), bound=hasattr(forward, "__func__"))
    roots: list[tuple[str, Any]] = [
        (positional[at] if at < len(positional) else f"{rest}[{at - len(positional)}]", value)
        for at, value in enumerate(args)
    ]
    found: list[tuple[str, Any]] = []
    for root, value in (*roots, *kwargs.items()):
        if isinstance(value, Tensor):
            found.append((root, value))
        else:
            found += [(root + pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(value)[0]]
    return found


@functools.lru_cache(maxsize=32)
def _positional(forward: Callable[..., Any], *, bound: bool) -> tuple[tuple[str, ...], str]:
    """The names that arguments given by position have, and the one that takes the rest."""
    parameters = list(inspect.signature(forward).parameters.values())[bound:]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)), rest


def open_outputs(output: Any) -> Any:
    """An output with dataclasses that pytree does not know turned into dicts."""

    def opened(leaf: Any) -> Any:
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        return {entry.name: open_outputs(getattr(leaf, entry.name)) for entry in dataclasses.fields(leaf)}

    return pytree.tree_map(opened, output)


@contextlib.contextmanager
def _opened(model: nn.Module) -> Iterator[None]:
    """The forward pass returns what torch.export takes."""
    forward = model.forward

    @functools.wraps(forward)
    def opening(*args: Any, **kwargs: Any) -> Any:
        return open_outputs(forward(*args, **kwargs))

    own = vars(model).get("forward")
    vars(model)["forward"] = opening
    try:
        yield
    finally:
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own


def tensor_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor (ties are by identity)."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names[name] = first.setdefault(id(tensor), name)
    return names


# Higher-order ops that only wrap a region of code: where their graph stands among the arguments.
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4, "tag_activation_checkpoint": 0}


def _inline_regions(module: GraphModule) -> GraphModule:
    """The same graph with the bodies of no-grad, autocast and checkpoint regions in place."""
    if not any(node.op == "get_attr" for node in module.graph.nodes):
        return module
    graph = torch.fx.Graph()
    values: dict[Node, Any] = {}
    for node in module.graph.nodes:
        position = _REGIONS.get(getattr(node.target, "__name__", "")) if node.op == "call_function" else None
        if position is None:
            if node.op == "call_function" and node.target is operator.getitem:
                source = values[node.args[0]]
                if isinstance(source, (tuple, list)):
                    values[node] = source[node.args[1]]
                    continue
            values[node] = graph.node_copy(node, values.__getitem__)
            continue
        region = getattr(module, node.args[position].target)
        inner: dict[Node, Any] = {}
        formal = (inside for inside in region.graph.nodes if inside.op == "placeholder")
        for placeholder, actual in zip(formal, node.args[position + 1 :], strict=True):
            inner[placeholder] = values[actual] if isinstance(actual, Node) else actual
        values[node] = graph.graph_copy(_inline_regions(region).graph, inner)
    flat = GraphModule(module, graph)
    flat.graph.eliminate_dead_code()
    return flat


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Set the user's hooks aside: an export runs them, a copy would take them along."""
    saved = [(module, name, getattr(module, name)) for module in model.modules() for name in _HOOKS]
    try:
        for module, name, hooks in saved:
            object.__setattr__(module, name, type(hooks)())
        yield
    finally:
        for module, name, hooks in saved:
            object.__setattr__(module, name, hooks)


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Set hooks aside, put normalisations in evaluation mode, and afterwards attributes back.

    Batch norm in training mode does not export at batch size 1, and would count a batch.
    """
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.training]
    with without_hooks(model), attention_traced(model), untouched(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)  # was assigned: it is put back
        try:
            for norm in norms:
                norm.training = False
            yield
        finally:
            for norm in norms:
                norm.training = True


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _drop_unread_attention(module: GraphModule) -> None:
    """Attention weights that nobody reads tie no heads, though torch's module takes their mean over the heads.

    Any other value that nobody reads is still computed by the model's code: it has to fit.
    """
    for node in reversed(module.graph.nodes):
        stack = (node.meta.get("nn_module_stack") or {}).values()
        inside = any("MultiheadAttention" in str(kind) for _, kind in stack)
        if inside and node.op == "call_function" and not node.users:
            module.graph.erase_node(node)


def trace_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Export the model as it is called with these inputs.

    raises: GrowthError with torch.export's reason where the model cannot be exported.
    """
    model = unwrap(model)
    attempts: tuple[contextlib.AbstractContextManager[None], ...] = (
        contextlib.nullcontext(),
        evaluation(model),
    )
    reason: Exception | None = None
    program = None
    for mode in attempts:
        try:
            with torch.random.fork_rng(devices=[]), _undisturbed(model), mode, _opened(model):
                program = torch.export.export(model, args, kwargs, strict=False)
            break
        except Exception as error:
            reason = reason or error
    if program is None:
        raise GrowthError(
            f"{type(model).__name__} cannot be exported, so its sites cannot be found: torch.export says: "
            f"{str(reason).strip().splitlines()[0] if str(reason).strip() else repr(reason)}. Give example "
            "inputs that the forward pass accepts, or name the sites by hand with fastgrow.name_sites"
        ) from reason
    signature = program.graph_signature
    nodes = {node.name for node in program.graph.nodes if node.op == "placeholder"}
    first = tensor_names(model)
    tensors = {
        placeholder: first.get(target, target)
        for placeholder, target in (
            *signature.inputs_to_parameters.items(),
            *signature.inputs_to_buffers.items(),
        )
    }
    constants = {
        placeholder: program.constants[target]
        for placeholder, target in signature.inputs_to_lifted_tensor_constants.items()
        if isinstance(program.constants.get(target), Tensor)
    }
    leaves = argument_paths(model, args, kwargs)
    placed = [
        (str(name), path)
        for name, (path, _) in zip(signature.user_inputs, leaves, strict=True)
        if isinstance(name, str) and name in nodes
    ]
    inputs, paths = tuple(name for name, _ in placed), tuple(path for _, path in placed)
    shapes = tuple(
        tuple(node.meta["val"].shape)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in inputs and isinstance(node.meta.get("val"), Tensor)
    )
    users = {spec.arg.name for spec in signature.output_specs if spec.kind == OutputKind.USER_OUTPUT}
    outputs = tuple(
        tuple(node.meta["val"].shape)
        for node in program.graph.output_node().args[0]
        if isinstance(node, Node) and node.name in users and isinstance(node.meta.get("val"), Tensor)
    )
    graph = _inline_regions(program.graph_module)
    show_mutations(graph)
    _drop_unread_attention(graph)
    parameters = frozenset(signature.inputs_to_parameters)
    returned = frozenset(
        node.name
        for node, spec in zip(graph.graph.output_node().args[0], signature.output_specs, strict=True)  # type: ignore[arg-type]
        if isinstance(node, Node) and spec.kind == OutputKind.USER_OUTPUT
    )
    return Trace(graph.graph, tensors, inputs, paths, constants, shapes, outputs, parameters, returned)
