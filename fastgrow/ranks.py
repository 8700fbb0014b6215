"""How many directions a site's units span, from its activations or weights: what `where.NORTH` reads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import Replicas
from .errors import GrowthError
from .layout import size, whole_unit_positions
from .names import find_module
from .sites import Site, Sites, unwrap
from .where import effective_dimension

__all__ = ["ActivationRanks", "weight_ranks"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class ActivationRanks:
    """Gram matrices of what the first consumer of each site reads: (C, C), summed over samples and positions.

    Units are counted in the site's steps (channels; attention: heads, whose entries count as samples). Any
    number of batches. Raises `GrowthError` where no consumer is a module whose input holds the units one by one.
    """

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        self.model = unwrap(model)
        self.sites = sites
        self._sizes = sites.sizes(model, room=True)
        self._grams: dict[str, Tensor] = {}
        self._samples: dict[str, int] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks for the length of the block."""
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # compiled code was traced without the hooks
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for site in self.sites:
                module, positions = self._consumer(site)
                handle = module.register_forward_pre_hook(self._reader(site, positions), with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def ranks(self, epsilon: float, replicas: Replicas | None = None) -> dict[str, float]:
        """Site name -> ``|{sigma_i(H / sqrt(n)) > epsilon}|``, in channels; over all ranks of `replicas`."""
        found: dict[str, float] = {}
        counts = torch.tensor([self._samples.get(site.name, 0) for site in self.sites], device="cpu")
        if replicas is not None:
            counts = replicas.sum(counts)
        for site, samples in zip(self.sites, counts.tolist(), strict=True):
            if not samples:
                raise GrowthError(f"where.NORTH: no activation of site {site.name!r} was seen: its consumer never ran")
            gram = self._grams.get(site.name)
            if replicas is not None:
                # A rank whose consumer never ran adds zero: every rank makes the same calls.
                gram = replicas.sum(self._no_gram(site, replicas.device) if gram is None else gram)
            assert gram is not None
            if not bool(gram.isfinite().all()):
                raise GrowthError(f"site {site.name!r}: its activations hold NaN or infinity; wanted finite values")
            found[site.name] = site.step * int((torch.linalg.eigvalsh(gram / samples) > epsilon**2).sum())
        return found

    def _no_gram(self, site: Site, device: torch.device) -> Tensor:
        units = len(self._consumer(site)[1])
        return torch.zeros(units, units, dtype=torch.float64, device=device)

    def _consumer(self, site: Site) -> tuple[nn.Module, Tensor]:
        graph = self.sites.graph
        # of stacked layers those whose module reads what the product does, its channels last
        turned = {c.name for c in graph.calls if c.source and (c.bare or c.letters()[0][-1] != "i")} if graph else set()
        for name in site.consumers:
            module, slot = find_module(self.model, name), site.weight(name, "consumer")
            if name in turned:
                continue
            inputs = getattr(module, "in_channels", None) or getattr(module, "in_features", None)
            if module is not None and (inputs is None or inputs == size(slot.layout, self._sizes)):
                return module, whole_unit_positions(slot.layout, site.axis, self._sizes)
        raise GrowthError(
            f"where.NORTH: the layers that read site {site.name!r} are function calls or grouped, so its activations "
            "cannot be told apart; use where.NORTH(read='weights')"
        )

    def _reader(self, site: Site, positions: Tensor) -> Callable[..., None]:
        def read(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor):
                return
            space = len(module.kernel_size) if isinstance(module, _CONVOLUTIONS) else 0
            units = x.detach().movedim(-1 - space, -1)
            units = units[..., positions.reshape(-1).to(x.device)].unflatten(-1, tuple(positions.shape))
            rows = units.movedim(-2, -1).flatten(0, -2).double()  # (n, C)
            gram = rows.mT @ rows
            known = self._grams.get(site.name)
            self._grams[site.name] = gram if known is None else known + gram
            self._samples[site.name] = self._samples.get(site.name, 0) + len(rows)

        return read


def weight_ranks(model: nn.Module, sites: Sites, epsilon: float) -> dict[str, float]:
    """The same of the incoming weights of each site's first producer: H is (in x kernel, out)."""
    tensors, sizes = sites.present(model)
    found: dict[str, float] = {}
    for site in sites:
        slot = site.weight(site.producers[0], "producer")
        weight = tensors[slot.tensor].detach().movedim(slot.dim, 0)  # (out, in, *kernel)
        units = whole_unit_positions(slot.layout, site.axis, sizes).to(weight.device)
        rows = weight[units].movedim(1, -1).flatten(1, -1)  # (C, in x kernel x positions of one unit)
        found[site.name] = site.step * effective_dimension(rows.mT, epsilon)
    return found
