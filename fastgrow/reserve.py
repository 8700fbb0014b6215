"""Room made ahead of growth, filled by it, and cut off again: no tensor changes its shape while there is room left."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import stages
from .arguments import as_list, copies_of, whole
from .cuda_graphs import check_not_captured
from .distributed import replicas_of
from .edits import EditBuilder, Edits, attribute_edits
from .enlarge import Block, Enlargement, filled
from .errors import GrowthError
from .how import GradMax, How
from .integrations.config import follow_configs
from .layout import Layout, Sizes, index_map, new_positions, run_start, size
from .room import check_blank, check_reservable, has_room
from .sharded import wrapped_modules
from .sites import Sites, tensors_of, unwrap
from .widen import AttributeEdit, TensorEdit, widen

__all__ = ["check_method", "check_room", "fitted", "release", "reserve"]


def reserve(
    model: nn.Module,
    widths: Mapping[str, int],
    *,
    sites: Sites,
    how: How | None = None,
    optimizer: Any = None,
    also: nn.Module | Iterable[nn.Module] = (),
) -> dict[str, int]:
    """Make room for growth ahead of it, so that growth into the room changes no tensor's shape.

    ``torch.compile`` then compiles nothing anew, parameters and optimizer states stay the same objects at the same
    addresses, and a DistributedDataParallel wrapper is not renewed. The network computes what it computed: reserved
    units have weights and biases of zero, output f(0) = 0, and receive gradients of exactly zero, so that they stay
    zero under weight decay, momentum and every optimizer that moves nothing without a gradient. They cost the FLOPs
    and the memory of units. They are no width: ``Sites.widths``, reports, plans, NAGN, and the norms that methods
    read count units alone.

    widths: {site name: width} up to which the site can then grow without a change of shapes, in the site's own count.
    how: the method that will grow into it (`how.GradMax`), whose replacements of activations are made now.
    optimizer, also: as in `fastgrow.grow`. `fastgrow.grow` and the Grower fill what room they find; where it is too
    small, the site is widened to what is asked for. `release` cuts off what is left. Optimizers that take means over
    a whole tensor (Adafactor, Muon, an AvaGrad that is made afterwards) count its reserved entries.

    Returns the units of room that each of these sites now has. Raises `GrowthError`, with everything as it was, for a
    width that is not above the present one, for sites whose units would not be inert or cannot be filled (attention
    heads, gates and groups, LayerNorm, RMSNorm or GroupNorm over the channels, activations with f(0) != 0, tied
    weights), for models wrapped by ``fully_shard``, and for methods that try growth on the model itself.
    """
    how = how if how is not None else GradMax()
    if not isinstance(widths, Mapping):
        raise GrowthError(f"reserve: widths={widths!r} was given; wanted a mapping {{site name: width}}")
    check_not_captured(model)
    check_room(model, sites, list(widths), how)
    now, physical = sites.sizes(model), sites.sizes(model, room=True)
    wanted = dict(physical)
    for name, width in widths.items():
        site = sites[name]
        if whole(f"reserve: site {name!r}", "width", width) <= now[site.axis]:
            raise GrowthError(
                f"reserve: site {name!r} has {now[site.axis]} units; wanted a width above that, {width} was given"
            )
        wanted[site.axis] = max(physical[site.axis], int(width))
    chosen = [sites[name] for name in widths]
    builder = EditBuilder(model, sites, {})
    edits = builder.edits([site.name for site in chosen if how.swaps(site)])
    names = dict.fromkeys(slot.tensor for site in chosen for slot in site.slots)
    live = [TensorEdit(name, {}, tuple(builder.tensors[name].shape)) for name in names]
    fitting = _Fitting(sites, now, now, physical, wanted)
    edits.tensors = [fitting.fit(edit, builder.tensors[edit.tensor]) for edit in live]
    edits.attributes = _attributes(model, sites, widths, edits.attributes, now, wanted)
    _carry_out(model, edits, optimizer, also)
    return {site.name: wanted[site.axis] - now[site.axis] for site in chosen}


def release(model: nn.Module, *, optimizer: Any = None, also: nn.Module | Iterable[nn.Module] = ()) -> nn.Module:
    """Cut off all room that was reserved and not filled; the network computes what it computed. Returns the model.

    optimizer, also: as in `fastgrow.grow`; they keep what belongs to the units. A model without room is left as it
    is. `fastgrow.finalize` does this first.
    """
    inner = unwrap(model)
    tensors = tensors_of(inner)
    edits = Edits()
    seen: set[int] = set()
    for name, positions in stages.live_in(inner).items():
        shape, axes = list(tensors[name].shape), {}
        for dim, index in positions.items():
            axes[dim] = torch.full((shape[dim],), -1, device="cpu")
            axes[dim][index] = torch.arange(len(index), device="cpu")
            shape[dim] = len(index)
        if id(tensors[name]) not in seen:
            room = {dim: torch.zeros(0, dtype=torch.int64, device="cpu") for dim in axes}
            edits.tensors.append(TensorEdit(name, axes, tuple(shape), room=room))
        seen.add(id(tensors[name]))
    for name, module in inner.named_modules():
        edits.attributes += [AttributeEdit(name, key, value) for key, value in stages.without_room(module).items()]
    if edits.tensors:
        check_blank(inner)
        _carry_out(model, edits, optimizer, also)
    return model


def check_room(model: nn.Module, sites: Sites, names: Iterable[str], how: How) -> None:
    """Raises `GrowthError` unless all of these sites can have room that this method fills."""
    if wrapped_modules(unwrap(model)):
        raise GrowthError("room cannot be reserved in a model wrapped by fully_shard; grow it without")
    check_method(how)
    for name in names:
        check_reservable(sites, sites[name])


def check_method(how: How) -> None:
    if not how.fills_room:
        raise GrowthError(
            f"how.{how.name} tries growth on the model itself or reads its units one by one, and cannot fill reserved "
            "room; use another method (how.GradMax), or call fg.release first"
        )


def fitted(model: nn.Module, sites: Sites, edits: Edits, units: Mapping[str, int], round_to: int = 1) -> Edits:
    """Edits of the network without its room, as edits of the one with it: new units take its first places.

    Where it is too small, and where there is none, the site is widened to what it needs, rounded up to a multiple of
    `round_to`; what is left over is room.
    """
    if round_to == 1 and not has_room(model):
        return edits
    now, physical = sites.sizes(model), sites.sizes(model, room=True)
    if now == physical and round_to == 1:
        return edits
    check_blank(unwrap(model))
    after, wanted = dict(now), dict(physical)
    for name, count in units.items():
        site = sites[name]
        after[site.axis] += count // site.step
        if after[site.axis] > physical[site.axis]:
            wanted[site.axis] = -(-after[site.axis] // round_to) * round_to
    present = tensors_of(model)
    fitting = _Fitting(sites, now, after, physical, wanted)
    tensors = [fitting.fit(edit, present[edit.tensor]) for edit in edits.tensors]
    attributes = _attributes(model, sites, units, edits.attributes, after, wanted)
    return Edits(tensors, attributes, edits.swaps)


@dataclass(frozen=True)
class _Fitting:
    """Axes' sizes before and after a growth, and the same with room: physical, wanted."""

    sites: Sites
    now: Sizes
    after: Sizes
    physical: Sizes
    wanted: Sizes
    moves: dict[Layout, tuple[Tensor, Tensor]] = field(default_factory=dict)  # index map and room, one for a layout

    def fit(self, edit: TensorEdit, tensor: Tensor) -> TensorEdit:
        """The edit of a tensor with room."""
        layouts = self.sites.layouts(edit.tensor)
        axes, room, shape = {}, {}, list(edit.shape)
        for dim, layout in layouts.items():
            if size(layout, self.now) != size(layout, self.wanted):
                axes[dim], room[dim] = self._moves(layout)
                shape[dim] = size(layout, self.wanted)
        variance = any(
            slot.role == "running_var" for site in self.sites for slot in site.slots if slot.tensor == edit.tensor
        )
        fresh: Tensor | tuple[Block, ...] | None = edit.fresh
        if variance or (isinstance(fresh, tuple) and (fresh := self._blocks(fresh, layouts)) is None):
            fresh = self._spaced(_whole(edit, tensor), layouts, self.after, self.wanted, float(variance))
        elif isinstance(fresh, Tensor):
            fresh = self._spaced(fresh, layouts, self.after, self.wanted)
        scale, shift = edit.scale, edit.shift
        present = [size(layouts[dim], self.now) if dim in layouts else n for dim, n in enumerate(tensor.shape)]
        if isinstance(scale, Tensor):
            scale = self._spaced(scale.expand(present), layouts, self.now, self.physical, 1.0)
        if shift is not None:
            shift = self._spaced(shift.expand(present), layouts, self.now, self.physical)
        return TensorEdit(edit.tensor, axes, tuple(shape), fresh, scale, shift, room)

    def _moves(self, layout: Layout) -> tuple[Tensor, Tensor]:
        if layout not in self.moves:
            index = torch.full((size(layout, self.physical),), -1, device="cpu")
            index[index_map(layout, self.now, self.physical)] = index_map(layout, self.now, self.wanted)
            self.moves[layout] = index, new_positions(layout, self.after, self.wanted)
        return self.moves[layout]

    def _blocks(self, blocks: tuple[Block, ...], layouts: Mapping[int, Layout]) -> tuple[Block, ...] | None:
        """The same values at their places among the room; None where those are scattered."""
        moved = []
        for block in blocks:
            offset = list(block.offset)
            for dim, layout in layouts.items():
                if size(layout, self.after) != size(layout, self.wanted):
                    length = block.values.shape[dim]
                    places = index_map(layout, self.after, self.wanted)[offset[dim] : offset[dim] + length]
                    start = run_start(places)
                    if start is None:
                        return None
                    offset[dim] = start
            moved.append(Block(tuple(offset), block.values))
        return tuple(moved)

    def _spaced(
        self, values: Tensor, layouts: Mapping[int, Layout], small: Sizes, large: Sizes, blank: float = 0.0
    ) -> Tensor:
        """Values of the network without room, put where its units are among the room."""
        before = tuple(values.shape)
        behind = tuple(size(layouts[dim], large) if dim in layouts else n for dim, n in enumerate(before))
        maps = {dim: index_map(layouts[dim], small, large) for dim in layouts if before[dim] != behind[dim]}
        return Enlargement.checked("room", before, behind, maps).place(values.contiguous(), blank)


def _whole(edit: TensorEdit, tensor: Tensor) -> Tensor:
    """The new values of an edit as one tensor, zero where it gives none."""
    if isinstance(edit.fresh, Tensor):
        return edit.fresh
    return filled(edit.shape, edit.fresh or (), tensor)


def _attributes(
    model: nn.Module, sites: Sites, names: Iterable[str], others: Iterable[AttributeEdit], after: Sizes, wanted: Sizes
) -> list[AttributeEdit]:
    """The attributes that repeat sizes of these sites, with and without room; others as they are."""
    edits = {(edit.module, edit.attribute): edit for edit in others}
    names = list(names)
    pairs = zip(*(attribute_edits(unwrap(model), sites, names, sizes) for sizes in (wanted, after)), strict=True)
    for edit, bare in pairs:
        without_room = None if edit.value == bare.value else bare.value
        edits[edit.module, edit.attribute] = dataclasses.replace(edit, without_room=without_room)
    return list(edits.values())


def _carry_out(model: nn.Module, edits: Edits, optimizer: Any, also: nn.Module | Iterable[nn.Module]) -> None:
    replicas = replicas_of(model)
    if replicas is not None:
        replicas.check_renewable()
    widen(
        unwrap(model),
        edits.tensors,
        attributes=edits.attributes,
        swaps=edits.swaps,
        optimizers=as_list(optimizer),
        also=copies_of(also),
    )
    if replicas is not None:
        replicas.renew()
    follow_configs(unwrap(model))
