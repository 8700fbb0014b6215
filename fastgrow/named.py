"""Sites named by hand, for models that `torch.export` cannot follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .closures import preserved
from .errors import GrowthError
from .names import find_module
from .sites import Sites, as_call, discover, unwrap

__all__ = ["name_sites"]


def name_sites(model: nn.Module, example_inputs: Any, chains: Sequence[Sequence[str]]) -> Sites:
    """Sites along chains of modules that the forward pass calls one after the other.

    For models that `find_sites` cannot export. chains: each a list of module names in the order they are
    called, from a layer with weights to one, with the activations, norms and pooling between; a convolution
    followed by a linear layer is flattened between. Two chains share no layer: name the longer chain instead.

    You vouch that nothing else reads or writes these channels; the model is called once on the example inputs
    for the shapes, and left as it was. Raises `GrowthError` for a name that is no module or is not called.
    """
    inner = unwrap(model)
    if isinstance(chains, str) or not all(isinstance(chain, (list, tuple)) and len(chain) > 1 for chain in chains):
        raise GrowthError(
            f"name_sites: chains={chains!r} was given; wanted a list of chains, each a list of two module names or more"
        )
    names = [name for chain in chains for name in chain]
    for name in names:
        if find_module(inner, name) is None:
            raise GrowthError(f"name_sites: {name!r} is no module of {type(inner).__name__}; see model.named_modules()")
    layers = [name for name in names if next(find_module(inner, name).parameters(False), None) is not None]  # type: ignore[union-attr]
    shared = sorted({name for name in layers if layers.count(name) > 1})
    if shared:
        raise GrowthError(f"name_sites: {shared[0]!r} stands in two chains; name one chain that runs through it")
    inputs = _inputs(inner, example_inputs, [chain[0] for chain in chains if chain])
    sites = discover(_Chains(inner, chains), tuple(inputs))
    graph = sites.graph
    assert graph is not None
    # the model's own arguments are not those of the chains
    trace = dataclasses.replace(graph.trace, inputs=(), paths=())
    return dataclasses.replace(sites, graph=dataclasses.replace(graph, trace=trace))


def _inputs(model: nn.Module, example_inputs: Any, firsts: Sequence[str]) -> list[Tensor]:
    """What the first layer of each chain is given in one call of the model."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name in firsts:
        module = find_module(model, name)
        assert module is not None

        def keep(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            seen.setdefault(name, args[0].detach())

        handles.append(module.register_forward_pre_hook(keep))
    args, kwargs = as_call(example_inputs)
    try:
        with preserved(model), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in firsts if name not in seen]
    if missing:
        raise GrowthError(f"name_sites: {missing[0]!r} was not called on the example inputs")
    return [seen[name] for name in firsts]


class _Chains(nn.Module):
    """The model's modules under their own names, called chain by chain."""

    def __init__(self, model: nn.Module, chains: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self._modules = model._modules
        self._chains = [list(chain) for chain in chains]

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        outputs = []
        for x, chain in zip(inputs, self._chains, strict=True):
            for name in chain:
                module = self.get_submodule(name)
                if isinstance(module, nn.Linear) and x.dim() > 2 and x.shape[-1] != module.in_features:
                    x = x.flatten(1)
                x = module(x)
            outputs.append(x)
        return outputs
