"""From the dimensions of an exported graph to the sets of channels that grow together."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.fx import Node
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..errors import GrowthError
from ..insertions import places
from ..layout import Concat, Layout, Leaf, Product, axes_of
from . import rules as _rules  # noqa: F401 - registers what each op says
from .attributes import attribute_rules
from .graph import Followed, Trace, as_call, trace_model, unwrap
from .nodes import activation_module, bind, module_of, plain_name, short_name
from .outputs import is_product, output_layers
from .propagation import Propagation
from .site import Activation, Gate, LayerInfo, Norm, Site, Sites, Slot, tensors_of, unreadable

__all__ = ["discover", "follow"]

ACTIVATIONS = frozenset(
    [
        "relu",
        "relu6",
        "hardtanh",
        "leaky_relu",
        "prelu",
        "gelu",
        "silu",
        "tanh",
        "sigmoid",
        "elu",
        "selu",
        "celu",
        "mish",
        "softplus",
        "hardswish",
        "hardsigmoid",
        "threshold",
        "log_sigmoid",
        "softsign",
        "rrelu",
    ]
)
_NORMS = {"batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"}
_PASSED = {
    "dropout",
    "feature_dropout",
    "contiguous",
    "clone",
    "alias",
    "detach",
    "to",
    "_assert_tensor_metadata",
}
_ORDER = (
    *("producer", "consumer", "bias", "norm_weight", "norm_bias", "running_mean", "running_var"),
    *("middle", "middle_bias", "slope", "scale", "shift"),
)


def discover(
    model: nn.Module,
    example_inputs: Any,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> Sites:
    """What can grow in a model as it is written, not yet tried; `fastgrow.find_sites` says the rest."""
    trace = trace_model(model, *as_call(example_inputs))
    propagation = Propagation(trace).run()
    inner = unwrap(model)
    layers = _layers(propagation)
    found = _Assembly(propagation, inner).sites()
    chosen = _chosen(found, include, exclude)
    producing = {layer for site in found for slot in site.slots_of("producer", "middle") for layer in (slot.layer,)}
    computed = _computed(inner, layers)
    frozen = {name: _why(propagation, name, computed) for name in layers if name not in producing}
    frozen |= _unreached(inner, layers, trace, computed)
    growing = {site.axis for site in found}
    constants = {axis: extent for axis, extent in propagation.tracker.sizes.items() if axis not in growing}
    if chosen:
        shapes = {name: tensor.shape for name, tensor in tensors_of(inner).items()}
        unread = unreadable(found, shapes, constants)
        for site in unread:
            constants[site.axis] = site.width // site.step
            frozen[site.name] = (
                "it is cut at places written into the code, so its width cannot be told from its tensors"
            )
        found = [site for site in found if site not in unread]
        chosen = [site for site in chosen if site not in unread]
    left_out = tuple(site for site in found if site not in chosen)
    frozen |= {site.name: "it was left out by include= or exclude=" for site in left_out}
    return Sites(tuple(chosen), layers, frozen, constants, left_out, propagation.followed(), places(inner))


def follow(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Followed, dict[int, int]]:
    """The graph of one call of the model with every dimension followed, and the sizes of all axes in it."""
    propagation = Propagation(trace_model(model, args, kwargs)).run()
    return propagation.followed(), dict(propagation.tracker.sizes)


def _chosen(
    found: Sequence[Site], include: str | Iterable[str] | None, exclude: str | Iterable[str] | None
) -> list[Site]:
    def matching(patterns: str | Iterable[str], word: str) -> set[str]:
        names: set[str] = set()
        if not isinstance(patterns, Iterable):
            raise GrowthError(f"{word}={patterns!r} was given; wanted names of sites, or patterns of them")
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if not isinstance(pattern, str):
                raise GrowthError(f"{word}={pattern!r} was given; wanted names of sites, or patterns of them")
            hits = {s.name for s in found if fnmatch.filter((s.name, *s.producers), pattern)}
            if not hits:
                known = ", ".join(site.name for site in found) or "none"
                raise GrowthError(f"{word}={pattern!r} matches no site; the sites found are: {known}")
            names |= hits
        return names

    wanted = matching(include, "include") if include is not None else {site.name for site in found}
    unwanted = matching(exclude, "exclude") if exclude is not None else set()
    return [site for site in found if site.name in wanted - unwanted]


def _followers(node: Node) -> list[Node]:
    """The ops that read a node's value, looking through those that leave it as it is."""
    result: list[Node] = []
    for user in node.users:
        if short_name(user) == "_assert_tensor_metadata":
            continue
        result.extend(_followers(user) if short_name(user) in _PASSED else [user])
    return result


def _layers(propagation: Propagation) -> dict[str, LayerInfo]:
    layers: dict[str, LayerInfo] = {}
    outputs = output_layers(propagation)
    for call in propagation.layers:
        if call.kind == "embedding" or call.name in layers:
            continue
        after, norm, activation, module = call.node, None, None, None
        followers = _followers(after)
        if len(followers) == 1 and short_name(followers[0]) in _NORMS:
            after = followers[0]
            norm = module_of(after)
            followers = _followers(after)
        for user in followers:
            if plain_name(user) in ACTIVATIONS:
                activation = plain_name(user)
                module = activation_module(user)
                break
        is_output = call.name in outputs
        layers[call.name] = LayerInfo(call.name, len(layers), call.weight, norm, activation, module, is_output)
    return layers


def _why(propagation: Propagation, name: str, computed: dict[str, str]) -> str:
    """Why a layer's output channels cannot grow."""
    for call in propagation.layers:
        if call.name == name:
            axes = propagation.tracker.axes(propagation.tensor_dims[call.weight][call.out_dim])
            reasons = [reason for axis in axes if (reason := propagation.tracker.frozen(axis)) is not None]
            if call.kind == "depthwise" and not reasons:
                return "it is depthwise: it grows with the layers before it"
            for node in propagation.trace.nodes if reasons else ():
                neighbour = module_of(node) if is_product(node) else ""
                if neighbour in computed and _carries(propagation, node, set(axes)):
                    return f"the weight of {neighbour!r}, which shares its channels, {computed[neighbour]}"
            return reasons[0] if reasons else "no layer with weights reads its channels"
    return "it was not reached"


def _carries(p: Propagation, node: Node, axes: set[int]) -> bool:
    """Whether any of these axes is one of what a layer's op reads or writes."""
    dims = [dim for value in (node, *node.all_input_nodes) for dim in p.of(value)]
    return any(axis in axes for dim in dims for axis in p.tracker.axes(dim))


_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear, nn.EmbeddingBag)
_HOOKS = ((WeightNorm, "weight_norm"), (SpectralNorm, "spectral_norm"), (BasePruningMethod, "pruning"))


def _computed(model: nn.Module, layers: dict[str, LayerInfo]) -> dict[str, str]:
    """Layers whose weight is computed anew in every pass, and by what."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, _LAYERS) or name in layers or f"{name}.weight" in layers:
            continue
        if parametrize.is_parametrized(module):
            kinds = [type(each).__name__ for entry in module.parametrizations.values() for each in entry]  # type: ignore[operator]
            found[name] = f"is computed by a parametrization ({', '.join(kinds)}); remove it to grow"
        elif "weight" not in module._parameters:
            hooks = [
                word for hook in module._forward_pre_hooks.values() for kind, word in _HOOKS if isinstance(hook, kind)
            ]
            kinds = hooks or ["pruning, weight_norm"]
            found[name] = f"is computed by a hook ({', '.join(kinds)}); make it permanent to grow"
    return found


def _unreached(
    model: nn.Module, layers: dict[str, LayerInfo], trace: Trace, computed: dict[str, str]
) -> dict[str, str]:
    frozen: dict[str, str] = {}
    ops: dict[str, str] = {}
    for node in trace.nodes:
        if node.op == "call_function":
            ops[module_of(node)] = short_name(node)
    reached = {value.rpartition(".")[0] for value in trace.tensors.values()}
    for name, module in model.named_modules():
        if isinstance(module, _RECURRENT):
            frozen[name] = "recurrent layers cannot grow: their hidden state feeds back into every gate"
        elif name in computed:
            frozen[name] = f"its weight {computed[name]}"
        elif isinstance(module, _LAYERS) and name not in layers and f"{name}.weight" not in layers:
            if name in ops:
                frozen[name] = f"{ops[name]} mixes its channels in a way fastgrow does not know"
            elif name in reached:
                frozen[name] = "its weight is not used as it is, but computed with first"
            else:
                frozen[name] = "the example inputs do not reach it"
    return frozen


class _Assembly:
    """Gathers, for every axis that may grow, all that must grow with it."""

    def __init__(self, propagation: Propagation, model: nn.Module) -> None:
        self.p = propagation
        self.tracker = propagation.tracker
        self.model = model
        self.tensor_dims = {
            name: [self.tracker.resolve(dim) for dim in dims] for name, dims in propagation.tensor_dims.items()
        }
        self.node_axes: dict[Node, set[int]] = {}
        for node, dims in propagation.dims.items():
            flat = [dim for part in dims for dim in part] if dims and isinstance(dims[0], list) else dims
            self.node_axes[node] = {axis for dim in flat for axis in self.tracker.axes(dim)}
        self.order = {call.name: position for position, call in reversed(list(enumerate(propagation.layers)))}
        self._freeze_mixed_norms()

    def _freeze_mixed_norms(self) -> None:
        for norm in self.p.norms:
            mixed = self.tracker.resolve(norm.mixed)
            if not isinstance(mixed, Leaf):
                self.tracker.freeze(mixed, f"{norm.name} normalises it together with other channels")

    def sites(self) -> list[Site]:
        slots = self._slots()
        found = [site for axis in slots if (site := self._site(axis, slots[axis])) is not None]
        found.sort(key=lambda site: self.order[site.producers[0]])
        names: dict[str, int] = {}
        result = []
        for site in found:
            count = names.get(site.name, 0)
            names[site.name] = count + 1
            result.append(site if not count else dataclasses.replace(site, name=f"{site.name}#{count}"))
        return result

    def _slots(self) -> dict[int, list[Slot]]:
        roles: dict[tuple[str, int], list[tuple[str, str]]] = {}
        members = {(c.weight, c.name): 3 - c.out_dim - c.in_dim for c in self.p.layers if c.kind == "stacked"}
        for use in self.p.uses:
            entry = roles.setdefault((use.tensor, use.dim), [])
            if (use.role, use.layer) not in entry:
                entry.append((use.role, use.layer))
        slots: dict[int, list[Slot]] = {}
        for tensor, dims in self.tensor_dims.items():
            for dim, layout in enumerate(dims):
                owner = tensor.rpartition(".")[0]
                for role, layer in roles.get((tensor, dim), [("shift", owner)]):
                    for axis in dict.fromkeys(axes_of(layout)):
                        if self.tracker.frozen(axis) is None:
                            slot = Slot(tensor, dim, layout, role, layer, members.get((tensor, layer)))
                            slots.setdefault(axis, []).append(slot)
        return slots

    def _site(self, axis: int, slots: list[Slot]) -> Site | None:
        slots = sorted(slots, key=lambda slot: _ORDER.index(slot.role))
        position = self.order.__getitem__
        producers = sorted({slot.layer for slot in slots if slot.role == "producer"}, key=position)
        consumers = sorted({slot.layer for slot in slots if slot.role == "consumer"}, key=position)
        if not producers or not consumers:
            for slot in slots:
                self.tracker.freeze(slot.layout, "no layer with weights reads its channels")
            return None
        heads = self.tracker.is_heads(axis)
        step = 1 if heads else min(self._written(slot, axis) for slot in slots if slot.role == "producer")
        width = self.tracker.sizes[axis] * step
        middle = [node for node, axes in self.node_axes.items() if axis in axes and node.op == "call_function"]
        norms = self._norms(axis, middle)
        return Site(
            name=producers[0],
            axis=axis,
            width=width,
            multiple=width if any(norm.kind == "layer_norm" for norm in norms) else step,
            producers=tuple(producers),
            consumers=tuple(consumers),
            slots=tuple(slots),
            step=step,
            heads=heads,
            gates=self._gates(axis, middle, producers),
            separate=self._separate(axis, slots, set(middle)),
            attributes=attribute_rules(self.model, slots, self.p, axis, heads),
            activations=self._activations(middle),
            norms=norms,
            middle=tuple(node.name for node in middle),
        )

    def _separate(self, axis: int, slots: Sequence[Slot], inside: set[Node]) -> bool:
        """Whether a unit falls into channels that never meet: one in each group, or in each member of a stack."""
        slots = [slot for slot in slots if slot.role in ("producer", "consumer")]
        names = {slot.layer for slot in slots}
        calls = [call for call in self.p.layers if call.name in names]
        if any(call.kind == "grouped" for call in calls):
            return True
        stacks = {self.tensor_dims[slot.tensor][slot.members] for slot in slots if slot.members is not None}
        group = stacks.pop() if len(stacks) == 1 else None
        if not isinstance(group, Leaf):
            return False
        if not all(slot.members is not None or _outermost(slot.layout, group, axis) for slot in slots):
            return False
        waiting = [call.node for call in calls if call.node in inside]
        reached = set(waiting)
        while waiting:
            node = waiting.pop()
            if group.axis not in self.node_axes[node] or self._runs_along(node, group.axis):
                return False
            further = [user for user in node.users if user in inside and user not in reached]
            reached.update(further)
            waiting += further
        return True

    def _runs_along(self, node: Node, axis: int) -> bool:
        """Whether an op that keeps its input's shape joins positions of an axis."""
        bound = bind(node)
        along = bound.get("dim", bound.get("dims"))
        if plain_name(node) not in _JOINING or along is None:
            return False
        dims = self.p.dims[node]
        return any(axis in self.tracker.axes(dims[dim]) for dim in (along if isinstance(along, list) else [along]))

    def _written(self, slot: Slot, axis: int) -> int:
        """Channels that one step of the axis in a producer's weight writes."""
        groups = next((c.fan for c in self.p.layers if c.name == slot.layer), 1)
        return self._step(slot.layout, axis) * groups

    def _step(self, layout: Layout, axis: int) -> int:
        """Positions of the dimension that one step of the axis stands for."""
        match layout:
            case Leaf(own):
                return int(own == axis)
            case Product(parts):
                inside = [part for part in parts if axis in axes_of(part)]
                rest = [self.tracker.size(part) for part in parts if axis not in axes_of(part)]
                return math.prod(rest) * self._step(inside[0], axis) if inside else 0
            case Concat(parts):
                steps = [self._step(part, axis) for part in parts if axis in axes_of(part)]
                return steps[0] if steps else 0

    def _norms(self, axis: int, middle: Sequence[Node]) -> tuple[Norm, ...]:
        norms = [
            Norm(kind, module_of(node))
            for node in middle
            if (kind := short_name(node)) in ("batch_norm", "instance_norm", "group_norm")
        ]
        for call in self.p.norms:
            if call.kind != "group_norm" and axis in self.tracker.axes(call.mixed):
                norms.append(Norm(call.kind, call.name))
        return tuple(dict.fromkeys(norms))

    def _activations(self, middle: Sequence[Node]) -> tuple[Activation, ...]:
        found = [
            Activation(kind, activation_module(node)) for node in middle if (kind := plain_name(node)) in ACTIVATIONS
        ]
        return tuple(dict.fromkeys(found))

    def _gates(self, axis: int, middle: Sequence[Node], producers: Sequence[str]) -> tuple[Gate, ...]:
        """Producers whose values multiply the others': they must not start at zero.

        No gate is needed where one factor is not zero at zero (a sigmoid, 1 + gamma): there the other learns.
        """
        inside = set(middle)
        size = self.tracker.size
        writes: dict[Node, _Written] = {}
        for call in self.p.layers:
            if call.name not in producers:
                continue
            whole = size(self.tensor_dims[call.weight][call.out_dim])
            span = call.span(size)
            writes[call.node] = _Written(call.name, range(whole)[span], whole)
        born_zero = {n for n, axes in self.node_axes.items() if n.op == "placeholder" and axis in axes}
        quiet = inside & writes.keys() | born_zero
        gates: list[Gate] = []
        for node in middle:
            kind = plain_name(node)
            if kind == "scaled_dot_product_attention":
                gates += [gate for arg in node.args[:2] for gate in _sources(arg, inside, writes)[0]]
            elif kind in ("mul", "matmul", "bmm"):
                operands = [arg for arg in node.args[:2] if isinstance(arg, Node) and arg in inside]
                if len(operands) == 2 and all(_silent(arg, inside, quiet) for arg in operands):
                    (first, first_bends), (second, second_bends) = (_sources(a, inside, writes) for a in operands)
                    if first and second and not set(first) & set(second):
                        gates += second if second_bends > first_bends else first
        return tuple(dict.fromkeys(gates))


_LOUD = frozenset("sigmoid hardsigmoid softplus log_sigmoid exp exp2 cos rsub pow_Scalar reciprocal rsqrt".split())


def _silent(node: Any, inside: set[Node], quiet: set[Node]) -> bool:
    """Whether a value is zero where all producers (and what else is ``quiet``) are zero."""
    if not isinstance(node, Node):
        return bool(node == 0)
    kind = plain_name(node)
    if node in quiet or kind == "softmax":  # an attention pattern counts as what it is made of
        return True
    bias = bind(node).get("bias")
    if node not in inside or kind in _LOUD or (isinstance(bias, Node) and bias not in quiet):
        return False
    operands = [arg for arg in node.args[:2] if isinstance(arg, (Node, int, float))]
    if kind in ("add", "sub"):
        return all(_silent(arg, inside, quiet) for arg in operands)
    if kind == "mul":
        factors = [arg for arg in operands if arg not in quiet or arg in inside]  # a scale is not born zero
        return any(_silent(arg, inside, quiet) for arg in factors)
    sources = [source for source in node.all_input_nodes if source in inside]
    return all(_silent(source, inside, quiet) for source in sources)


_JOINING = frozenset("softmax _softmax log_softmax _log_softmax cumsum flip roll sort".split())


def _outermost(layout: Layout, group: Leaf, axis: int) -> bool:
    """Whether the positions of a unit lie member after member."""
    match layout:
        case Product(parts):
            return parts[0] == group and axis in axes_of(layout)
        case Concat(parts):
            return all(_outermost(part, group, axis) for part in parts if axis in axes_of(part))
    return False


@dataclasses.dataclass(frozen=True, slots=True)
class _Written:
    """What one call writes of its layer's outputs: these positions of so many."""

    layer: str
    positions: range
    whole: int

    def gate(self, part: int, parts: int) -> Gate:
        """One of so many equal parts of what the call writes."""
        unit = len(self.positions) // parts
        start = self.positions.start + part * unit
        even = unit > 0 and start % unit == 0 and self.whole % unit == 0
        return Gate(self.layer, start // unit, self.whole // unit) if even else Gate(self.layer)


def _sources(node: Any, inside: set[Node], writes: dict[Node, _Written]) -> tuple[list[Gate], int]:
    """What of the producers' outputs reaches a node, and how many activations (softmax too) lie on the way."""
    found: list[Gate] = []
    bends, seen = 0, set()
    stack: list[tuple[Any, tuple[int, int]]] = [(node, (0, 1))]
    while stack:
        current, part = stack.pop()
        if not isinstance(current, Node) or (current, part) in seen or current not in inside:
            continue
        seen.add((current, part))
        if current in writes:
            found.append(writes[current].gate(*part))
            continue
        kind = plain_name(current)
        bends += kind in ACTIVATIONS or "softmax" in kind
        stack.extend((source, _part(current, part)) for source in current.all_input_nodes)
    return found, bends


def _part(node: Node, part: tuple[int, int]) -> tuple[int, int]:
    """Which part of its source a node takes: a piece of a chunk, one index of a stacked qkv."""
    if node.target is operator.getitem and isinstance(node.args[1], int):
        return node.args[1], len(node.args[0].meta["val"])  # type: ignore[union-attr]
    if short_name(node) == "select":
        source, dim, index = node.args[0], node.args[1], node.args[2]
        return int(index), int(source.meta["val"].shape[dim])  # type: ignore[arg-type, union-attr]
    return part
