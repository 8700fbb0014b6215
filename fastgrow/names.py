"""From a name in ``state_dict()`` or ``named_modules()`` to the object, through the wrappers people use.

``torch.compile``, ``AveragedModel``, DDP and activation checkpointing each put one component into the
names of what they wrap. A name found in a model is looked up in a wrapped copy of it, and the reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

__all__ = ["find_module", "find_tensor", "innermost", "is_wrapper"]

_WRAPPERS = ("_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def _wrapped(module: nn.Module) -> nn.Module | None:
    if len(module._modules) != 1:
        return None
    ((name, child),) = module._modules.items()
    return child if name in _WRAPPERS else None


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module does nothing but hold another one, under one of the wrappers' names."""
    return _wrapped(module) is not None


def innermost(module: nn.Module, found: Callable[[nn.Module], bool]) -> nn.Module | None:
    """The module itself, or the first one inside its wrappers, for which `found` holds."""
    current: nn.Module | None = module
    while current is not None and not found(current):
        current = _wrapped(current)
    return current


def find_module(root: nn.Module, name: str) -> nn.Module | None:
    """The module of this name ("" is the root itself), or None."""
    module = root
    for part in name.split(".") if name else ():
        if _has_child(module, part):
            module = module._modules[part]  # type: ignore[assignment]
            continue
        holder = innermost(module, partial(_has_child, name=part))
        if holder is not None:
            module = holder._modules[part]  # type: ignore[assignment]
        elif part not in _WRAPPERS:
            return None
    return module


def find_tensor(root: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """(the module that owns it, the name there) of a parameter or buffer, or None."""
    path, _, leaf = name.rpartition(".")
    module = find_module(root, path)
    if module is not None and _has_tensor(module, leaf):
        return module, leaf
    # Not by truth value: an empty ModuleList is false, a compiled module has none.
    owner = None if module is None else innermost(module, partial(_has_tensor, name=leaf))
    return None if owner is None else (owner, leaf)


def _has_child(module: nn.Module, name: str) -> bool:
    return name in module._modules and module._modules[name] is not None


def _has_tensor(module: nn.Module, name: str) -> bool:
    # Not by dict.get: a ScriptModule's registries have none.
    own, buffers = module._parameters, module._buffers
    return (name in own and own[name] is not None) or (name in buffers and buffers[name] is not None)
