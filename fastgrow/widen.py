"""The one place that changes modules and optimizer state: all or nothing.

First everything is checked, with nothing changed and no memory taken but the new entries'. Then one tensor after the
other gives way to its larger successor, largest first, and is let go of (`replacement`): memory is all that can run
out there. Last come sizes, modules and stages, and the optimizers are told. Whatever fails or interrupts, every object
gets back what it had, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import stages
from .errors import GrowthError
from .names import find_module, innermost, modules_in
from .optimizer_state import carry, unwrapped
from .replacement import GrownParameter
from .sharded import Renewals
from .tensor_checks import check_memory, check_parametrization, check_references
from .tensor_edits import TensorEdit, planned

__all__ = ["AttributeEdit", "Joining", "ModuleSwap", "TensorEdit", "widen"]


@dataclass(frozen=True)
class AttributeEdit:
    """A new value for a plain attribute of a module (``out_channels``); without_room: where it counts room."""

    module: str
    attribute: str
    value: Any
    without_room: Any = None


@dataclass(frozen=True, eq=False)
class ModuleSwap:
    """Another module in the place of one, wherever that one stands (``nn.ReLU`` -> ``fg.nn.ReLU``).

    The new module takes over hooks, the training flag and tensors of the same name, unless it holds
    the old module inside.
    """

    name: str
    module: nn.Module


@dataclass(frozen=True, eq=False)
class Joining:
    """A parameter that joins the param groups of another one, which no edit names, at their ends."""

    parameter: nn.Parameter
    present: Tensor
    stages: Mapping[int, Tensor]  # dimension -> (size,) int64, the stage of each index


def widen(
    model: nn.Module,
    edits: Iterable[TensorEdit],
    *,
    attributes: Iterable[AttributeEdit] = (),
    swaps: Iterable[ModuleSwap] = (),
    optimizers: Iterable[Any] = (),
    also: Iterable[nn.Module] = (),
    joining: Iterable[Joining] = (),
    stage: int | None = None,
) -> Callable[[], None]:
    """Carry out finished edits on a model, its optimizers and its copies, in one transaction.

    Every edited parameter becomes a new ``nn.Parameter`` (of the same class) of the same dtype, device,
    memory format, ``requires_grad``, hooks and attributes; ``.grad``, where there is one, keeps its
    old block and is zero elsewhere. Old values are kept bit for bit where ``scale`` is 1 and there is no
    ``shift``; these reach neither ``.grad`` nor optimizer state. Tensors that no edit names stay the same objects;
    so do those whose edit gives ``room`` and neither their shape nor their units' places: they are written in place,
    as their optimizer state is.

    Memory: an old tensor goes when its new one stands, its ``.grad`` with it. To the end stay those that somebody
    else holds (`replacement` says who counts), that lie in parts on several ranks, or that the new tensor could not
    give back: with ``scale``, ``shift``, or room dropped.

    optimizers: param groups keep order and options; state as `optimizer_state` says. Those with a
    method ``grown(parameter, stages: dict[int, Tensor])`` are told of each new parameter they hold, and may refuse it
    by an exception, not having written to it; those with a method ``growing()`` are told before that what they remember
    of their parameters will be stale.
    also: copies (AveragedModel, EMA, compiled or DDP-like wrappers) that get the same edits on their
    own old values; names are found through the wrappers' prefixes.
    joining: parameters of swapped modules that no optimizer holds yet.
    stage: recorded for every new index (`stages`); by default one more than the newest in the model.

    Parameters may be fake tensors or lie on the meta device, but no FakeTensorMode may be active. Those sharded
    by ``fully_shard`` are gathered one at a time and sharded again, as their optimizer states are (all ranks call).
    Returns a function that takes everything back, for as long as nothing else has changed these tensors.
    Raises `GrowthError` for edits that don't fit; after any exception all is as it was before.
    """
    joining = tuple(joining)
    # New tensors made in inference mode could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        plan = _Plan.prepare(
            model, tuple(edits), tuple(attributes), tuple(swaps), tuple(optimizers), tuple(also), stage
        )
        if joining:
            plan.join(tuple(optimizers), joining)
        return plan.commit()


_ABSENT = object()


@dataclass(eq=False)
class _Plan:
    """What grows, then assignments ``container[key] = value`` (_ABSENT: deletion; a tensor is written at key), and
    which optimizers are told, before and after."""

    grown: list[GrownParameter] = field(default_factory=list)
    assignments: list[tuple[Any, Any, Any]] = field(default_factory=list)
    caching: list[Any] = field(default_factory=list)
    told: list[tuple[Any, GrownParameter | Tensor, dict[int, Tensor]]] = field(default_factory=list)

    def commit(self) -> Callable[[], None]:
        undo: list[Callable[[], None]] = []

        def take_back() -> None:
            for step in reversed(undo):
                step()

        try:
            for optimizer in self.caching:
                optimizer.growing()
            for found in self.grown:
                found.grow(undo)
            for container, key, value in self.assignments:
                undo.append(partial(_assign, container, key, _standing(container, key)))
                _assign(container, key, value)
            for optimizer, one, born in self.told:
                optimizer.grown(one.new if isinstance(one, GrownParameter) else one, born)
        except BaseException:
            take_back()
            raise
        return take_back

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        edits: Sequence[TensorEdit],
        attributes: Sequence[AttributeEdit],
        swaps: Sequence[ModuleSwap],
        optimizers: Sequence[Any],
        also: Sequence[nn.Module],
        stage: int | None,
    ) -> _Plan:
        roots = _unique((model, *also))
        for root in roots:
            if not isinstance(root, nn.Module):
                raise GrowthError(
                    f"a copy that must follow is a {type(root).__name__}; wanted an nn.Module "
                    "(of an EMA helper: the module it holds)"
                )
        stage = stages.newest_stage(model) + 1 if stage is None else stage
        if stage < 0:
            raise GrowthError(f"stage is {stage}; wanted 0 (the seed) or more")
        plan = cls()
        grown: dict[int, GrownParameter] = {}
        edited: dict[int, TensorEdit] = {}
        renewals = Renewals(roots)
        for root in roots:
            for edit in edits:
                plan.assignments += planned(root, edit, _whose(root, model), grown, edited, renewals)
        plan.assignments += renewals.assignments
        replaced = plan._swap_modules(roots, swaps, renewals)
        for root in roots:
            plan._edit_attributes(root, attributes, _whose(root, model), replaced)
        plan._swap_tensors(roots, grown, replaced, stage, optimizers)
        plan.grown = [found for found in grown.values() if not found.stays]
        plan.grown.sort(key=lambda found: found.old.nbytes, reverse=True)
        return plan

    def _swap_tensors(
        self,
        roots: Sequence[nn.Module],
        grown: Mapping[int, GrownParameter],
        replaced: Mapping[int, nn.Module],
        stage: int,
        optimizers: Sequence[Any],
    ) -> None:
        born: dict[int, dict[int, Tensor]] = {}
        made: dict[tuple[int, ...], stages.Axis] = {}
        moved = {key: found for key, found in grown.items() if not found.stays}
        check_memory(roots, moved)
        for module in modules_in(*roots):
            check_references(module, moved)
            owner = replaced.get(id(module), module)
            recorded, changed = stages.axes_of(module), False
            for registry in (owner._parameters, owner._buffers):
                for leaf, tensor in registry.items():
                    found = grown.get(id(tensor))
                    if found is None:
                        continue
                    changed = True
                    if not found.stays:
                        found.places.append((registry, leaf))
                    enlargement = found.enlargement
                    recorded[leaf] = stages.with_growth(
                        recorded.get(leaf, {}),
                        enlargement.old,
                        enlargement.new,
                        enlargement.axes,
                        stage,
                        made,
                        enlargement.room,
                    )
                    born[id(found.old)] = {dim: axis.stage for dim, axis in recorded[leaf].items()}
            recorded = {leaf: axes for leaf, axes in recorded.items() if axes}
            if changed and recorded:
                self.assignments.append((vars(owner), stages.ATTRIBUTE, recorded))
            if isinstance(module, parametrize.ParametrizationList):
                check_parametrization(module, moved)
        for optimizer in _unique(unwrapped(optimizers)):
            carried = carry(optimizer, grown)
            self.assignments += carried.written
            if carried.held and callable(getattr(optimizer, "growing", None)):
                self.caching.append(optimizer)
            if callable(getattr(optimizer, "grown", None)):
                self.told += [(optimizer, found, born[id(found.old)]) for found in carried.held]

    def join(self, optimizers: Sequence[Any], joining: Sequence[Joining]) -> None:
        """New parameters into the param groups of present ones; their state is for the optimizer to make."""
        joined: set[int] = set()
        for optimizer in _unique(unwrapped(optimizers)):
            for group in optimizer.param_groups:
                held = {id(parameter) for parameter in group["params"]}
                new = [one for one in joining if id(one.present) in held]
                if not new:
                    continue
                if isinstance(optimizer, torch.optim.LBFGS):
                    raise GrowthError(
                        "LBFGS keeps one flat history over all parameters, which no new one can join; insert the layer "
                        "without optimizer= and make a new LBFGS"
                    )
                joined |= {id(one.parameter) for one in new}
                self.assignments.append((group, "params", [*group["params"], *(one.parameter for one in new)]))
                if "param_names" in group:
                    names = [f"inserted.{len(group['params']) + at}" for at in range(len(new))]
                    self.assignments.append((group, "param_names", [*group["param_names"], *names]))
                if callable(getattr(optimizer, "grown", None)):
                    self.told += [(optimizer, one.parameter, dict(one.stages)) for one in new]
        new_ones = [one.parameter for one in joining]
        lost = [parameter for parameter in new_ones if id(parameter) not in joined and parameter.requires_grad]
        if optimizers and lost:
            raise GrowthError(
                f"a new parameter of shape {tuple(lost[0].shape)} belongs to no param group: none of the optimizers "
                "holds the present one it follows; add that one first, or insert without optimizer= and add_param_group"
            )

    def _swap_modules(
        self, roots: Sequence[nn.Module], swaps: Sequence[ModuleSwap], renewals: Renewals
    ) -> dict[int, nn.Module]:
        """id(old module) -> the one that owns its tensors from now on."""
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in modules_in(*roots) if swaps else ():
            for child_name, child in parent._modules.items():
                places.setdefault(id(child), []).append((parent, child_name))
        successors: dict[int, tuple[str, nn.Module, nn.Module]] = {}
        for swap in swaps:
            original = find_module(roots[0], swap.name)
            for root in roots:
                old = find_module(root, swap.name)
                if old is None or id(old) not in places:
                    raise GrowthError(f"{_whose(root, roots[0])} has no submodule {swap.name!r} to replace")
                new = swap.module if old is original else copy.deepcopy(swap.module, _counterparts(original, old))
                successors.setdefault(id(old), (swap.name, old, new))
        owners: dict[int, nn.Module] = {}
        # Only now, for what a module takes over must not be copied into the copies.
        for name, old, new in successors.values():
            self.assignments += [(parent._modules, child_name, new) for parent, child_name in places[id(old)]]
            if not any(module is old for module in new.modules()):
                _take_over(name, old, new)
                owners[id(old)] = new
                self.assignments += renewals.follow(old, new)
        return owners

    def _edit_attributes(
        self,
        root: nn.Module,
        attributes: Sequence[AttributeEdit],
        whose: str,
        replaced: Mapping[int, nn.Module],
    ) -> None:
        edited: dict[int, tuple[nn.Module, dict[str, None], dict[str, Any]]] = {}
        for edit in attributes:
            name = edit.attribute
            named = find_module(root, edit.module)
            if named is None:
                raise GrowthError(f"{whose} has no module {edit.module!r}, whose {name!r} was to become {edit.value!r}")
            module = innermost(named, partial(_is_plain, name=name))
            if module is None:
                raise GrowthError(
                    f"{whose}: {edit.module!r} ({type(named).__name__}) has no plain attribute {name!r}; "
                    "tensors need a TensorEdit, properties and submodules can't be set"
                )
            owner = replaced.get(id(module), module)
            self.assignments.append((vars(owner), name, edit.value))
            names = dict.fromkeys(stages.edited_attributes(module))
            _, known, bare = edited.setdefault(id(owner), (owner, names, stages.without_room(module)))
            known[name] = None
            bare.pop(name, None)
            if edit.without_room is not None:
                bare[name] = edit.without_room
        for owner, known, bare in edited.values():
            self.assignments.append((vars(owner), stages.EDITED, tuple(known)))
            if bare or stages.without_room(owner):
                self.assignments.append((vars(owner), stages.WITHOUT_ROOM, bare or _ABSENT))


def _counterparts(original: nn.Module | None, other: nn.Module) -> dict[int, Any]:
    """id of a module, and of what it holds itself -> the same of another copy of it."""
    found: dict[int, Any] = {id(original): other}
    for registry in ("_parameters", "_buffers", "_modules"):
        theirs = getattr(other, registry)
        for name, held in getattr(original, registry, {}).items():
            if held is not None and theirs.get(name) is not None:
                found[id(held)] = theirs[name]
    return found


def _take_over(name: str, old: nn.Module, new: nn.Module) -> None:
    kept = {id(child) for child in new._modules.values()}
    lost = [
        *(old._parameters.keys() - new._parameters),
        *(old._buffers.keys() - new._buffers),
        *(child_name for child_name, child in old._modules.items() if child is not None and id(child) not in kept),
    ]
    if lost:
        raise GrowthError(
            f"{name!r} ({type(old).__name__}) can't be replaced by {type(new).__name__}: "
            f"{', '.join(lost)} would be lost"
        )
    new._parameters.update(old._parameters)
    new._buffers.update(old._buffers)
    vars(new).update({key: value for key, value in vars(old).items() if "_hook" in key and key in vars(new)})
    stages.record(new, stages.axes_of(old))
    for mark in (stages.EDITED, stages.WITHOUT_ROOM):
        if mark in vars(old):
            vars(new)[mark] = vars(old)[mark]
    new.train(old.training)


def _is_plain(module: nn.Module, name: str) -> bool:
    if name in vars(module):
        return not isinstance(vars(module)[name], Tensor)
    inherited = getattr(type(module), name, _ABSENT)
    return inherited is not _ABSENT and not hasattr(inherited, "__get__")


def _unique(items: Iterable[Any]) -> list[Any]:
    return list({id(item): item for item in items}.values())


def _whose(root: nn.Module, model: nn.Module) -> str:
    return "the model" if root is model else f"a copy that must follow ({type(root).__name__})"


def _standing(container: Any, key: Any) -> Any:
    """What `_assign` would replace."""
    if not isinstance(container, Tensor):
        return container[key] if isinstance(container, list) else container.get(key, _ABSENT)
    if key is None:
        return container.clone()
    dim, positions = key
    return container.index_select(dim, positions)


def _assign(container: Any, key: Any, value: Any) -> None:
    if isinstance(container, Tensor):
        if key is None:
            container.copy_(value)
        else:
            dim, positions = key
            container.index_copy_(dim, positions, value)
    elif value is _ABSENT:
        container.pop(key, None)
    else:
        container[key] = value
