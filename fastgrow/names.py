"""From a name in ``state_dict()`` or ``named_modules()`` to the object, through the wrappers people use.

``torch.compile``, ``AveragedModel``, DDP and activation checkpointing each put one component into the
names of what they wrap. A name found in a model is looked up in a wrapped copy of it, and the reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

__all__ = ["eps_of", "find_module", "find_tensor", "innermost", "is_wrapper", "modules_in", "named_modules_in"]

_WRAPPERS = ("_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def modules_in(*roots: nn.Module) -> list[nn.Module]:
    """Every module of the roots once, in the order of ``modules()``: one loop, for its nested generators take longer
    than what is looked for."""
    found: dict[int, nn.Module] = {}
    waiting: list[nn.Module | None] = list(reversed(roots))
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            waiting.extend(reversed(module._modules.values()))
    return list(found.values())


def named_modules_in(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under each of its names, as ``named_modules(remove_duplicate=False)``; likewise one loop."""
    found: list[tuple[str, nn.Module]] = []
    waiting: list[tuple[str, nn.Module]] = [("", root)]
    while waiting:
        prefix, module = waiting.pop()
        found.append((prefix, module))
        if children := module._modules:
            start = f"{prefix}." if prefix else ""
            waiting += [(start + name, child) for name, child in reversed(children.items()) if child is not None]
    return found


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


def eps_of(norm: nn.Module | None) -> tuple[str, float] | None:
    """The attribute that holds an RMSNorm's eps under one of its usual names, and its value."""
    for attribute in ("eps", "variance_epsilon", "epsilon", "norm_eps"):
        value = getattr(norm, attribute, None)
        if isinstance(value, float):
            return attribute, value
    return None


def _has_child(module: nn.Module, name: str) -> bool:
    return name in module._modules and module._modules[name] is not None


def _has_tensor(module: nn.Module, name: str) -> bool:
    # Not by dict.get: a ScriptModule's registries have none.
    own, buffers = module._parameters, module._buffers
    return (name in own and own[name] is not None) or (name in buffers and buffers[name] is not None)
