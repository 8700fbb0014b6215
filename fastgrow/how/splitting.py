"""Splitting steepest descent: units split where the loss curves down (Liu, Wu, Wang, NeurIPS 2019)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arguments import number, whole
from ..blocks import has_blocks
from ..errors import GrowthError
from ..layout import unit_positions
from ..natural import own_part, present_rows
from ..newborns import Newborns, Start
from ..replay import Capture, consumer_pullback
from ..site_view import SiteView
from ..sites import Site, tensors_of
from ..solve import Directions
from ..units import gather, names_of, scatter_
from .base import How, refuse_mixing

__all__ = ["Splits", "Splitting", "split_start"]


@dataclass(frozen=True, slots=True)
class Splits(Directions):
    """values: the smallest eigenvalue of each unit's splitting matrix, ascending; right: their eigenvectors (n, k).

    units: (k,) int64, the unit that each belongs to.
    """

    units: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))


class Splitting(How):
    """The units whose splitting matrices have the smallest eigenvalues are split in two, along the eigenvectors.

    A unit with incoming weights theta becomes ``theta + e v`` and ``theta - e v`` with half its outgoing weights each;
    the loss changes by ``e^2 / 2 v^T S v`` to second order, ``S = E[dL/dsigma * d^2 sigma / dtheta^2]`` its splitting
    matrix (theorem 3.2 of the paper), and v is the eigenvector of S's smallest eigenvalue. One unit is split at most
    once in a growth.

    epsilon: e, relative to the mean norm of the present units' incoming weights.
    sharpness: beta of the surrogate ``softplus(beta x) / beta`` that stands in for ReLU's second derivative, which is
    zero almost everywhere (ReLU6 and LeakyReLU likewise); other activations are taken as they are.
    rounds: Lanczos steps; exact where a unit has no more incoming weights than that.

    Keeps the function to second order in epsilon. Costs one observed backward pass and `rounds` Hessian-vector
    products of the middle, no further pass. Raises `GrowthError` for more units than there are to split, where the
    middle does not curve, where norms mix the channels, and for gates, heads and groups.
    """

    needs_directions = True
    solves = True
    fills_room = False
    reads_growth = False
    rewrites = True

    def __init__(self, epsilon: float = 1e-2, sharpness: float = 10.0, rounds: int = 32) -> None:
        self.epsilon = number("how.Splitting", "epsilon", epsilon, above=0)
        self.sharpness = number("how.Splitting", "sharpness", sharpness, above=0)
        self.rounds = whole("how.Splitting", "rounds", rounds)

    def check(self, site: Site, units: int) -> None:
        refuse_mixing(self, site)
        if has_blocks(site) or site.stacked or site.multiple > site.step:
            raise GrowthError(
                f"site {site.name!r}: how.Splitting splits units one by one, not gates, heads, groups of channels or "
                "stacks of matrices; use how.Net2Net"
            )

    def _surrogates(self) -> dict[str, Callable[..., Tensor]]:
        beta = self.sharpness

        def bend(x: Tensor) -> Tensor:
            return F.softplus(x, beta=beta)

        return {
            "relu": lambda x, *rest, **options: bend(x),
            "leaky_relu": lambda x, slope=0.01, *rest, **options: slope * x + (1 - slope) * bend(x),
            "relu6": lambda x, *rest, **options: bend(x) - bend(x - 6),
            "hardtanh": lambda x, low, high, *rest, **options: low + bend(x - low) - bend(x - high),
        }

    def solve(self, view: SiteView) -> Directions:
        sizes = view.sites.sizes(view.model)
        products = [self._product(view, *batch) for batch in view.batches()]

        def product(vectors: Tensor) -> Tensor:
            return torch.stack([one(vectors) for one in products]).sum(0)

        present = gather(view.site, tensors_of(view.model), sizes, "producer")
        start = torch.randn(present.shape, dtype=torch.promote_types(present.dtype, torch.float32)).to(present.device)
        values, vectors = smallest_eigenpairs(product, start, self.rounds)
        order = values.argsort()[: view.rank]
        return Splits(vectors.new_zeros(0, len(order)), values[order], vectors[:, order], units=order.cpu())

    def _product(self, view: SiteView, capture: Capture, weight: float) -> Callable[[Tensor], Tensor]:
        """(n, units) -> (n, units): every unit's splitting matrix times its vector, of one batch."""
        site = view.site
        replay = view.replay(capture, present=True, surrogates=self._surrogates())
        width = replay.sizes[site.axis]
        rows = present_rows(replay)
        values = replay.forward(rows, width)
        pulls = {}
        for node, (call, number_of_call) in replay.consumers.items():
            slot = site.weight(call.name, "consumer")
            columns = own_part(replay, slot)
            columns = columns if slot.dim == 1 else columns.transpose(0, 1)
            dz = replay.capture.gradients[call.name, number_of_call].to(replay.dtype) * weight
            pulls[node] = consumer_pullback(node, call, columns, values[node], dz)

        def written(moved: dict[str, Tensor]) -> Tensor:
            images = replay.forward({**rows, **moved}, width)
            return torch.stack([(pulls[node] * images[node]).sum() for node in pulls]).sum()

        weights = {name: rows[name] for name in site.producers}
        positions = {
            name: unit_positions(site.weight(name, "producer").layout, site.axis, replay.sizes)
            for name in site.producers
        }

        def product(vectors: Tensor) -> Tensor:
            tangents = _as_rows(vectors, weights, positions)
            found = torch.func.jvp(torch.func.grad(written), (weights,), (tangents,))[1]
            return torch.cat([found[name][where].reshape(width, -1) for name, where in positions.items()], 1).T

        return product

    def at_once(self, site: Site, width: int) -> int:
        return width

    def start(self, newborns: Newborns) -> Start:
        site, found, steps = newborns.site, newborns.directions, newborns.steps
        assert isinstance(found, Splits)
        if len(found.values) < steps:
            raise GrowthError(
                f"site {site.name!r}: {steps} units were asked for, but each of its {newborns.sizes[site.axis]} units "
                "is split at most once; ask for fewer"
            )
        if not bool((found.values != 0).any()):
            raise GrowthError(
                f"site {site.name!r}: its splitting matrices are zero: the middle does not curve, or no gradient comes "
                "through; use how.GradMax or how.Net2Net"
            )
        size = self.epsilon * newborns.mean_norm("producer")
        return split_start(newborns, found.units, found.right * size)


def _as_rows(vectors: Tensor, like: dict[str, Tensor], positions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unit vectors (n, units) as each producer's rows."""
    result, offset = {}, 0
    for name, where in positions.items():
        count = like[name].numel() // len(where)
        piece = vectors[offset : offset + count].T.reshape(-1, *like[name].shape[1:])
        result[name] = torch.empty_like(like[name]).index_copy(0, where.reshape(-1).to(piece.device), piece)
        offset += count
    return result


def split_start(newborns: Newborns, units: Tensor, moves: Tensor) -> Start:
    """Each of these units and its copy, apart by twice its column of moves (n, k); outgoing weights shared."""
    site = newborns.site
    seed = Newborns(newborns.model, newborns.sites, site, len(units) * site.step)
    shift = {name: torch.zeros_like(seed.tensors[name]) for name in names_of(site, "producer")}
    scatter_(site, shift, seed.sizes, "producer", units, moves)
    return Start(seed.split(-moves, "producer"), sources=units, shift=shift)


def smallest_eigenpairs(product: Callable[[Tensor], Tensor], start: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """(units,), (n, units): the smallest eigenvalue of each unit's symmetric matrix, and its eigenvector.

    product: (n, units) -> (n, units), all units' matrices at once; start: (n, units). Lanczos with full
    reorthogonalisation, exact after n rounds.
    """
    basis: list[Tensor] = []
    image: list[Tensor] = []
    vector = start / start.norm(dim=0)
    for _ in range(min(rounds, len(start))):
        basis.append(vector)
        image.append(product(vector))
        scale = image[-1].norm(dim=0)
        vector = image[-1]
        for _ in range(2):
            for known in basis:
                vector = vector - known * (known * vector).sum(0)
        size = vector.norm(dim=0)
        # An invariant subspace is found: a zero vector adds a zero eigenvalue and no direction.
        alive = size > 8 * torch.finfo(size.dtype).eps * scale
        vector = torch.where(alive, vector / size.clamp(min=torch.finfo(size.dtype).tiny), 0.0)
    directions, images = torch.stack(basis), torch.stack(image)  # (rounds, n, units)
    core = torch.einsum("inu,jnu->uij", directions.double(), images.double())
    values, mixes = torch.linalg.eigh((core + core.mT) / 2)
    found = torch.einsum("inu,ui->nu", directions, mixes[:, :, 0].to(directions.dtype))
    norm = found.norm(dim=0)
    found = torch.where(norm > 0.5, found / norm.clamp(min=0.5), start / start.norm(dim=0))
    return values[:, 0].to(start.dtype), found
