"""A Hugging Face model's config follows its growth, so that ``from_pretrained`` builds the grown model."""

from __future__ import annotations

import copy
import math
import sys
import warnings
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import stages
from ..sites import tensors_of

__all__ = ["follow_config", "follow_configs"]

_TRIES = 64  # models built on the meta device for one growth, at most
_WIDTH_WORDS = ("inner", "intermediate", "ffn", "mlp")  # fields that are None for a width derived from others
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def follow_configs(model: nn.Module) -> None:
    """`follow_config` for every pretrained model in a module that is not part of another; warns once for each
    whose config cannot say its widths."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return
    for pretrained in _outermost(model, transformers.PreTrainedModel):
        if follow_config(pretrained) is None and pretrained not in _warned:
            _warned.add(pretrained)
            warnings.warn(
                f"{type(pretrained).__name__}: its config cannot say the widths it has grown to, so what "
                "save_pretrained writes cannot be loaded by from_pretrained; save and load it with fg.save and "
                "fg.load, or grow all layers alike",
                stacklevel=3,
            )


def follow_config(model: Any) -> dict[str, Any] | None:
    """Set the fields of ``model.config`` that make ``type(model)(model.config)`` the grown model.

    Fields are tried where their value divides a width that changed, and kept only if the model that is built
    from them (on the meta device) has every tensor's shape, every attribute that growth has edited, and keeps
    every other number that its modules hold. Returns the fields that were changed; None, with the config as it
    was, where no fields say it: layers of one kind that have grown to different widths, for instance.
    """
    config, changed = copy.deepcopy(model.config), {}
    present = _built(model, config)
    if present is None:
        return None
    wanted = _Seen.of(model)
    edited = {
        (name, attribute) for name, module in model.named_modules() for attribute in stages.edited_attributes(module)
    }
    # A number that someone else has changed is no matter of growth.
    judged = edited | {key for key, value in wanted.numbers.items() if present.numbers.get(key) == value}
    if present.shapes.keys() != wanted.shapes.keys():  # a layer was inserted
        return None
    tries = 0
    while (missing := wanted.differences(present, judged)) > 0:
        for path, value in _proposals(config, present, wanted):
            if tries == _TRIES:
                return None
            tries += 1
            trial = copy.deepcopy(config)
            _set(trial, path, value)
            built = _built(model, trial)
            if built is not None and wanted.differences(built, judged) < missing:
                config, present, changed[path] = trial, built, value
                break
        else:
            return None
    for path, value in changed.items():
        _set(model.config, path, value)
    return {".".join(map(str, path)): value for path, value in changed.items()}


@dataclass(frozen=True)
class _Seen:
    """What can be compared of two models: shapes by tensor, numbers by (module, attribute)."""

    shapes: dict[str, tuple[int, ...]]
    numbers: dict[tuple[str, str], float]

    @classmethod
    def of(cls, model: nn.Module) -> _Seen:
        return cls(
            {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()},
            {
                (name, attribute): value
                for name, module in model.named_modules()
                for attribute, value in vars(module).items()
                if type(value) in (int, float)
            },
        )

    def differences(self, other: _Seen, judged: Collection[tuple[str, str]]) -> float:
        """How many tensors and judged numbers are others there."""
        if other.shapes.keys() != self.shapes.keys():
            return math.inf
        shapes = sum(other.shapes[name] != shape for name, shape in self.shapes.items())
        return shapes + sum(other.numbers.get(key) != self.numbers.get(key) for key in judged)


def _outermost(module: nn.Module, kind: type) -> Iterator[nn.Module]:
    if isinstance(module, kind):
        yield module
        return
    for child in module.children():
        yield from _outermost(child, kind)


def _built(model: nn.Module, config: Any) -> _Seen | None:
    """The model that a config builds once it was written and read; None where its fields do not go together."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return _Seen.of(type(model)(type(config).from_dict(config.to_dict())))
    except Exception:  # a config's own checks raise anything
        return None


def _proposals(config: Any, present: _Seen, wanted: _Seen) -> list[tuple[tuple[str | int, ...], int]]:
    """(field, new value), those that are a width themselves before those that divide one."""
    pairs = {
        (old, new)
        for name, shape in wanted.shapes.items()
        for old, new in zip(present.shapes[name], shape, strict=True)
        if old != new
    }
    found: dict[tuple[tuple[str | int, ...], int], int] = {}
    for path, value in _fields(config):
        for old, new in sorted(pairs):
            if value is None:
                if any(word in str(path[-1]) for word in _WIDTH_WORDS):
                    found.setdefault((path, new), 1)
            elif value > 0 and old % value == 0 and new % (old // value) == 0:
                found.setdefault((path, new // (old // value)), old // value)
    return sorted(found, key=lambda proposal: found[proposal])


def _fields(config: Any, prefix: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], int | None]]:
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if value is None or type(value) is int:
            yield (*prefix, name), value
        elif isinstance(value, (list, tuple)):
            for at, entry in enumerate(value):
                if type(entry) is int:
                    yield (*prefix, name, at), entry
        elif hasattr(value, "to_diff_dict"):
            yield from _fields(value, (*prefix, name))


def _set(config: Any, path: tuple[str | int, ...], value: int) -> None:
    *before, last = path
    holder = config
    for part in before[:-1] if isinstance(last, int) else before:
        holder = getattr(holder, str(part))
    if isinstance(last, int):
        name = str(before[-1])
        entries = list(getattr(holder, name))
        entries[last] = value
        setattr(holder, name, type(getattr(holder, name))(entries))
    else:
        setattr(holder, last, value)
