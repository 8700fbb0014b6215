"""How new units start: what a method is given, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import GrowthError
from ..layout import new_positions, restricted_size, unit_positions, whole_unit_positions
from ..members import Channels, Side
from ..names import find_module
from ..site_view import SiteView
from ..sites import Site, Sites, Slot, live_tensors
from ..solve import Directions
from .units import gather

if TYPE_CHECKING:
    from ..rehearsal import Rehearsal

__all__ = ["How", "Newborns", "Start", "refuse_mixing", "site_multiple"]


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
    method knows it. random: units beyond the growth matrix's rank, started at random.
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
    attained: float | None = None
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
        slot = self.site.weight(layer, role)
        out, into, *kernel = self.weight(layer, role).shape
        count = restricted_size(slot.layout, self.site.axis, self._grown)
        return (count, into, *kernel) if role == "producer" else (out, count, *kernel)

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
            shape = self.shape(name, role)
            positions = self.positions(name, role).to(vectors.device)
            count = math.prod(shape) // self.steps
            piece = vectors[offset : offset + count].T  # (steps, count)
            offset += count
            target = vectors.new_empty(shape)
            if role == "producer":
                target[positions.reshape(-1)] = piece.reshape(-1, *shape[1:])
            else:
                flat = piece.reshape(self.steps, shape[0], -1, *shape[2:]).movedim(0, 1)
                target[:, positions.reshape(-1)] = flat.reshape(shape[0], -1, *shape[2:])
            result[name] = target.to(self.weight(name, role).dtype)
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

    def mean_norm(self, role: str) -> float:
        """Mean norm of the present units' outgoing or incoming weights."""
        return float(self.old_norms(role).mean())

    def outgoing_norm(self, scale: float, norm: str) -> float:
        """The norm of a new outgoing column: `scale` ("fixed"), or `scale` times the mean norm of the present ones.

        The latter is multiplied by sqrt(eps) for each batch norm in training mode that the units pass: it divides what
        reaches units at zero by sqrt(eps) (316-fold at 1e-5; GradMax, App. C), and gives them variance 1 after their
        first step, however small that was. So the gradient attained is that of a net without the norm, and the units'
        outgoing weights grow with what they learn, where large ones would add their untrained values at once.
        """
        return scale if norm == "fixed" else self._behind_norms(scale) * self.mean_norm("consumer")

    def _behind_norms(self, scale: float) -> float:
        for passed in self.site.norms:
            module = find_module(self.model, passed.module)
            if passed.kind == "batch_norm" and module is not None and takes_batch_statistics(module):
                scale *= float(getattr(module, "eps", 1.0)) ** 0.5
        return scale

    @cached_property
    def channels(self) -> Channels:
        """Where the channels of a unit lie in its vectors, at a site whose units have separate ones."""
        return Channels.of(self.tensors, self.sizes, self.sites, self.site)

    def side(self, role: str) -> Side:
        """The same, of the units' incoming ("producer") or outgoing vectors."""
        return self.channels.into if role == "producer" else self.channels.out

    def part_norms(self, role: str) -> Tensor:
        """(channels,): the mean norm of the present units' weights in each of a separate site's groups or members."""
        vectors = gather(self.site, self.tensors, self.sizes, role)
        vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
        return torch.linalg.vector_norm(self.side(role).parts(vectors), dim=1).mean(1)

    def outgoing_part_norms(self, scale: float, norm: str) -> Tensor:
        """(channels,): `outgoing_norm` of each of a separate site's groups or members, from its own present units."""
        present = self.part_norms("consumer")
        return torch.full_like(present, scale) if norm == "fixed" else self._behind_norms(scale) * present

    def incoming_part_norms(self, scale: float, norm: str) -> Tensor:
        """(channels,): the norm of a new unit's incoming weights in each of them: `scale` times the present ones'."""
        present = self.part_norms("producer")
        return torch.full_like(present, scale) if norm == "fixed" else scale * present


def takes_batch_statistics(norm: nn.Module) -> bool:
    """Whether a batch norm's forward pass would use the batch's own mean and variance."""
    return norm.training or getattr(norm, "running_mean", None) is None


class How:
    """A growth method. Subclasses answer `start`; the rest says what they need."""

    needs_directions = False
    """Whether a backward pass must be observed for growth matrices."""
    starts_at_zero = False
    """Whether new units write exactly zero, so that activations need their derivative from the right."""
    solves = False
    """Whether `solve` answers the directions that `start` is given, instead of M's leading ones."""
    reads_growth = True
    """Whether `solve` reads the growth matrix: without, sites are allowed where units born at zero are none."""
    rewrites = False
    """Whether units are copied or present values change: sites grow one by one in forward order, each seeing
    those before it grown."""
    needs_closure = False
    """Whether the loss is needed again: `rehearse` answers instead of `start`."""
    fills_room = True
    """Whether units can start in room that was reserved: not where a method tries or reads the tensors themselves."""

    @property
    def name(self) -> str:
        return type(self).__name__

    def check(self, site: Site, units: int) -> None:
        """Raises `GrowthError` where the method cannot grow this site by so many units."""

    def multiple(self, site: Site, width: int) -> int:
        """The units that come together where this method grows a site of this width."""
        return site_multiple(site, width)

    def rank(self, site: Site, units: int) -> int:
        """Directions wanted for so many units; 0 where none are needed."""
        return units // site.step if self.needs_directions else 0

    def signed(self, site: Site) -> bool:
        """Whether the site's units come as signed pairs."""
        return False

    def swaps(self, site: Site) -> bool:
        """Whether the site's activation modules must be replaced by their twins with slope f'(0+) at 0."""
        return self.starts_at_zero and not self.signed(site)

    def start(self, newborns: Newborns) -> Start:
        """How the new units begin. Called without gradients; changes nothing."""
        raise NotImplementedError

    def solve(self, view: SiteView) -> Directions:
        """The directions of one site, where the method has its own way to them (`solves`)."""
        raise NotImplementedError

    def rehearse(self, rehearsal: Rehearsal) -> dict[str, Start]:
        """How the new units of all sites begin, by trying (`needs_closure`)."""
        raise NotImplementedError

    def check_optimizers(self, optimizers: Iterable[Any]) -> None:
        """Raises `GrowthError` where these optimizers cannot do what the method asks of them."""

    def settle(self, model: nn.Module, optimizers: Iterable[Any]) -> None:
        """What is left to do once the model has grown; must not fail."""


def site_multiple(site: Site, width: int) -> int:
    """The units that come together whatever the method is: a LayerNorm's channels are all copied equally often."""
    return width if any(norm.kind == "layer_norm" for norm in site.norms) else site.multiple


def refuse_mixing(how: How, site: Site, kinds: Collection[str] = ("layer_norm", "rms_norm")) -> None:
    """Raises `GrowthError` where a norm mixes the site's channels: new ones that are not zero change the others, and
    under a LayerNorm those that are zero too."""
    for norm in site.norms:
        if norm.kind in kinds:
            raise GrowthError(
                f"site {site.name!r}: {norm.module!r} ({norm.kind}) mixes its channels, so how.{how.name} would "
                "change what the present units write; copy all of them (how.Net2Net, units = the width)"
            )
