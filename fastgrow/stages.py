"""When each index of a grown axis was born, and where the seed's indices lie now.

Both live in one plain attribute of the module that owns the tensor: attributes of Parameters do not
survive ``copy.deepcopy``, buffers would show in ``state_dict()``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .errors import GrowthError
from .names import find_tensor, modules_in, named_modules_in

__all__ = [
    "ATTRIBUTE",
    "EDITED",
    "ROOM",
    "WITHOUT_ROOM",
    "Axes",
    "Axis",
    "any_room",
    "axes_of",
    "clear",
    "edited_attributes",
    "live",
    "live_in",
    "live_part",
    "load_state",
    "newest_stage",
    "record",
    "stages_of",
    "state",
    "with_growth",
    "without_room",
]

ATTRIBUTE = "_fastgrow_axes"
"""Name of the attribute that holds a module's `Axes`."""

EDITED = "_fastgrow_edited"
"""Name of the attribute that holds the names of a module's other attributes that growth has changed."""

WITHOUT_ROOM = "_fastgrow_without_room"
"""Name of the attribute that holds what a module's size attributes would be if its room were cut off."""

ROOM = 2**31 - 1
"""The stage of reserved room: no unit yet. The largest, so that an entry is room where any of its indices is."""


@dataclass(frozen=True, eq=False)
class Axis:
    """One grown dimension of one tensor. Both tensors are int64 on the CPU."""

    stage: Tensor  # (n,): the stage at which each index was born, 0 for the seed, ROOM where no unit is
    origin: Tensor  # (seed length,): the present position of each index of the seed

    @staticmethod
    def seed(length: int) -> Axis:
        """An axis that has not grown yet."""
        return Axis(torch.zeros(length, dtype=torch.int64, device="cpu"), torch.arange(length, device="cpu"))

    @cached_property
    def newest(self) -> int:
        """The stage of the youngest index."""
        born = self.stage[self.live] if self.has_room else self.stage
        return int(born.max()) if born.numel() else 0

    def grown(self, index: Tensor, length: int, stage: int, room: Tensor | None = None) -> Axis:
        """After a growth to `length` that moved index i to ``index[i]``; positions in `room` hold no unit, the others
        are born at `stage`. Where room is given, -1 in the index drops it."""
        stages = torch.full((length,), stage, dtype=torch.int64, device="cpu")
        if room is None:
            stages.index_copy_(0, index, self.stage)
        else:
            stages[room] = ROOM
            stages[index[index >= 0]] = self.stage[index >= 0]
        return Axis(stages, index[self.origin])

    @cached_property
    def live(self) -> Tensor:
        """The positions that hold units: int64."""
        return (self.stage != ROOM).nonzero().squeeze(1)

    @cached_property
    def has_room(self) -> bool:
        """Whether some positions hold none."""
        return bool(self.stage.numel()) and int(self.stage.max()) == ROOM


Axes = Mapping[str, Mapping[int, Axis]]
"""Tensor name in its module -> dimension -> `Axis`."""


def axes_of(module: nn.Module) -> dict[str, dict[int, Axis]]:
    """The grown axes of a module's own tensors (a copy); empty where nothing has grown."""
    return {name: dict(dims) for name, dims in vars(module).get(ATTRIBUTE, {}).items()}


def stages_of(module: nn.Module, tensor_name: str) -> dict[int, Tensor]:
    """dimension -> (n,) int64 stages, for each grown dimension of ``module.<tensor_name>``."""
    return {dim: axis.stage for dim, axis in axes_of(module).get(tensor_name, {}).items()}


def record(module: nn.Module, axes: Axes) -> None:
    """Set a module's grown axes; none removes the attribute."""
    if axes:
        vars(module)[ATTRIBUTE] = {name: dict(dims) for name, dims in axes.items()}
    else:
        vars(module).pop(ATTRIBUTE, None)


def with_growth(
    known: Mapping[int, Axis],
    old: tuple[int, ...],
    new: tuple[int, ...],
    maps: Mapping[int, Tensor],
    stage: int,
    made: dict[tuple[int, ...], Axis],
    room: Mapping[int, Tensor] | None = None,
) -> dict[int, Axis]:
    """The axes of one tensor after a growth from `old` to `new` shape; `maps`, `room` as in `TensorEdit`.

    made: the axes that this growth has made so far, shared by tensors whose axes were one and move alike.
    A dimension that only moved its indices is followed if it has grown before, and not begun otherwise.
    """
    axes = dict(known)
    for dim, index in maps.items():
        if dim in axes or new[dim] > old[dim]:
            before = axes.get(dim)
            own = (room or {}).get(dim)
            key = (id(index), new[dim], -1 if before is None else id(before), -1 if own is None else id(own))
            if key not in made:
                made[key] = (before or Axis.seed(old[dim])).grown(index, new[dim], stage, own)
            axes[dim] = made[key]
    return axes


def live(axes: Mapping[int, Axis]) -> dict[int, Tensor]:
    """dimension -> the positions that hold units, of each dimension that has room."""
    return {dim: axis.live for dim, axis in axes.items() if axis.has_room}


def any_room(model: nn.Module) -> bool:
    """Whether a tensor of the model has room."""
    for module in modules_in(model):
        if (marked := module.__dict__.get(ATTRIBUTE)) is not None:
            for dims in marked.values():
                for axis in dims.values():
                    if axis.has_room:
                        return True
    return False


def live_in(model: nn.Module, named: Sequence[tuple[str, nn.Module]] | None = None) -> dict[str, dict[int, Tensor]]:
    """`live` of every tensor with room, by each of its names. named: `named_modules_in` the model, where at hand."""
    found: dict[str, dict[int, Tensor]] = {}
    for prefix, module in named_modules_in(model) if named is None else named:
        if (marked := module.__dict__.get(ATTRIBUTE)) is not None:
            for leaf, axes in marked.items():
                if positions := live(axes):
                    found[f"{prefix}.{leaf}" if prefix else leaf] = positions
    return found


def live_part(tensor: Tensor, positions: Mapping[int, Tensor]) -> Tensor:
    """A tensor without its room: a view where the units lie before it, else a copy."""
    for dim, index in positions.items():
        if len(index) and int(index[-1]) == len(index) - 1:
            tensor = tensor.narrow(dim, 0, len(index))
        else:
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def without_room(module: nn.Module) -> dict[str, Any]:
    """Size attributes of a module whose tensors have room -> their values without it."""
    return dict(vars(module).get(WITHOUT_ROOM, {}))


def edited_attributes(module: nn.Module) -> tuple[str, ...]:
    """The plain attributes of a module that growth has changed (``out_channels``), in order."""
    return tuple(vars(module).get(EDITED, ()))


def clear(model: nn.Module) -> None:
    """Forget all stages, index maps and changes of attributes: the model counts as a seed again."""
    for module in model.modules():
        record(module, {})
        vars(module).pop(EDITED, None)
        vars(module).pop(WITHOUT_ROOM, None)


def newest_stage(model: nn.Module) -> int:
    """The stage of the youngest unit in the model; 0 where nothing has grown."""
    marked = [grown for module in modules_in(model) if (grown := module.__dict__.get(ATTRIBUTE)) is not None]
    return max((axis.newest for grown in marked for dims in grown.values() for axis in dims.values()), default=0)


def state(model: nn.Module) -> dict[str, dict[int, dict[str, Tensor]]]:
    """{tensor name: {dimension: {"stage": (n,), "origin": (seed length,)}}}, for checkpoints.

    Plain dicts, ints and int64 tensors: ``torch.load(weights_only=True)`` reads it back. Tied tensors
    stand there under each of their names.
    """
    return {
        f"{prefix}.{name}" if prefix else name: {
            dim: {"stage": axis.stage.clone(), "origin": axis.origin.clone()} for dim, axis in dims.items()
        }
        for prefix, module in model.named_modules()
        for name, dims in axes_of(module).items()
    }


def load_state(model: nn.Module, state: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> None:
    """Replace all stages and index maps of a model that has the widths they were saved from.

    Raises `GrowthError`, with nothing changed, where a tensor is missing or has another size.
    """
    loaded: dict[nn.Module, dict[str, dict[int, Axis]]] = {}
    for name, dims in state.items():
        found = find_tensor(model, name)
        if found is None:
            raise GrowthError(f"stages of {name!r}: the model has no such parameter or buffer")
        module, leaf = found
        shape = tuple(getattr(module, leaf).shape)
        for dim, entry in dims.items():
            stage, origin = (_indices(name, dim, key, entry) for key in ("stage", "origin"))
            if not 0 <= dim < len(shape) or len(stage) != shape[dim]:
                raise GrowthError(
                    f"stages of {name!r}: {len(stage)} along dimension {dim} of a tensor of shape {shape}; "
                    "widen the model to the saved widths first"
                )
            if len(origin) and not 0 <= int(origin.min()) <= int(origin.max()) < shape[dim]:
                raise GrowthError(f"stages of {name!r}: dimension {dim} has origins outside 0..{shape[dim] - 1}")
            loaded.setdefault(module, {}).setdefault(leaf, {})[dim] = Axis(stage, origin)
    for module in model.modules():
        record(module, loaded.get(module, {}))


def _indices(name: str, dim: int, key: str, entry: Mapping[str, Any]) -> Tensor:
    value = entry.get(key)
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.dim() != 1:
        seen = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise GrowthError(f"stages of {name!r}, dimension {dim}: {key!r} is {seen}; wanted a 1-d int64 tensor")
    return value.detach().to("cpu", copy=True)
