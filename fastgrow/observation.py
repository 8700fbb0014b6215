"""What an observer has seen: gradient norms of activations, and the directions of growth matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .arguments import whole
from .closures import backpropagated
from .errors import GrowthError
from .readings import NormSums
from .sites import Sites
from .solve import Directions

__all__ = ["Observation"]


class Observation:
    """What one or several batches showed; filled while the ``with`` block runs.

    Norms stay on the device until they are read: where no growth matrix was asked for, a gradient that is not finite
    is told by the first property that is read.
    """

    def __init__(
        self, sites: Sites, norms: NormSums, places: frozenset[str], edges: Callable[[bool], Sequence[Any]]
    ) -> None:
        self.sites = sites
        self._norms = norms
        self._places = places
        self._edges = edges
        self._directions: dict[str, Directions] | None = None
        self._rank: dict[str, int] = {}
        self._solved: dict[str, dict[str, Directions]] = {}

    def hold(self, directions: Mapping[str, Directions], rank: Mapping[str, int]) -> None:
        """Take the directions that were solved (`observe` does, when its block ends), at most so many of each site."""
        self._directions = dict(directions)
        self._rank = {name: rank[name] for name in directions}

    def hold_solution(self, solver: str, directions: Mapping[str, Directions]) -> None:
        """The same, of one of the further ``solvers``."""
        self._solved[solver] = dict(directions)

    @property
    def samples(self) -> int:
        """Samples that count, over all ranks: rows of the model's first tensor argument; where that is a flat text or
        its offsets, the bags of `nn.EmbeddingBag`."""
        self._norms.settle()
        return self._norms.samples

    @property
    def dropped(self) -> int:
        """Batches left out because their gradients overflowed under a GradScaler."""
        self._norms.settle()
        return self._norms.dropped

    @property
    def nagn(self) -> dict[str, float]:
        """sqrt(E ||dL/dz_l||^2 / T_l) of every linear and convolution layer, at its own output, in forward order.

        L is the loss of one sample, T_l the elements of z_l for one sample (NAGN paper). Reading it
        synchronises with the device. With nagn="after_norm" layers behind which a norm stands are missing.
        """
        return self._read(after=False)

    @property
    def nagn_after_norm(self) -> dict[str, float]:
        """The same, at the output of the normalisation behind the layer (the activation's input).

        With nagn="own" layers behind which a norm stands are missing.
        """
        return self._read(after=True)

    def _read(self, after: bool) -> dict[str, float]:
        norms = self._norms
        norms.settle()
        means = norms.means(norms.own, norms.after) if after else norms.means(norms.own)
        layers = self.sites.layers.values()
        wanted = {info.name for info in layers if not after or info.norm is None or "norm" in self._places}
        return {info.name: means[info.name] for info in layers if info.name in means and info.name in wanted}

    @property
    def has_directions(self) -> bool:
        """Whether growth matrices were observed."""
        return self._directions is not None

    def all_directions(self) -> dict[str, Directions]:
        """Every observed site's directions, as many as were solved."""
        return dict(self._directions or {})

    def directions(self, k: int) -> dict[str, Directions]:
        """The k leading singular triplets of every site's growth matrix, {site name: Directions}.

        M is the mean over samples for a mean loss, the sum for a sum loss, in units of the unscaled loss.
        raises: GrowthError where k exceeds the ``rank`` that was observed.
        """
        whole("directions", "k", k)
        if self._directions is None:
            raise GrowthError("no growth matrix was observed: use observe(..., growth=True) around a backward pass")
        return {name: self.site_directions(name, k) for name in self._directions}

    def site_directions(self, name: str, k: int) -> Directions:
        """`directions` of one site, at most k of them: as many as its matrix has."""
        if self._directions is None or name not in self._directions:
            raise GrowthError(f"site {name!r}: its growth matrix was not observed; observe with growth=True")
        found = self._directions[name]
        if k > self._rank[name]:
            raise GrowthError(f"site {name!r}: {k} directions were asked for, rank={self._rank[name]} observed")
        return _first(found, k)

    def solved(self, solver: str) -> bool:
        """Whether one of the further ``solvers`` has run."""
        return solver in self._solved

    def natural(self, k: int) -> dict[str, Directions]:
        """The k leading directions of every site's matrix in TINY's metric, where `natural_directions` was a solver."""
        return {name: self.solution("natural", name, k) for name in self._solved.get("natural", {})}

    def solution(self, solver: str, name: str, k: int) -> Directions:
        """The first k directions that one of the further ``solvers`` found for a site."""
        if name not in self._solved.get(solver, {}):
            raise GrowthError(f"site {name!r}: {solver} was not solved; observe with the growth method that is used")
        return _first(self._solved[solver][name], k)

    def backward(self, loss: Tensor, last: bool = False) -> None:
        """Backpropagate to the observed outputs alone: no ``.grad`` is touched, no weight gradient computed.

        last: no other backward pass comes in this block, before or after. On a CPU a site's directions are then found
        inside this one, once its last gradient has arrived, and its tensors let go: less memory, the same directions.
        """
        edges = self._edges(last)
        if not edges:
            raise GrowthError(
                "the loss was computed without calling any observed layer of the model, or none of them needs a "
                "gradient (requires_grad=False up to their outputs)"
            )
        backpropagated(loss, _outermost(edges))


def _outermost(edges: Sequence[Any]) -> list[Any]:
    """Those behind which lies no other: a backward pass meets all on its way there, and holds what it ends at."""
    before: dict[Any, list[Any]] = {}  # node -> the nodes that hand it a gradient
    found = {edge.node for edge in edges}
    ahead, seen = list(found), set(found)
    while ahead:
        node = ahead.pop()
        for after, _ in node.next_functions:
            if after is not None:
                before.setdefault(after, []).append(node)
                if after not in seen:
                    seen.add(after)
                    ahead.append(after)
    passed: set[Any] = set()
    ahead = list(found)
    while ahead:
        fresh = [node for node in before.get(ahead.pop(), ()) if node not in passed]
        passed.update(fresh)
        ahead += fresh
    return [edge for edge in edges if edge.node not in passed]


def _first(found: Directions, k: int) -> Directions:
    """The first k directions: every tensor of directions has them along its last dimension."""
    if found.values.shape[-1] <= k:
        return found
    tensors: dict[str, Any] = {entry.name: getattr(found, entry.name) for entry in dataclasses.fields(found)}
    cut: dict[str, Any] = {name: v[..., :k] for name, v in tensors.items() if isinstance(v, Tensor)}
    return dataclasses.replace(found, **cut)
