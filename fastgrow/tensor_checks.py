"""What stands in the way of a tensor that is to grow: hooks that compute it, other references, shared memory."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import NoneType

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import stages
from .errors import GrowthError
from .names import find_module, find_tensor, is_wrapper, modules_in
from .optimizer_state import holds
from .replacement import GrownParameter

__all__ = ["check_copies", "check_memory", "check_owner", "check_parametrization", "check_references", "unknown_tensor"]

_PLAIN = frozenset((bool, int, float, str, NoneType))
_OWN = frozenset(("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", stages.ATTRIBUTE))


def check_owner(module: nn.Module, leaf: str, name: str, whose: str) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise GrowthError(f"{whose}: {name!r} belongs to a ScriptModule, whose shapes are fixed; grow the original")
    # The hooks of torch.nn.utils.weight_norm, spectral_norm and prune: weight from weight_g and weight_v, ...
    for source, value in vars(module).items() if "_" in leaf else ():
        if isinstance(value, Tensor) and leaf.startswith(f"{source}_"):
            raise GrowthError(
                f"{whose}: a hook computes {source!r} from {name!r} and keeps it at its old size; "
                "use torch.nn.utils.parametrizations instead, or remove the hook before growing"
            )


def check_memory(roots: Sequence[nn.Module], grown: Mapping[int, GrownParameter]) -> None:
    """Two tensor objects over the same memory would be one no longer."""
    at = {found.old.data_ptr(): found for found in grown.values() if _has_memory(found.old)}
    at.pop(0, None)
    if not at:
        return
    for module in modules_in(*roots):
        for registry in (module._parameters, module._buffers):
            for tensor in registry.values():
                if tensor is None or not _has_memory(tensor):
                    continue
                twin = at.get(tensor.data_ptr())
                if twin is not None and twin.old is not tensor:
                    name = next(
                        name
                        for root in roots
                        for named in (root.named_parameters(), root.named_buffers())
                        for name, other in named
                        if other is tensor
                    )
                    raise GrowthError(
                        f"{twin.name!r} and {name!r} share memory but are two tensors; tie them as one Parameter "
                        "(layer.weight = other.weight), or give them memory of their own"
                    )


def _has_memory(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.numel() > 0


def check_references(module: nn.Module, grown: Mapping[int, GrownParameter]) -> None:
    # DDP and its like keep lists of parameters; such wrappers are renewed after growth.
    if is_wrapper(module):
        return
    for key, value in vars(module).items():
        if value.__class__ not in _PLAIN and key not in _OWN and "_hook" not in key and holds(value, grown):
            raise GrowthError(
                f"{type(module).__name__}.{key} keeps a second reference to a tensor that would grow; "
                "look it up where it is used instead"
            )


def check_parametrization(module: parametrize.ParametrizationList, grown: Mapping[int, GrownParameter]) -> None:
    """Compute the parametrized tensor from the new originals: those that can't grow fail here."""
    named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    named.update(module.named_buffers(remove_duplicate=False))
    fresh = {name: grown[id(tensor)].preview() for name, tensor in named.items() if id(tensor) in grown}
    if not fresh:
        return
    # Copies, for a power iteration writes to its buffers.
    trial = {name: fresh.get(name, tensor).detach().clone() for name, tensor in named.items()}
    try:
        torch.func.functional_call(module, trial, ())
    except Exception as error:
        kinds = ", ".join(type(child).__name__ for child in module)
        raise GrowthError(
            f"the parametrization {kinds} fails on the grown {', '.join(fresh)}: {error}; edit all of its "
            "tensors, or call torch.nn.utils.parametrize.remove_parametrizations before growing"
        ) from error


def check_copies(copies: Sequence[nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Raises `GrowthError` for a copy of the model that lacks one of its tensors or has it in another shape."""
    for copy in copies:
        whose = f"a copy that must follow ({type(copy).__name__})"
        for name, own in tensors.items():
            place = find_tensor(copy, name)
            if place is None:
                raise GrowthError(unknown_tensor(copy, name, whose))
            theirs = getattr(*place)
            if theirs.shape != own.shape:
                raise GrowthError(f"{whose}: {name!r} has shape {tuple(theirs.shape)}, in the model {tuple(own.shape)}")


def unknown_tensor(root: nn.Module, name: str, whose: str) -> str:
    path, _, leaf = name.rpartition(".")
    module = find_module(root, path)
    if module is None:
        return f"{whose} has no module {path!r}, whose {leaf!r} was to grow"
    if parametrize.is_parametrized(module, leaf):
        prefix = f"parametrizations.{leaf}"
        wrapped = module.get_submodule(prefix)
        kinds = ", ".join(type(child).__name__ for child in wrapped.children())
        originals = ", ".join(f"{path}.{prefix}.{key}".lstrip(".") for key in wrapped._parameters)
        return (
            f"{whose}: {name!r} is computed by the parametrization {kinds}; edit {originals}, "
            "or call torch.nn.utils.parametrize.remove_parametrizations first"
        )
    if leaf in module._parameters or leaf in module._buffers:
        return f"{whose}: {type(module).__name__} {path!r} has no {leaf} (it is None)"
    if isinstance(vars(module).get(leaf), Tensor):
        return f"{whose}: {name!r} is computed by a hook from other tensors; remove the hook before growing"
    known = [known for named in (root.named_parameters(), root.named_buffers()) for known, _ in named]
    near = difflib.get_close_matches(name, known, n=1)
    return f"{whose} has no parameter or buffer {name!r}" + (f"; is it {near[0]!r}?" if near else "")
