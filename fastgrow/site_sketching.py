"""Sketches of every site's growth matrix, fed inside the backward pass: a batch's tensors are let go at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .blocks import has_blocks
from .distributed import Replicas
from .errors import GrowthError
from .growth_map import growth_map
from .names import find_module
from .replay import Capture
from .site_data import SiteData
from .sites import Site, Sites
from .sketch import Sketch, sketched_directions
from .solve import Directions
from .surroundings import set_aside

__all__ = ["Pieces", "SiteSketches", "check_version"]

Key = tuple[str, int]  # layer, number of its call


@dataclass
class Pieces:
    """What one batch has brought so far. waiting: site -> what it still lacks; versions: of the inputs when read."""

    waiting: dict[str, set[tuple[str, Key]]] = field(default_factory=dict)
    parts: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    versions: dict[Key, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return not self.waiting


def check_version(layer: str, tensor: Tensor, version: int) -> None:
    """Raises where a layer's input is no longer what the layer read."""
    if tensor._version != version:
        raise GrowthError(
            f"layer {layer!r}: its input was overwritten in place after the layer had read it, so the growth "
            "matrix cannot be formed; make the op behind it out of place"
        )


class SiteSketches:
    """Adds up sketches of the targets' growth matrices.

    Raises `GrowthError` by name for sites that cannot be sketched: units made of several channels or with gates
    (their maps are drawn anew for each observation), signed pairs and other solvers (they read the tensors
    themselves), batch statistics over several ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        targets: Sequence[Site],
        rank: Mapping[str, int],
        bias: bool,
        signed: Collection[str],
        replicas: Replicas | None,
    ) -> None:
        self.model, self.sites, self.bias, self.replicas = model, sites, bias, replicas
        self.targets = {site.name: site for site in targets}
        for site in targets:
            self._check(site, signed)
        self.sketches = {site.name: Sketch(rank[site.name], aims=replicas is None) for site in targets}
        self._agreed = replicas is None or not targets
        self._added = 0
        self._needs = {site.name: self._pieces(site) for site in targets}
        self._readers: dict[tuple[str, Key], list[str]] = {}
        for name, needs in self._needs.items():
            for need in needs:
                self._readers.setdefault(need, []).append(name)

    def _check(self, site: Site, signed: Collection[str]) -> None:
        reason = None
        norms = [find_module(self.model, norm.module) for norm in site.norms]
        if self.sites.graph is None:
            reason = "it was named by hand, without a graph"
        elif has_blocks(site):
            reason = "its units are heads, gated or spread over groups, and draw a map of their own"
        elif site.name in signed:
            reason = "its ReLU is a function call, so its units are signed pairs, solved under each pair's mask"
        elif self.replicas is not None and any(isinstance(norm, nn.SyncBatchNorm) and norm.training for norm in norms):
            reason = "its SyncBatchNorm takes statistics over all ranks"
        if reason is not None:
            raise GrowthError(
                f"site {site.name!r}: cannot be sketched: {reason}; observe it with growth=True, or leave it out "
                "(rank={site name: ...} names the sites that are sketched)"
            )

    def _pieces(self, site: Site) -> set[tuple[str, Key]]:
        """What one batch must bring: ("input", producer's call) and ("gradient", consumer's call)."""
        counts: dict[str, int] = {}
        needs: set[tuple[str, Key]] = set()
        assert self.sites.graph is not None
        for call in self.sites.graph.calls:
            key = call.name, counts.get(call.name, 0)
            counts[call.name] = key[1] + 1
            if call.name in site.producers:
                needs.add(("input", key))
            if call.name in site.consumers:
                needs.add(("gradient", key))
        return needs

    def begin(self) -> Pieces:
        return Pieces({name: set(needs) for name, needs in self._needs.items()})

    def wants(self, kind: str, key: Key) -> bool:
        """Whether any site reads this piece; recomputation under checkpointing brings others."""
        return (kind, key) in self._readers

    def arrived(self, pieces: Pieces, kind: str, key: Key, capture: Capture) -> None:
        """Multiplies for every site that this piece completes, and lets go of what no site waits for."""
        for name in self._readers[kind, key]:
            waiting = pieces.waiting.get(name)
            if waiting is None:
                raise GrowthError(
                    f"layer {key[0]!r}: a second backward pass went through the same forward pass, whose tensors the "
                    "sketch has let go; add the losses and call backward once, or observe with growth=True"
                )
            waiting.discard((kind, key))
            if not waiting:
                for piece, call in self._needs[name]:
                    if piece == "input":
                        check_version(call[0], capture.inputs[call], pieces.versions[call])
                pieces.parts[name] = self._multiplied(self.targets[name], capture)
                del pieces.waiting[name]
                for need in self._needs[name]:
                    if not any(reader in pieces.waiting for reader in self._readers[need]):
                        held = capture.inputs if need[0] == "input" else capture.gradients
                        held.pop(need[1], None)

    def _multiplied(self, site: Site, capture: Capture) -> tuple[Tensor, ...]:
        with torch.no_grad(), set_aside():
            data = SiteData(self.model, self.sites, site, [capture], [1.0], self.bias)
            return self.sketches[site.name].parts(growth_map(data))

    def check_complete(self, pieces: Pieces) -> None:
        """A batch that some gradients of a site reached must have brought all of them."""
        for name, waiting in pieces.waiting.items():
            kind, (layer, number) = min(waiting)
            raise GrowthError(
                f"layer {layer!r}: no {kind} was seen (call {number + 1}), so site {name!r} has no growth matrix for "
                "this batch; the loss must depend on it in every batch"
            )

    def add(self, pieces: Pieces, weight: Tensor | float, samples: int, fine: Tensor) -> None:
        """One complete batch's share; ``fine``: whether all that was read of it is finite."""
        for name, parts in pieces.parts.items():
            self.sketches[name].add(parts, weight, samples, fine)
        self._added += 1

    def agree(self) -> None:
        """One Omega for all ranks, from the batches so far; a collective call until there is one.

        What was added before counts no more once another batch is.
        """
        if self._agreed or self.replicas is None:
            return
        if int(self.replicas.sum(torch.tensor(int(self._added > 0), device="cpu"))) < self.replicas.size:
            return
        for sketch in self.sketches.values():
            if not sketch.settled:
                sketch.aim(self.replicas.sum(sketch.sums[1]))
        self._agreed = all(sketch.settled for sketch in self.sketches.values())

    def _forget_alone(self) -> None:
        """Where any rank saw a batch with the Omega agreed on, what ranks saw before it counts on none."""
        if self.replicas is not None and self.sketches:
            stale = torch.tensor([sketch.stale for sketch in self.sketches.values()], dtype=torch.int64, device="cpu")
            for sketch, count in zip(self.sketches.values(), self.replicas.sum(stale).tolist(), strict=True):
                if sketch.stale and count < self.replicas.size:
                    sketch.forget()

    def directions(self, mean: bool, samples: int) -> dict[str, Directions]:
        """Of the mean over samples, or of the sum, of all that was added on all ranks."""
        names = [name for name, sketch in self.sketches.items() if sketch.sums]
        scales = []
        self._forget_alone()
        for name in names:
            sketch = self.sketches[name]
            counted = torch.as_tensor(sketch.counted, dtype=torch.float64).cpu()
            if self.replicas is not None:
                sketch.sums = tuple(self.replicas.sum(total) for total in sketch.sums)
                counted = self.replicas.sum(counted)
            # the batch that chose Omega for several ranks is not in the sums: the others stand for it
            scales.append((1.0 if mean else samples) / float(counted))
        found = sketched_directions([self.sketches[name] for name in names], scales, names)
        if self.replicas is not None:
            self.replicas.share_([tensor for one in found for tensor in one])
        return dict(zip(names, found, strict=True))
