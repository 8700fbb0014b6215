"""Growth tried on the model itself and taken back, for methods that need the loss of the grown network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .closures import backpropagated, checked_loss, preserved
from .cores import to_host
from .distributed import replicas_of, together
from .edits import Edits
from .errors import GrowthError
from .newborns import Newborns, Start
from .sites import Sites, tensors_of, unwrap
from .widen import widen

__all__ = ["Grown", "Rehearsal", "restored"]

_REGISTRIES = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Grown:
    """A model grown on trial. axes: tensor name -> grown dimension -> the new positions of its old indices."""

    tensors: Mapping[str, Tensor]
    sizes: Mapping[int, int]
    axes: Mapping[str, Mapping[int, Tensor]]


@dataclass
class Rehearsal:
    """The growth of these units, to be tried before it is carried out.

    build: from units and starts to edits. newborns: one site's new units as `How.start` sees them.
    """

    model: nn.Module
    sites: Sites
    units: Mapping[str, int]
    closure: Callable[[], Tensor]
    build: Callable[[Mapping[str, int], Mapping[str, Start]], Edits]
    newborns: Callable[[str, int], Newborns]

    @contextlib.contextmanager
    def grown(self, units: Mapping[str, int], starts: Mapping[str, Start]) -> Iterator[Grown]:
        """The model with these units more for the length of the block.

        Their values may be written in place. Afterwards the model, its gradients, its buffers and the RNG are as
        they were; a compiled model compiles anew.
        """
        edits = self.build(units, starts)
        inner = unwrap(self.model)
        with preserved(self.model), restored(inner):
            self._draw_alike()
            widen(inner, edits.tensors, attributes=edits.attributes, swaps=edits.swaps)
            yield Grown(
                tensors_of(inner),
                self.sites.sizes(inner),
                {edit.tensor: dict(edit.axes) for edit in edits.tensors},
            )

    def gradients(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss's gradients by tensor name; zero where it does not depend on one. ``.grad`` is not touched.

        Under DistributedDataParallel they are means over the ranks, the same bits on each. Raises `GrowthError` where
        the loss or one of them is not finite.
        """
        replicas = replicas_of(self.model)
        with together(replicas), torch.enable_grad():
            loss = checked_loss(self.closure)
            found = backpropagated(loss, list(tensors.values()))
        pairs = zip(tensors.values(), found, strict=True)
        values = [loss.detach(), *(torch.zeros_like(t) if g is None else g for t, g in pairs)]
        if replicas is not None:
            values = [replicas.sum(value.contiguous()) / replicas.size for value in values]
        _check_finite(values[0], gradients := dict(zip(tensors, values[1:], strict=True)))
        return gradients

    def _draw_alike(self) -> None:
        """Rank 0's random state on every rank, so that all try the same units."""
        replicas = replicas_of(self.model)
        if replicas is None:
            return
        state = torch.get_rng_state()
        replicas.share_([state])
        torch.set_rng_state(state)
        if replicas.device.type == "cuda":
            state = torch.cuda.get_rng_state(replicas.device)
            replicas.share_([state])
            torch.cuda.set_rng_state(state, replicas.device)


def _check_finite(loss: Tensor, gradients: Mapping[str, Tensor]) -> None:
    """Of all tensors at once, so that a device is waited for once."""
    fine = to_host([value.isfinite().all() for value in (*gradients.values(), loss)])
    bad = next((name for name, ok in zip((*gradients, None), fine, strict=True) if not ok), "")
    if bad == "":
        return
    what = "the loss" if bad is None else f"layer {bad.rpartition('.')[0] or bad!r}: the gradient of {bad!r}"
    raise GrowthError(
        f"{what} is not finite (the loss is {float(loss):g}), so no new units can be trained on it; check the batch "
        "and the loss, or lower the learning rate if the run has diverged"
    )


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Every module's attributes and registries are put back."""
    saved: list[tuple[nn.Module, dict[str, Any], dict[str, dict[str, Any]]]] = [
        (module, dict(vars(module)), {name: dict(vars(module)[name]) for name in _REGISTRIES})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, registries in saved:
            vars(module).clear()
            vars(module).update(attributes)
            for name, entries in registries.items():
                registry = vars(module)[name]
                registry.clear()
                registry.update(entries)
