"""From the starts of new units to the edits of tensors, attributes and activations that make them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .birth import ZERO_ROLES, birth_values
from .enlarge import Block, filled
from .errors import GrowthError
from .growth_map import check_untied
from .layout import Layout, index_map, new_positions, run_start, size, unit_positions, whole_unit_positions
from .names import eps_of, find_module
from .newborns import Newborns, Start
from .nn import twin
from .sites import Site, Sites, Slot, unwrap
from .widen import AttributeEdit, ModuleSwap, TensorEdit

__all__ = ["EditBuilder", "Edits", "build_edits"]


@dataclass
class Edits:
    """What `fastgrow.widen` is given."""

    tensors: list[TensorEdit] = field(default_factory=list)
    attributes: list[AttributeEdit] = field(default_factory=list)
    swaps: list[ModuleSwap] = field(default_factory=list)


def build_edits(
    model: nn.Module,
    sites: Sites,
    units: Mapping[str, int],
    starts: Mapping[str, Start],
    swapping: Iterable[str] = (),
    *,
    rewriting: bool = False,
) -> Edits:
    """All edits that grow the given sites together; nothing is changed.

    starts: by site name; sites without one get `fastgrow.birth`'s values. swapping: names of the sites
    whose activation modules are replaced by their twins. rewriting: as in `EditBuilder`.
    """
    builder = EditBuilder(model, sites, units, rewriting)
    for name in units:
        builder.add(sites[name], starts.get(name) or Start())
    return builder.edits(swapping)


class EditBuilder:
    """Edits, one site after the other.

    rewriting: sites may copy units and change present values (`Start.sources`, `rescale`, `shift`), and each
    sees those added before it as grown: `newborns` shows the network in between.
    seed: the axes' sizes that starts were made for, where other sites have grown since.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        units: Mapping[str, int],
        rewriting: bool = False,
        seed: Mapping[int, int] | None = None,
    ) -> None:
        self.model = unwrap(model)
        self.sites = sites
        self.units = units
        self.rewriting = rewriting
        self.tensors, self.old = sites.present(model)
        self.seed = self.old if seed is None else seed
        self.now = dict(self.old)
        self.new = dict(self.old)
        for name, count in units.items():
            self.new[sites[name].axis] += count // sites[name].step
        self.fresh: dict[str, Tensor] = {}
        self.blocks: dict[str, list[Block]] = {}
        self.axes: dict[str, dict[int, Tensor]] = {}
        self.moved: dict[Layout, Tensor] = {}  # one index map for all tensors of a layout
        self.shapes: dict[str, list[int]] = {}
        self.scales: dict[str, float | Tensor] = {}
        self.shifts: dict[str, Tensor] = {}
        self.rescaled: list[AttributeEdit] = []

    def newborns(self, site: Site) -> Newborns:
        """A site's new units, in the network as grown so far."""
        if not self.rewriting:
            return Newborns(self.model, self.sites, site, self.units[site.name], None, self.tensors, self.old)
        return Newborns(self.model, self.sites, site, self.units[site.name], None, _Present(self), dict(self.now))

    def add(self, site: Site, start: Start) -> None:
        if site.tied and (start.sources is not None or _writes(start)):
            check_untied(site)
        for name in (*(slot.tensor for slot in site.slots), *start.rescale, *start.shift):
            self._open(name)
        if self.rewriting:
            self._copy(site, start)
            self._rewrite(start)
        for slot in site.slots:
            self._fill(site, slot, self._value(site, slot, start), start)
        self._rms(site, start)
        if self.rewriting:
            self.now[site.axis] = self.new[site.axis]

    def _open(self, name: str) -> None:
        """The enlarged tensor, its old positions known, its new ones zero."""
        if name in self.shapes:
            return
        tensor = self.tensors[name]
        layouts = self._layouts(name)
        shape = list(tensor.shape)
        axes: dict[int, Tensor] = {}
        for dim, layout in layouts.items():
            if size(layout, self.new) != shape[dim]:
                if layout not in self.moved:
                    self.moved[layout] = index_map(layout, self.old, self.new)
                axes[dim] = self.moved[layout]
                shape[dim] = size(layout, self.new)
        self.axes[name], self.shapes[name] = axes, shape
        if self.rewriting:
            self._values(name)[self._grid(name, self.old)] = tensor.detach()

    def _values(self, name: str) -> Tensor:
        """The new values of a tensor whole, for those that come in no blocks."""
        if name not in self.fresh:
            self.fresh[name] = filled(self.shapes[name], self.blocks.pop(name, ()), self.tensors[name])
        return self.fresh[name]

    def _grid(self, name: str, sizes: Mapping[int, int], *, of: Mapping[int, int] | None = None) -> Any:
        """Index of the positions that a tensor has at these sizes, in one of the sizes `of` (the final ones)."""
        target = self.new if of is None else of
        layouts = self._layouts(name)
        tensor = self.tensors[name]
        return _open_grid(
            [
                index_map(layouts[dim], sizes, target) if dim in layouts else torch.arange(tensor.shape[dim])
                for dim in range(tensor.dim())
            ],
            tensor.device,
        )

    def present(self, name: str) -> Tensor:
        """A tensor as the sites added so far have left it."""
        if name not in self.fresh:
            return self.tensors[name]
        return self.fresh[name][self._grid(name, self.now)]

    def _copy(self, site: Site, start: Start) -> None:
        """Copies of units in every tensor of the site; a unit and its copies share what they write."""
        if start.sources is None:
            return
        width = self.old[site.axis]
        chosen = (start.sources >= 0).nonzero().squeeze(1)
        sources = start.sources[chosen].cpu()
        copies = torch.bincount(sources, minlength=width) + 1
        share = copies.double() ** -start.share
        for slot in site.slots:
            target = self.fresh[slot.tensor]
            positions = whole_unit_positions(slot.layout, site.axis, self.new).to(target.device)
            taken = target.index_select(slot.dim, positions[sources.to(target.device)].reshape(-1))
            target.index_copy_(slot.dim, positions[width + chosen.to(target.device)].reshape(-1), taken)
        for slot in site.slots_of("consumer"):
            tensor = self.tensors[slot.tensor]
            units = whole_unit_positions(slot.layout, site.axis, self.new)
            factor = torch.ones(self.shapes[slot.tensor][slot.dim], dtype=torch.float64)
            for numbers, values in ((torch.arange(width), share), (width + chosen, share[sources])):
                factor[units[numbers]] = values[:, None]
            along = [1] * tensor.dim()
            along[slot.dim] = -1
            self._scale(slot.tensor, factor.to(tensor.device, tensor.dtype).reshape(along))

    def _scale(self, name: str, factor: Tensor) -> None:
        """Multiply by a factor that is broadcast against the final shape."""
        self.fresh[name] *= factor
        known = self.scales.get(name, 1.0)
        self.scales[name] = factor.expand(self.shapes[name])[self._grid(name, self.old)] * known
        if name in self.shifts:
            self.shifts[name] = self.shifts[name] * factor.expand(self.shapes[name])[self._grid(name, self.old)]

    def _rewrite(self, start: Start) -> None:
        """Factors and summands of the values that are there before this site grows."""
        for name, factor in start.rescale.items():
            whole = torch.ones_like(self.fresh[name])
            whole[self._grid(name, self.now)] = self._spread(name, factor)
            self._scale(name, whole)
        for name, summand in start.shift.items():
            if tuple(summand.shape) == tuple(self.tensors[name].shape):  # of the seed of this growth
                self.fresh[name][self._grid(name, self.old)] += summand
                self.shifts[name] = self.shifts[name] + summand if name in self.shifts else summand
                continue
            present = self._spread(name, summand)
            self.fresh[name][self._grid(name, self.now)] += present
            own = present[self._grid(name, self.old, of=self.now)]
            self.shifts[name] = self.shifts[name] + own if name in self.shifts else own

    def _spread(self, name: str, value: Tensor | float) -> Tensor:
        layouts, tensor = self._layouts(name), self.tensors[name]
        shape = [size(layouts[dim], self.now) if dim in layouts else tensor.shape[dim] for dim in range(tensor.dim())]
        return torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device).expand(shape)

    def _layouts(self, name: str) -> dict[int, Any]:
        return self.sites.layouts(name)

    def _value(self, site: Site, slot: Slot, start: Start) -> Tensor | None:
        """The new part along one slot, in the tensor's own order of dimensions; None for zeros."""
        part: Mapping[str, Tensor] = {}
        if slot.role == "producer":
            part = start.incoming
        elif slot.role == "consumer":
            part = start.outgoing
        elif slot.role == "bias":
            part = start.bias
        value = part.get(slot.layer)
        if value is not None:
            return value if slot.role == "bias" else slot.own(value)
        if slot.tensor in start.values:
            return start.values[slot.tensor]
        if slot.role in ZERO_ROLES:
            return None
        present = self.present(slot.tensor) if self.rewriting else self.tensors[slot.tensor]
        value = birth_values(slot.role, present.detach(), slot.dim, len(self._positions(site, slot)))
        if start.sources is not None:  # born where nothing was copied
            unit = unit_positions(slot.layout, site.axis, {**self.new, site.axis: len(start.sources)})
            copied = unit[start.sources.cpu() >= 0].reshape(-1).to(value.device)
            value.index_fill_(slot.dim, copied, 0)
        return value

    def _positions(self, site: Site, slot: Slot) -> Tensor:
        before = {**self.new, site.axis: self.old[site.axis]}
        return new_positions(slot.layout, before, self.new)

    def _fill(self, site: Site, slot: Slot, value: Tensor | None, start: Start) -> None:
        if value is None:
            return
        name, layouts, shape = slot.tensor, self._layouts(slot.tensor), self.shapes[slot.tensor]
        index = {slot.dim: self._positions(site, slot)}  # of the dimensions that are not written whole
        for dim, length in enumerate(shape):
            if dim != slot.dim and dim in layouts and value.shape[dim] != length:
                lengths = [(size(layouts[dim], sizes), sizes) for sizes in (self.now, self.old)]
                known = next((sizes for length, sizes in lengths if length == value.shape[dim]), self.seed)
                index[dim] = index_map(layouts[dim], known, self.new)
        wanted = list(shape)
        for dim, positions in index.items():
            wanted[dim] = positions.shape[0]
        if list(value.shape) != wanted:
            raise GrowthError(
                f"site {site.name!r}: new values of shape {tuple(value.shape)} were given for {name!r}, wanted "
                f"{tuple(wanted)}"
            )
        if name not in self.fresh and not self.rewriting:
            starts = {dim: run_start(positions) for dim, positions in index.items()}
            if None not in starts.values():
                offset = tuple(starts.get(dim) or 0 for dim in range(len(shape)))
                block = Block(offset, value.to(self.tensors[name]).contiguous())
                self.blocks.setdefault(name, []).append(block)
                return
        target = self._values(name)
        grid = _open_grid([index.get(dim, torch.arange(n)) for dim, n in enumerate(shape)], target.device)
        if start.sources is None:
            target[grid] = value.to(target)
        else:
            target[grid] += value.to(target)

    def _rms(self, site: Site, start: Start) -> None:
        """RMSNorm over n' channels, n'-n of them zero, keeps its output with these weights and this eps."""
        if start.sources is not None:  # copied as a whole: its mean square is what it was
            return
        for norm in site.norms:
            if norm.kind != "rms_norm":
                continue
            module = find_module(self.model, norm.module)
            ratio = self.old[site.axis] / self.new[site.axis]
            for slot in site.slots:
                if slot.layer == norm.module and slot.role in ("norm_weight", "scale"):
                    self.scales[slot.tensor] = ratio**0.5
                    self._values(slot.tensor).mul_(ratio**0.5)
            eps = eps_of(module)
            if eps is None:
                raise GrowthError(
                    f"site {site.name!r}: {norm.module!r} (RMSNorm) has no number as its eps among its attributes, so "
                    "its output would not be kept; build it with one (nn.RMSNorm(..., eps=1e-6)), or exclude the site"
                )
            self.rescaled.append(AttributeEdit(norm.module, eps[0], eps[1] * ratio))

    def edits(self, swapping: Iterable[str] = ()) -> Edits:
        """What `widen` is given. swapping: sites whose activation modules are replaced by their twins.

        Attention modules whose tensors change shape are replaced by theirs in any case.
        """
        result = Edits(self._tensor_edits(), self._attribute_edits())
        names = [a.module for name in swapping for a in self.sites[name].activations if a.module is not None]
        names += [name for edit in result.tensors if (name := self._attention_of(edit.tensor)) is not None]
        for name in dict.fromkeys(names):
            module = find_module(self.model, name)
            replacement = twin(module) if module is not None else None
            if replacement is not None and not name:
                kind = type(replacement).__name__
                raise GrowthError(
                    f"the model itself is a torch.nn.{kind}, which cannot be replaced from inside; put it into a "
                    f"module (nn.Sequential), or build it as fastgrow.nn.{kind}"
                )
            if replacement is not None:
                result.swaps.append(ModuleSwap(name, replacement))
        return result

    def _attention_of(self, tensor: str) -> str | None:
        """The name of the ``nn.MultiheadAttention`` that a tensor belongs to, or None."""
        owner = tensor.rpartition(".")[0]
        for name in (owner, owner.rpartition(".")[0]):
            if isinstance(find_module(self.model, name), nn.MultiheadAttention):
                return name
        return None

    def _tensor_edits(self) -> list[TensorEdit]:
        return [
            TensorEdit(
                name,
                self.axes[name],
                tuple(self.shapes[name]),
                self.fresh.get(name, tuple(self.blocks.get(name, ())) or None),
                self.scales.get(name, 1.0),
                self.shifts.get(name),
            )
            for name in self.shapes
        ]

    def _attribute_edits(self) -> list[AttributeEdit]:
        sizes = attribute_edits(self.model, self.sites, self.units, self.new)
        unique = {(edit.module, edit.attribute): edit for edit in (*self.rescaled, *sizes)}
        return list(unique.values())


def attribute_edits(
    model: nn.Module, sites: Sites, names: Iterable[str], new: Mapping[int, int]
) -> list[AttributeEdit]:
    """The attributes that repeat the sizes of these sites' axes (``out_channels``), with their new values."""
    edits = []
    for name in names:
        for rule in sites[name].attributes:
            value: Any = size(rule.layout, new)
            present = getattr(find_module(model, rule.module), rule.attribute, None)
            edits.append(AttributeEdit(rule.module, rule.attribute, (value,) if isinstance(present, tuple) else value))
    return edits


def _writes(start: Start) -> bool:
    return any(bool(values.any()) for part in (start.incoming, start.outgoing) for values in part.values())


def _open_grid(index: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Index vectors, one for each dimension, shaped so that they broadcast to their grid."""
    return tuple(
        positions.to(device).reshape([-1 if at == dim else 1 for at in range(len(index))])
        for dim, positions in enumerate(index)
    )


class _Present(Mapping[str, Tensor]):
    """The model's tensors by name, grown as far as the builder has come."""

    def __init__(self, builder: EditBuilder) -> None:
        self._builder = builder

    def __getitem__(self, name: str) -> Tensor:
        return self._builder.present(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._builder.tensors)

    def __len__(self) -> int:
        return len(self._builder.tensors)
