"""Growth tried on the model itself and taken back, for methods that need the loss of the grown network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import replicas_of, together, without_gradient_traffic
from .edits import Edits
from .errors import GrowthError
from .names import modules_in
from .newborns import Newborns, Start
from .sites import Sites, tensors_of, unwrap
from .widen import widen

__all__ = ["Grown", "Rehearsal", "checked_loss", "preserved", "restored"]

_REGISTRIES = ("_parameters", "_buffers", "_modules")


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Buffers and RNG state are put back, no rank waits for gradients; ``.grad`` is the caller's to leave alone."""
    inner = unwrap(model)
    held = {id(b): b for module in modules_in(inner) for b in module._buffers.values() if b is not None}
    buffers = [(buffer, buffer.detach().clone()) for buffer in held.values()]
    devices = sorted({p.device.index for p in inner.parameters() if p.is_cuda}) if torch.cuda.is_available() else []
    state, states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
    with without_gradient_traffic(model):
        try:
            yield
        finally:
            torch.set_rng_state(state)
            for device, value in zip(devices, states, strict=True):
                torch.cuda.set_rng_state(value, device)
            if buffers:
                with torch.no_grad():
                    for buffer, value in buffers:
                        buffer.copy_(value)


def checked_loss(closure: Callable[[], Tensor]) -> Tensor:
    """The closure's loss; GrowthError unless it is a tensor of one element that can be backpropagated."""
    if not callable(closure):
        raise GrowthError(f"closure is a {type(closure).__name__}; wanted a function that returns the loss")
    loss = closure()
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        shown = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise GrowthError(
            f"closure returned {shown}; wanted the loss, a tensor of one element that requires grad, not yet "
            "backpropagated"
        )
    return loss


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

    def gradients(self, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(loss, its gradients); zero where the loss does not depend on a tensor. ``.grad`` is not touched.

        Under DistributedDataParallel both are means over the ranks, the same bits on each.
        """
        replicas = replicas_of(self.model)
        with together(replicas), torch.enable_grad():
            loss = checked_loss(self.closure)
            found = torch.autograd.grad(loss, list(tensors), allow_unused=True)
        pairs = zip(tensors, found, strict=True)
        values = [loss.detach(), *(torch.zeros_like(t) if g is None else g for t, g in pairs)]
        if replicas is not None:
            values = [replicas.sum(value.contiguous()) / replicas.size for value in values]
        return values[0], values[1:]

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
