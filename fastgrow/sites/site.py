"""What can grow: `Site`, and `Sites`, the sequence of them that `find_sites` returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import torch
from torch import Tensor, nn

from .. import stages
from ..errors import GrowthError
from ..insertions import places
from ..layout import Layout, Leaf, axes_of, size
from ..names import named_modules_in
from .graph import Followed, unwrap

__all__ = [
    "Activation",
    "AttributeRule",
    "Gate",
    "LayerInfo",
    "Norm",
    "Site",
    "Sites",
    "Slot",
    "live_tensors",
    "tensors_of",
]


@dataclass(frozen=True, slots=True)
class Slot:
    """One dimension of one parameter or buffer along which a site's units lie.

    role: "producer" (the output dimension of a weight that writes the units; also an embedding's),
    "bias" (of such a layer), "consumer" (the input dimension of a weight that reads them),
    "norm_weight", "norm_bias", "running_mean", "running_var" (of a normalisation), "middle" and
    "middle_bias" (a depthwise convolution's), "slope" (PReLU's), "scale" and "shift" (any other per-channel
    parameter, multiplied or added).
    members: the dimension of a stacked weight that numbers its matrices, one for each expert or ensemble member.
    """

    tensor: str  # name in model.state_dict()
    dim: int
    layout: Layout
    role: str
    layer: str  # the module that owns it; for a weight used by a function call, the weight's own name
    members: int | None = None

    def order(self, rank: int) -> tuple[int, ...]:
        """The dimensions of a producer's or consumer's weight as (out, in, *kernel); members stand last."""
        if self.members is not None:
            other = 3 - self.members - self.dim
            pair = (self.dim, other) if self.role == "producer" else (other, self.dim)
            return (*pair, self.members)
        pair = (0, 1) if (self.dim == 0) == (self.role == "producer") else (1, 0)
        return (*pair, *range(2, rank))

    def canonical(self, weight: Tensor) -> Tensor:
        """A producer's or consumer's weight as (out, in, *kernel); of a stacked layer (out, in, members)."""
        order = self.order(weight.dim())
        return weight if order == tuple(range(weight.dim())) else weight.permute(order)

    def own(self, weight: Tensor) -> Tensor:
        """The inverse of `canonical`: dimensions in the tensor's own order."""
        order = self.order(weight.dim())
        return weight.permute([order.index(dim) for dim in range(len(order))])


@dataclass(frozen=True, slots=True)
class AttributeRule:
    """A module attribute that holds the size of a dimension (``out_channels``, ``num_heads``)."""

    module: str
    attribute: str
    layout: Layout


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation between a site's producers and consumers."""

    kind: str  # "relu", "gelu", ...: the name of its ATen op
    module: str | None  # None where it is a function call


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation that the site's channels pass."""

    kind: str  # "batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"
    module: str


@dataclass(frozen=True, slots=True)
class Gate:
    """Part of a producer's output (``part`` of ``parts`` equal ones) that multiplies other channels."""

    layer: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """A linear or convolution layer: its place in the forward order, what lies behind it."""

    name: str
    position: int
    weight: str  # name in model.state_dict()
    norm: str | None = None  # name of the normalisation module that reads its output
    activation: str | None = None  # "relu", "gelu", ...; None where none follows
    activation_module: str | None = None  # its module's name; None where it is a function call
    is_output: bool = False  # it reaches an output of the model, and no other layer on any way to one


@dataclass(frozen=True, slots=True)
class Site:
    """A set of channels that must grow together. Holds names, never modules.

    width, multiple: in channels; for attention in heads (grouped-query: in groups of heads).
    gates: what must not start at zero, or the growth matrix of the rest vanishes (the gate of a gated MLP,
    queries and keys of attention): a producer, and which part of its output where several share a weight.
    separate: a unit has one channel in each group of a grouped convolution, or in each member of a stack of
    matrices (`stacked`), with weights of its own.
    """

    name: str
    axis: int  # the axis of the layouts that grows
    width: int  # when the site was found
    multiple: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    slots: tuple[Slot, ...]
    step: int = 1  # channels (heads) that one step of the axis stands for
    heads: bool = False
    gates: tuple[Gate, ...] = ()
    separate: bool = False
    attributes: tuple[AttributeRule, ...] = ()
    activations: tuple[Activation, ...] = ()
    norms: tuple[Norm, ...] = ()
    middle: tuple[str, ...] = ()  # nodes of the exported graph that carry the units, in order
    at_once: int | None = None  # the most units that one growth can add, where a method sets a bound

    @property
    def layers(self) -> tuple[str, ...]:
        """Every layer with weights on the site: producers, consumers, depthwise ones between."""
        middle = (slot.layer for slot in self.slots if slot.role == "middle")
        return tuple(dict.fromkeys((*self.producers, *middle, *self.consumers)))

    @property
    def stacked(self) -> bool:
        """Whether one of its weights holds a matrix for each of several members."""
        return any(slot.members is not None for slot in self.slots)

    def slots_of(self, *roles: str) -> tuple[Slot, ...]:
        return tuple(slot for slot in self.slots if slot.role in roles)

    @property
    def tied(self) -> tuple[str, ...]:
        """Tensors that write and read the units along one dimension: new entries cannot be zero on one side only."""
        written = {(slot.tensor, slot.dim) for slot in self.slots_of("producer")}
        return tuple(sorted(s.tensor for s in self.slots_of("consumer") if (s.tensor, s.dim) in written))

    def weight(self, layer: str, role: str) -> Slot:
        """The slot of a producer's or consumer's weight."""
        return next(slot for slot in self.slots if slot.layer == layer and slot.role == role)


@dataclass(frozen=True)
class Sites(Sequence[Site]):
    """The sites of a model, by position or by name; valid for every copy of the model, in any mode and process.

    They pickle (a few hundred bytes for each op of the model), with `torch.save` too; another release of torch or
    fastgrow finds its own.
    layers: every linear and convolution layer in forward order. frozen: layers whose outputs cannot
    grow, and why. constants: the sizes of the axes that no site grows. left_out: sites that were found but
    not asked for; other sites' layouts may hold their axes. inserted: where layers stood that were inserted before.
    """

    items: tuple[Site, ...]
    layers: Mapping[str, LayerInfo]
    frozen: Mapping[str, str]
    constants: Mapping[int, int] = field(default_factory=dict, repr=False)
    left_out: tuple[Site, ...] = field(default=(), repr=False)
    graph: Followed | None = field(default=None, repr=False, compare=False)
    inserted: frozenset[str] = field(default=frozenset(), repr=False)

    @overload
    def __getitem__(self, key: int | str) -> Site: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Site, ...]: ...
    def __getitem__(self, key: int | str | slice) -> Site | tuple[Site, ...]:
        if not isinstance(key, str):
            return self.items[key]
        for site in self.items:
            if site.name == key:
                return site
        if key in self.frozen:
            raise GrowthError(f"layer {key!r} cannot grow: {self.frozen[key]}")
        site_of = next((site.name for site in self.items if key in site.producers), None)
        if site_of is not None:
            raise GrowthError(f"layer {key!r} grows together with others: name their site, {site_of!r}")
        known = ", ".join(site.name for site in self.items) or "none"
        raise GrowthError(f"no site is named {key!r}; the sites found are: {known}")

    def __deepcopy__(self, memo: object) -> Sites:
        return self  # nothing of it ever changes, and it serves copies of the model as well

    def __contains__(self, key: object) -> bool:
        return any(site is key or site.name == key for site in self.items)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def without(self, reasons: Mapping[str, str]) -> Sites:
        """The same but for these sites, which are left out, each with its reason in `frozen`."""
        return replace(
            self,
            items=tuple(site for site in self if site.name not in reasons),
            left_out=(*self.left_out, *(site for site in self if site.name in reasons)),
            frozen={**self.frozen, **reasons},
        )

    def layouts(self, tensor: str) -> dict[int, Layout]:
        """The layout of each dimension of a tensor; of those that the sites name, where no graph tells them all."""
        if self.graph is not None and tensor in self.graph.tensor_dims:
            return dict(enumerate(self.graph.tensor_dims[tensor]))
        return {slot.dim: slot.layout for site in self for slot in site.slots if slot.tensor == tensor}

    def sizes(self, model: nn.Module, *, room: bool = False) -> dict[int, int]:
        """Every axis number -> its present size in this model; room: what is reserved for growth included.

        raises: GrowthError where the model's tensors do not fit the sites (another model, or one that
        was resized by hand), and where a layer was inserted since they were found.
        """
        inner = unwrap(model)
        named = named_modules_in(inner)
        shapes = {name: tensor.shape for name, tensor in _tensors_in(named).items()}
        for name, positions in () if room else stages.live_in(inner, named).items():
            lengths = {dim: len(index) for dim, index in positions.items()}
            shapes[name] = torch.Size(lengths.get(dim, length) for dim, length in enumerate(shapes[name]))
        return self._sizes(inner, named, shapes)

    def present(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[int, int]]:
        """`live_tensors` and `sizes` of this model, in one look."""
        inner = unwrap(model)
        named = named_modules_in(inner)
        tensors = _live_tensors_in(inner, named)
        return tensors, self._sizes(inner, named, {name: tensor.shape for name, tensor in tensors.items()})

    def _sizes(
        self, model: nn.Module, named: Sequence[tuple[str, nn.Module]], shapes: Mapping[str, torch.Size]
    ) -> dict[int, int]:
        later = places(model, [module for _, module in named]) - self.inserted
        if later:
            raise GrowthError(
                f"a layer was inserted at {min(later)!r} after these sites were found: find them again with "
                "fastgrow.find_sites (for a Grower: use Grower.insert_layer, or set its sites)"
            )
        sizes = dict(self.constants)
        missing = _read(sizes, (*self.items, *self.left_out), shapes)
        if missing:
            raise GrowthError(f"site {missing[0].name!r}: its width cannot be read from the model's tensors")
        return sizes

    def width(self, model: nn.Module, site: Site | str) -> int:
        """The present width of a site in this model."""
        chosen = self[site] if isinstance(site, str) else site
        return self.sizes(model)[chosen.axis] * chosen.step

    def widths(self, model: nn.Module) -> dict[str, int]:
        """The present width of every site in this model."""
        sizes = self.sizes(model)
        return {site.name: sizes[site.axis] * site.step for site in self.items}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of the model under all its names."""
    return _tensors_in(named_modules_in(unwrap(model)))


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`tensors_of`, those with reserved room detached and without it."""
    inner = unwrap(model)
    return _live_tensors_in(inner, named_modules_in(inner))


def _tensors_in(named: Sequence[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    registries: list[tuple[str, Mapping[str, Tensor | None]]]
    registries = [(prefix, module._parameters) for prefix, module in named if module._parameters]
    registries += [(prefix, module._buffers) for prefix, module in named if module._buffers]
    return {
        f"{prefix}.{leaf}" if prefix else leaf: tensor
        for prefix, registry in registries
        for leaf, tensor in registry.items()
        if tensor is not None
    }


def _live_tensors_in(model: nn.Module, named: Sequence[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    tensors = _tensors_in(named)
    for name, positions in stages.live_in(model, named).items():
        tensors[name] = stages.live_part(tensors[name].detach(), positions)
    return tensors


def unreadable(sites: Sequence[Site], shapes: Mapping[str, torch.Size], known: Mapping[int, int]) -> list[Site]:
    """The fewest sites, first come, that must keep their widths for the others' to be told from the tensors."""
    sizes, found = dict(known), []
    while missing := _read(sizes, sites, shapes):
        found.append(missing[0])
        sizes[missing[0].axis] = missing[0].width // missing[0].step
    return found


def _read(sizes: dict[int, int], sites: Sequence[Site], shapes: Mapping[str, torch.Size]) -> list[Site]:
    """Enter the sites' sizes, each as soon as those it shares its tensors with are known; returns the rest."""
    rest = [site for site in sites if site.axis not in sizes]
    while rest:
        left = []
        for site in rest:
            found = _axis_size(site, shapes, sizes)
            if found is None:
                left.append(site)
            else:
                sizes[site.axis] = found
        if len(left) == len(rest):
            break
        rest = left
    return rest


def _axis_size(site: Site, shapes: Mapping[str, torch.Size], known: Mapping[int, int]) -> int | None:
    """Solve a dimension's length for the size of the site's axis: it is linear in it. None: others come first."""
    for slot in site.slots:
        others = [axis for axis in axes_of(slot.layout) if axis != site.axis and axis not in known]
        if others:
            continue
        if slot.tensor not in shapes:
            raise GrowthError(f"site {site.name!r} was found in another model: {slot.tensor!r} is not in this one")
        length = shapes[slot.tensor][slot.dim]
        if isinstance(slot.layout, Leaf):  # the axis itself
            return length
        base = size(slot.layout, {**known, site.axis: 0})
        slope = size(slot.layout, {**known, site.axis: 1}) - base
        if slope <= 0 or (length - base) % slope or length < base:
            raise GrowthError(
                f"site {site.name!r}: {slot.tensor!r} has {length} entries in dimension {slot.dim}, which is no "
                f"{base} + {slope} x n; the model was resized since its sites were found: find them again"
            )
        return (length - base) // slope
    return None
