"""Sites named by hand, for models that `torch.export` cannot follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .closures import preserved
from .errors import GrowthError
from .names import find_module
from .sites import Sites, as_call, discover, evaluation, untouched, unwrap

__all__ = ["name_sites"]


def name_sites(model: nn.Module, example_inputs: Any, chains: Sequence[Sequence[str]]) -> Sites:
    """Sites along chains of modules that the forward pass calls one after the other.

    For models that `find_sites` cannot export. chains: each a list of module names in the order they are
    called, from a layer with weights to one, with the activations, norms and pooling between; a convolution
    followed by a linear layer is flattened between. Two chains share no layer: name the longer chain instead.

    You vouch that nothing else reads or writes these channels. The model is called once on the example inputs, in
    evaluation mode, and left as it was. Raises `GrowthError` for a name that is no module or is not called, for a chain
    that leaves out what the model computes between two of its layers, and for one along which nothing can grow.
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
    inputs, inside = _called(inner, example_inputs, chains, layers)
    sites = discover(_Chains(inner, chains), tuple(inputs))
    for chain in chains:
        if not any(set(site.producers) & set(chain) for site in sites):
            reasons = "; ".join(f"{name}: {sites.frozen[name]}" for name in chain if name in sites.frozen)
            raise GrowthError(f"name_sites: nothing along the chain {list(chain)} can grow ({reasons or 'no layers'})")
    infos = {
        name: dataclasses.replace(info, is_output=info.is_output and name not in inside)
        for name, info in sites.layers.items()
    }
    graph = sites.graph
    assert graph is not None
    # the model's own arguments are not those of the chains
    trace = dataclasses.replace(graph.trace, inputs=(), paths=())
    return dataclasses.replace(sites, layers=infos, graph=dataclasses.replace(graph, trace=trace))


def _called(
    model: nn.Module, example_inputs: Any, chains: Sequence[Sequence[str]], layers: Sequence[str]
) -> tuple[list[Tensor], set[str]]:
    """What the first layer of each chain is given in one call of the model; the last layers that others follow."""
    given: dict[str, list[Tensor]] = {name: [] for name in (*(chain[0] for chain in chains), *layers)}
    reads: list[tuple[str, Any]] = []  # layer, where autograd has what it reads
    written: dict[str, Any] = {}  # last layer -> where autograd has its output
    lasts = {next((name for name in reversed(chain) if _is_layer(model, name)), chain[-1]) for chain in chains}

    def enters(name: str, args: tuple[Any, ...]) -> None:
        if name in given:
            given[name].append(args[0].detach().clone())  # what comes later may write into it
        reads.extend((name, arg.grad_fn) for arg in args if isinstance(arg, Tensor))

    def leaves(name: str, output: Tensor) -> Tensor:
        output = output + output.new_zeros((), requires_grad=True)  # a frozen layer's output has a history as well
        written[name] = output.grad_fn
        return output

    watched = given.keys() | {name for name, _ in model.named_modules() if _is_layer(model, name)}
    args, kwargs = as_call(example_inputs)
    with preserved(model), untouched(model), evaluation(model):
        handles = [
            *(_module(model, n).register_forward_pre_hook(lambda _, args, n=n: enters(n, args)) for n in watched),
            *(_module(model, n).register_forward_hook(lambda _, args, out, n=n: leaves(n, out)) for n in lasts),
        ]
        try:
            with torch.enable_grad():
                model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        missing = [name for name, tensors in given.items() if not tensors]
        if missing:
            raise GrowthError(f"name_sites: {missing[0]!r} was not called on the example inputs")
        with torch.no_grad():
            for chain in chains:
                _check_along(model, chain, given)
    followed = {last for last, at in written.items() if at in _history([by for name, by in reads if name != last])}
    return [given[chain[0]][0] for chain in chains], followed


def _check_along(model: nn.Module, chain: Sequence[str], given: Mapping[str, Sequence[Tensor]]) -> None:
    """Raises where a layer is given along the chain what it is not given in the model."""
    before = chain[0]
    for name, x in _along(model, given[chain[0]][0], chain):
        if name in given and not any(_same(x, seen) for seen in given[name]):
            wanted, shape = tuple(given[name][0].shape), tuple(x.shape)
            found = f"other values of shape {shape}" if shape == wanted else f"{shape}"
            raise GrowthError(
                f"name_sites: {name!r} is given {wanted} in the model, and {found} along the chain, behind "
                f"{before!r}: name every module between them; what a function computes there cannot be named, "
                "so make it a module"
            )
        before = name


def _module(model: nn.Module, name: str) -> nn.Module:
    module = find_module(model, name)
    assert module is not None
    return module


def _is_layer(model: nn.Module, name: str) -> bool:
    """Whether a module has a matrix of its own: a linear layer, a convolution, a recurrent layer."""
    return any(parameter.dim() > 1 for parameter in _module(model, name).parameters(recurse=False))


def _history(nodes: Sequence[Any]) -> set[Any]:
    """These places in autograd's graph, and all that they were computed from."""
    found = {node for node in nodes if node is not None}
    waiting = list(found)
    while waiting:
        further = {node for node, _ in waiting.pop().next_functions if node is not None} - found
        found |= further
        waiting += further
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal but for their shapes and the rounding of half types."""
    if one.numel() != other.numel():
        return False
    one, other = one.reshape(-1).double(), other.reshape(-1).double()
    return bool(((one - other).abs() <= 2e-2 * other.abs().max()).all()) if one.numel() else True


def _along(model: nn.Module, x: Tensor, chain: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Each module's name with what it is given, then "" with what the last one returns."""
    for name in chain:
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear) and x.dim() > 2 and x.shape[-1] != module.in_features:
            x = x.flatten(1)
        yield name, x
        x = module(x)
    yield "", x


class _Chains(nn.Module):
    """The model's modules under their own names, called chain by chain."""

    def __init__(self, model: nn.Module, chains: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self._modules = model._modules
        self._chains = [list(chain) for chain in chains]

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [list(_along(self, x, chain))[-1][1] for x, chain in zip(inputs, self._chains, strict=True)]
