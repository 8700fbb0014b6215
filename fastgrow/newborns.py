"""The new units of one site: what a growth method is given to start them, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from .errors import GrowthError
from .layout import Leaf, new_positions, restricted_size, unit_positions, whole_unit_positions
from .members import Channels, Side
from .norm_series import amplification
from .sites import Site, Sites, Slot, live_tensors
from .solve import Directions
from .units import gather

__all__ = ["Newborns", "Start"]


@dataclass
class Start:
    """How the units of one site begin. What is left out is as `fastgrow.birth` says: zero weights.

    Methods with `How.rewrites` may also copy units and change present values:
    sources: (steps,) int64, the present unit that each new one is a copy of, in every tensor of the site; -1 for
    none. What is given besides is added to the copy. share: the outgoing columns of a unit and its c - 1 copies are
    multiplied by c^-share (1: the function stays). rescale, then shift: tensor -> factor, summand of its present
    values, broadcast against its shape as `Newborns` shows it; copies are taken before.

    incoming: producer -> (new rows, in, *kernel); bias: producer -> (new rows,); outgoing: consumer ->
    (out, new columns, *kernel); values: any other tensor of the site -> its new part. Rows and columns
    stand in the order of their positions in the layer.
    attained: squared norm of the loss gradient that the new weights receive at the first step, where the
    method knows it; a tensor () stays on its device. random: units beyond the growth matrix's rank, started at
    random.
    """

    incoming: dict[str, Tensor] = field(default_factory=dict)
    bias: dict[str, Tensor] = field(default_factory=dict)
    outgoing: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    sources: Tensor | None = None
    share: float = 1.0
    rescale: dict[str, Tensor | float] = field(default_factory=dict)
    shift: dict[str, Tensor] = field(default_factory=dict)
    captured: float | None = None
    attained: Tensor | float | None = None
    random: int = 0


@dataclass
class Newborns:
    """The new units of one site, as a method sees them: shapes, norms of the old ones, directions."""

    model: nn.Module
    sites: Sites
    site: Site
    units: int  # channels (heads), a multiple of site.multiple
    directions: Directions | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # of the model, unless sites before have grown
    sizes: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors = self.tensors or live_tensors(self.model)
        self.sizes = self.sizes or self.sites.sizes(self.model)
        self.steps = self.units // self.site.step

    @property
    def _grown(self) -> dict[int, int]:
        return {**self.sizes, self.site.axis: self.steps}

    def weight(self, layer: str, role: str) -> Tensor:
        """A producer's or consumer's present weight as (out, in, *kernel); of a stacked layer (out, in, members)."""
        slot = self.site.weight(layer, role)
        return slot.canonical(self.tensors[slot.tensor].detach())

    def shape(self, layer: str, role: str) -> tuple[int, ...]:
        """Of a layer's new part: (new rows, in, *kernel), or (out, new columns, *kernel)."""
        return self._shape(self.site.weight(layer, role))

    def _shape(self, slot: Slot) -> tuple[int, ...]:
        present = self.tensors[slot.tensor].shape
        out, into, *kernel = (present[dim] for dim in slot.order(len(present)))
        count = restricted_size(slot.layout, self.site.axis, self._grown)
        return (count, into, *kernel) if slot.role == "producer" else (out, count, *kernel)

    def fan_in(self, layer: str) -> int:
        """The inputs of one output of a producer; in a stack those of one member."""
        shape = self.shape(layer, "producer")
        return math.prod(shape[1:2] if self.site.weight(layer, "producer").members is not None else shape[1:])

    def positions(self, layer: str, role: str) -> Tensor:
        """(steps, positions of one step): where each new unit lies among a layer's new rows or columns."""
        return unit_positions(self.site.weight(layer, role).layout, self.site.axis, self._grown)

    def new_positions(self, slot: Slot) -> Tensor:
        """The positions of the new units in a slot's dimension once the site has grown."""
        grown = {**self.sizes, self.site.axis: self.sizes[self.site.axis] + self.steps}
        return new_positions(slot.layout, self.sizes, grown)

    def split(self, vectors: Tensor, role: str) -> dict[str, Tensor]:
        """Unit vectors (length, steps), layer after layer, into each layer's new part."""
        names = self.site.producers if role == "producer" else self.site.consumers
        result, offset = {}, 0
        for name in names:
            slot = self.site.weight(name, role)
            shape = self._shape(slot)
            count = math.prod(shape) // self.steps
            piece = vectors[offset : offset + count]  # (count, steps)
            offset += count
            if role == "producer":
                part = piece.T.reshape(-1, *shape[1:])
            else:
                part = piece.reshape(shape[0], -1, *shape[2:], self.steps).movedim(-1, 1).reshape(shape)
            if not isinstance(slot.layout, Leaf):
                positions = self.positions(name, role).reshape(-1).to(vectors.device)
                part = torch.empty_like(part).index_copy_(0 if role == "producer" else 1, positions, part)
            result[name] = part.to(self.tensors[slot.tensor].dtype)
        if offset != vectors.shape[0]:
            raise GrowthError(
                f"site {self.site.name!r}: directions of length {vectors.shape[0]} were given, its {role}s take "
                f"{offset}"
            )
        return result

    def split_incoming(self, vectors: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Incoming vectors (length, steps) as `split`, and what they hold for biases as `split_bias`: where a growth
        matrix counts those, the entries of a layer's bias stand behind those of its weight."""
        weights = {name: math.prod(self.shape(name, "producer")) // self.steps for name in self.site.producers}
        if len(vectors) == sum(weights.values()):
            return self.split(vectors, "producer"), {}
        biases = {slot.layer: self._bias_entries(slot) for slot in self.site.slots_of("bias")}
        ends = [count for name in weights for count in (weights[name], biases.get(name, 0))]
        if len(vectors) != sum(ends):
            raise GrowthError(
                f"site {self.site.name!r}: directions of length {len(vectors)} were given, its producers take "
                f"{sum(weights.values())}, with their biases {sum(ends)}"
            )
        pieces = vectors.split(ends)
        own = dict(zip(weights, pieces[1::2], strict=True))
        bias = [own[slot.layer] for slot in self.site.slots_of("bias")]
        return self.split(torch.cat(pieces[::2]), "producer"), self.split_bias(torch.cat(bias))

    def _bias_entries(self, slot: Slot) -> int:
        """Of one unit in a bias."""
        extents = [extent for dim, extent in enumerate(self.tensors[slot.tensor].shape) if dim != slot.dim]
        return restricted_size(slot.layout, self.site.axis, self._grown) // self.steps * math.prod(extents)

    def split_bias(self, vectors: Tensor) -> dict[str, Tensor]:
        """Bias entries (length, steps), layer after layer, as the new parts of the site's biases by tensor name."""
        result, offset = {}, 0
        for slot in self.site.slots_of("bias"):
            positions = unit_positions(slot.layout, self.site.axis, self._grown).to(vectors.device)
            tensor = self.tensors[slot.tensor]
            rest = [extent for dim, extent in enumerate(tensor.shape) if dim != slot.dim]  # a stack's: (members, 1)
            count = positions.shape[1] * math.prod(rest)
            target = vectors.new_empty(positions.numel(), *rest)
            target[positions.reshape(-1)] = vectors[offset : offset + count].T.reshape(-1, *rest)
            result[slot.tensor] = target.movedim(0, slot.dim).to(tensor.dtype)
            offset += count
        return result

    def old_norms(self, role: str) -> Tensor:
        """(width in steps,): the norm of every present unit's outgoing or incoming weights; float32, or float64."""
        names = self.site.producers if role == "producer" else self.site.consumers
        squares: Tensor | float = 0.0
        for name in names:
            slot = self.site.weight(name, role)
            weight = self.weight(name, role)
            weight = weight if weight.dtype == torch.float64 else weight.float()
            per_position = (
                weight.square().flatten(1).sum(1)
                if role == "producer"
                else (weight.square().transpose(0, 1).flatten(1).sum(1))
            )
            old = whole_unit_positions(slot.layout, self.site.axis, self.sizes).to(weight.device)
            squares = squares + per_position[old].sum(1)
        assert isinstance(squares, Tensor)
        return squares.sqrt()

    def mean_norm(self, role: str) -> Tensor:
        """(): the mean norm of the present units' outgoing or incoming weights."""
        return self.old_norms(role).mean()

    def outgoing_norm(self, scale: float, norm: str) -> Tensor | float:
        """The norm of a new outgoing column: `scale` ("fixed"), or `scale` times the mean norm of the present ones.

        The latter is multiplied by sqrt(eps) for each norm in series on the units' way that takes a batch's statistics
        (batch norm in training mode, instance and group norm): it divides what reaches units at zero by sqrt(eps)
        (316-fold at 1e-5; GradMax, App. C), and gives them variance 1 after their first step, however small that was.
        So the gradient attained is that of a net without the norms, and the units' outgoing weights grow with what they
        learn, where large ones would add their untrained values at once. Norms side by side, as in the branches of a
        residual stream, count once; where paths differ, that with the most counts (`norm_series.amplification`).

        Raises `GrowthError` where weights of that norm are too small for their dtype.
        """
        return scale if norm == "fixed" else self._behind_norms(scale, self.mean_norm("consumer"), "consumer")

    def small_norm(self, share: float) -> Tensor:
        """(): the norm of incoming weights that are to be small: `share` times the mean norm of the present units', and
        sqrt(eps) of that for each norm in series, as of outgoing weights: behind the norms a unit is then as large as
        it would be without them. Raises `GrowthError` as `outgoing_norm`."""
        return self._behind_norms(share, self.mean_norm("producer"), "producer")

    def small_part_norms(self, share: float) -> Tensor:
        """(channels,): `small_norm` of each of a separate site's groups or members, from its own present units."""
        return self._behind_norms(share, self.part_norms("producer"), "producer")

    def _behind_norms(self, scale: float, present: Tensor, role: str) -> Tensor:
        """`scale` times these norms of present units' weights, divided by what the norms multiply."""
        factor = scale / self.amplification
        norms = factor * present
        least = max(torch.finfo(self.tensors[slot.tensor].dtype).tiny for slot in self.site.slots_of(role))
        # No factor above the root brings weights of usual size there: then no device is waited for.
        if self.amplification > 1 and factor < least**0.5:
            layers = self.site.producers if role == "producer" else self.site.consumers
            entries = sum(math.prod(self.shape(name, role)) for name in layers) // self.steps
            smallest = float(norms.min()) / entries**0.5
            if smallest < least:
                remedy = "relu='swap'" if role == "producer" else "norm='fixed' and a scale"
                raise GrowthError(
                    f"site {self.site.name!r}: for the norms behind it new weights of its {role} {layers[0]!r} would "
                    f"have entries of {smallest:.1e}, {scale:g} / {self.amplification:.1e} of the present ones, below "
                    f"{least:.1e}, the least of their dtype; grow in evaluation mode, or give {remedy}"
                )
        return norms

    @cached_property
    def amplification(self) -> float:
        """What the norms on the units' way multiply at zero: 1 / sqrt(eps) for each in series; 1.0 without any."""
        return amplification(self.model, self.sites, self.site)

    @cached_property
    def channels(self) -> Channels:
        """Where the channels of a unit lie in its vectors, at a site whose units have separate ones."""
        return Channels.of(self.tensors, self.sizes, self.sites, self.site)

    def side(self, role: str) -> Side:
        """The same, of the units' incoming ("producer") or outgoing vectors."""
        return self.channels.into if role == "producer" else self.channels.out

    def part_norms(self, role: str) -> Tensor:
        """(channels,): the mean norm of the present units' weights in each of a separate site's groups or members."""
        parts = self.side(role).parts(gather(self.site, self.tensors, self.sizes, role))
        wide = torch.promote_types(parts.dtype, torch.float32)
        return torch.linalg.vector_norm(parts, dim=1, dtype=wide).mean(1)

    def outgoing_part_norms(self, scale: float, norm: str) -> Tensor:
        """(channels,): `outgoing_norm` of each of a separate site's groups or members, from its own present units."""
        present = self.part_norms("consumer")
        return torch.full_like(present, scale) if norm == "fixed" else self._behind_norms(scale, present, "consumer")

    def incoming_part_norms(self, scale: float, norm: str) -> Tensor:
        """(channels,): the norm of a new unit's incoming weights in each of them: `scale` times the present ones'."""
        present = self.part_norms("producer")
        return torch.full_like(present, scale) if norm == "fixed" else scale * present
