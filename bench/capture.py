"""The two tensors of a pair of layers, from a forward and backward pass."""

from __future__ import annotations

from torch import Tensor, nn

from .models import Case

__all__ = ["factors"]


def factors(case: Case, model: nn.Module) -> list[tuple[nn.Module, nn.Module, Tensor, Tensor]]:
    """(producer, consumer, h, dz) of the pairs between which nothing lies but an activation (and norms)."""
    held: list[tuple[nn.Module, nn.Module, list[Tensor], list[Tensor]]] = []
    handles = []
    for pair in case.pairs:
        if pair.pool > 1 or pair.averaged:
            continue
        h: list[Tensor] = []
        dz: list[Tensor] = []
        producer, consumer = model.get_submodule(pair.producer), model.get_submodule(pair.consumer)
        handles.append(producer.register_forward_pre_hook(lambda m, args, h=h: h.append(args[0].detach())))
        handles.append(
            consumer.register_forward_hook(
                lambda m, args, out, dz=dz: out.register_hook(lambda g: dz.append(g.detach())) and None
            )
        )
        held.append((producer, consumer, h, dz))
    case.loss(model).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return [(producer, consumer, h[0], dz[0]) for producer, consumer, h, dz in held]
