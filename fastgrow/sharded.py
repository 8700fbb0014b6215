"""Models sharded by ``fully_shard`` (FSDP2): parameters gathered one by one, and sharded again as they were.

PyTorch has no public way to give a wrapped module a parameter of another shape: FSDP keeps a record of each
(its shapes, its padding, the buffer it is gathered into), made once by the wrapping. `Renewals` has the same
class make the record of a grown parameter anew, beside the old one. All else stays as it was wrapped: modules,
hooks, groups, prefetching, policies. A torch whose records look otherwise is refused by name before anything changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import GrowthError

__all__ = [
    "Renewals",
    "as_written",
    "collected",
    "copy_into",
    "gathered",
    "group_of",
    "is_sharded",
    "laid_out",
    "part",
    "remembered",
    "reshard",
    "whole",
    "wrapped_modules",
]

Assignment = tuple[Any, Any, Any]
"""``container[key] = value``, as the transaction of `fastgrow.widen` carries it out and takes it back."""

_REMEDY = (
    "fg.save the model on all ranks, build it anew, fg.load the file into it, and wrap it with fully_shard as before"
)


def is_sharded(tensor: object) -> bool:
    """Whether a tensor lies in parts on several ranks (a DTensor)."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's full values, on every rank of its mesh: a collective call. Other tensors as they are."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        full: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return full


def part(values: Tensor, like: Tensor) -> Tensor:
    """Full values, equal on all ranks, laid out as a sharded tensor is; nothing is sent.

    Raises `GrowthError` for layouts other than shards and replicas.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    assert isinstance(like, DTensor)
    strange = [one for one in like.placements if type(one) not in (Shard, Replicate)]
    if strange:
        raise GrowthError(
            f"a tensor of shape {tuple(like.shape)} is laid out as {strange[0]}; wanted shards and replicas only"
        )
    with torch.no_grad():
        cut = distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)
        # The cut may be a view that keeps the full values alive.
        return DTensor.from_local(
            cut.to_local().clone(memory_format=torch.contiguous_format),
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=values.shape,
            stride=values.contiguous().stride(),
        )


def collected(value: Any, kept: bool) -> Any:
    """The same dicts and lists with sharded tensors in full, on the CPU; empty where they are not kept.

    A collective call, one tensor after the other.
    """
    if isinstance(value, Tensor) and is_sharded(value):
        full = whole(value)
        return full.cpu() if kept else full.new_empty(0)
    if isinstance(value, dict):
        return {key: collected(item, kept) for key, item in value.items()}
    if isinstance(value, list):
        return [collected(item, kept) for item in value]
    return value


def copy_into(tensor: Tensor, values: Tensor) -> None:
    """Full values into a tensor, in place: a sharded one takes this rank's part of them."""
    if is_sharded(tensor):
        local: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
        local.copy_(part(values.to(local.device), tensor).to_local())  # type: ignore[attr-defined]
    else:
        tensor.copy_(values)


def laid_out(optimizer: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's ``state_dict()`` of full tensors, with those of sharded parameters laid out as these are.

    Raises `GrowthError` for entries that are neither of their parameter's shape nor single numbers.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    sharded = {n: p for n, p in zip(numbers, parameters, strict=False) if is_sharded(p)}
    entries = dict(state["state"])
    for number in sharded.keys() & entries.keys():
        entries[number] = {name: _entry(optimizer, name, v, sharded[number]) for name, v in entries[number].items()}
    return {**state, "state": entries}


def _entry(optimizer: Any, name: str, value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor) or (value.numel() == 1 and value.shape != parameter.shape):
        return value
    if value.shape != parameter.shape:
        raise GrowthError(
            f"{type(optimizer).__name__}: its state entry {name!r} of shape {tuple(value.shape)} cannot be laid out as "
            f"a sharded parameter of shape {tuple(parameter.shape)}; load before fully_shard, or without the optimizer"
        )
    return part(value.to(parameter.device), parameter)


def wrapped_modules(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was applied to; none where no processes were ever joined."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def reshard(model: nn.Module) -> None:
    """Every wrapped module back to its shards (a root keeps its full parameters after a forward pass)."""
    for module in wrapped_modules(model):
        module.reshard()


def group_of(model: nn.Module) -> tuple[dist.ProcessGroup, torch.device] | None:
    """The processes that train a sharded model together, and the device that they communicate from.

    None where nothing is sharded. Raises `GrowthError` where its modules are sharded over different meshes.
    """
    if not wrapped_modules(model):
        return None
    meshes = _meshes(model)
    if not meshes:  # all in full, behind a forward pass
        reshard(model)
        meshes = _meshes(model)
    if not meshes:
        return None
    mesh = meshes[0]
    other = next((one for one in meshes if one != mesh), None)
    if other is not None:
        raise GrowthError(f"parts of the model are sharded over different meshes, {mesh} and {other}; use one mesh")
    kind = mesh.device_type
    device = torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())
    if mesh.ndim == 1:
        return mesh.get_group(), device
    if mesh.size() != dist.get_world_size():
        raise GrowthError(f"the model is sharded over {mesh}, some of the processes; wanted all, or a 1-d mesh")
    assert dist.group.WORLD is not None
    return dist.group.WORLD, device


def _meshes(model: nn.Module) -> list[Any]:
    known: list[Any] = [parameter for parameter in model.parameters() if is_sharded(parameter)]
    return [parameter.device_mesh for parameter in known]


@contextlib.contextmanager
def gathered(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """The named parameters as plain tensors in the model's modules, for reading, while the block runs.

    A collective call: all ranks name the same. Names of other tensors, and models that are not sharded, are passed
    over. The model must not be called inside.
    """
    if not wrapped_modules(model):
        yield
        return
    reshard(model)
    known = dict(model.named_parameters(remove_duplicate=False))
    sharded = {id(known[name]): known[name] for name in sorted(set(names) & known.keys()) if is_sharded(known[name])}
    full = {key: nn.Parameter(whole(tensor), tensor.requires_grad) for key, tensor in sharded.items()}
    places = [
        (module._parameters, leaf, parameter)
        for module in model.modules()
        for leaf, parameter in module._parameters.items()
        if id(parameter) in full
    ]
    try:
        for registry, leaf, parameter in places:
            registry[leaf] = full[id(parameter)]
        yield
    finally:
        for registry, leaf, parameter in places:
            registry[leaf] = parameter


@contextlib.contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """The modules as they were before ``fully_shard``, parameters aside, so that they can be copied.

    Their classes are their own again, and what wrapping put into them is set aside with their hooks.
    """
    wrapped = wrapped_modules(model)
    saved = [(module, type(module), dict(vars(module))) for module in (model.modules() if wrapped else ())]
    hooks = [name for name in vars(nn.Module()) if "_hooks" in name]
    try:
        for module, _, attributes in saved:
            for name in attributes:
                if name.startswith(("__composable_api", "_is_fsdp_managed_module", "_fsdp_use_orig_params")):
                    del vars(module)[name]
            vars(module).update({name: type(attributes[name])() for name in hooks if attributes.get(name)})
        for module in wrapped:
            # fully_shard makes the class (FSDPModule, the module's own).
            module.__class__ = type(module).__bases__[1]
        yield
    finally:
        for module, kind, attributes in saved:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)


@dataclass(frozen=True)
class _Place:
    """Where FSDP keeps its record of one parameter."""

    records: list[Any]
    at: int
    record: Any
    group: Any


def remembered(roots: Sequence[nn.Module]) -> Callable[[], None]:
    """A function that puts FSDP's records back to what they are now."""
    lists: dict[int, tuple[list[Any], list[Any]]] = {}
    holders: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for records, _, record, _ in _records(roots):
        lists[id(records)] = records, list(records)
        info = record._module_info
        holders.append((vars(info), {**vars(info), "shared_modules": list(info.shared_modules)}))
        hooks = info.module._load_state_dict_post_hooks
        holders.append((hooks, dict(hooks)))

    def put_back() -> None:
        for records, before in lists.values():
            records[:] = before
        for holder, contents in holders:
            holder.clear()
            holder.update(contents)

    return put_back


class Renewals:
    """FSDP's records of grown parameters, made anew: assignments for the transaction that replaces these."""

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        for root in roots:
            reshard(root)
        self._places = {
            id(record.sharded_param): _Place(records, at, record, group)
            for records, at, record, group in _records(roots)
        }
        self.assignments: list[Assignment] = []

    def renewed(self, name: str, old: Tensor, values: Tensor) -> Tensor:
        """The parameter that takes a sharded one's place, for full values that are equal on all ranks.

        Raises `GrowthError` where the parameter was not sharded by ``fully_shard``, is kept off its mesh's device,
        holds gradients that were not reduced yet, or does not divide over the ranks.
        """
        place = self._places.get(id(old))
        if place is None:
            raise GrowthError(f"{name} is sharded, but not by fully_shard; gather it, grow, and shard again")
        record = place.record
        self._check(name, place, values)
        stand_in = nn.Module()
        leaf = record._module_info.param_name
        stand_in.register_parameter(leaf, nn.Parameter(values.contiguous(), old.requires_grad))
        try:
            info = dataclasses.replace(record._module_info, module=stand_in, shared_modules=[], shared_param_names=[])
            fresh = type(record)(
                stand_in._parameters[leaf],
                info,
                record.mesh_info,
                record.post_forward_mesh_info,
                record.device,
                lambda _: record.fsdp_placement,
                record.mp_policy,
                place.group.offload_policy,
            )
            fresh._module_info, fresh._param_fqn = record._module_info, record._param_fqn
            fresh.init_dtype_attrs(record.mp_policy)
            handle = fresh._post_load_hook_handle = record._post_load_hook_handle
            new: Tensor = fresh.sharded_param
        except (AttributeError, TypeError) as error:
            raise _unknown_torch(error) from error
        self.assignments.append((place.records, place.at, fresh))
        loaded = handle.hooks_dict_ref()
        if loaded is not None and handle.id in loaded:
            self.assignments.append((loaded, handle.id, _reset_of(fresh)))
        return new

    def follow(self, old: nn.Module, new: nn.Module) -> list[Assignment]:
        """What must change for FSDP to find one module's parameters in another that takes its place."""
        if wrapped_modules(old)[:1] == [old]:
            raise GrowthError(
                f"{type(old).__name__} is wrapped by fully_shard and would be replaced; wrap the module around it"
            )
        found: list[Assignment] = []
        for place in self._places.values():
            info = place.record._module_info
            if info.module is old:
                found.append((vars(info), "module", new))
            found += [(info.shared_modules, at, new) for at, one in enumerate(info.shared_modules) if one is old]
        return found

    @staticmethod
    def _check(name: str, place: _Place, values: Tensor) -> None:
        record = place.record
        if getattr(record, "is_dtensor", False):
            raise GrowthError(f"{name} is sharded by another parallelism inside fully_shard; only fully_shard can grow")
        if record.offload_to_cpu and record.device.type != "cpu":
            raise GrowthError(
                f"{name} is offloaded to the CPU (CPUOffloadPolicy), where it cannot be gathered; leave the policy out"
            )
        waiting = [
            getattr(getattr(record, "_unsharded_param", None), "grad", None),
            record.unsharded_accumulated_grad,
            getattr(place.group, "_partial_reduce_output", None),
        ]
        if any(one is not None for one in waiting):
            raise GrowthError(f"{name} holds gradients that no rank has reduced yet; grow after the optimizer's step")
        dim, parts = record.fsdp_placement.dim, record.mesh_info.mesh.size(-1)
        if dim and values.shape[dim] % parts:
            raise GrowthError(
                f"{name} would have {values.shape[dim]} entries in dimension {dim}, which fully_shard divides over "
                f"{parts} ranks; grow by units that keep it a multiple, or shard dimension 0"
            )


def _reset_of(record: Any) -> Callable[..., None]:
    def reset(*args: Any, **kwargs: Any) -> None:
        record.reset_sharded_param()

    return reset


def _records(roots: Sequence[nn.Module]) -> list[tuple[list[Any], int, Any, Any]]:
    """FSDP's records of all parameters: (the group's list, position there, record, group)."""
    found: dict[int, tuple[list[Any], int, Any, Any]] = {}
    for module in (module for root in roots for module in wrapped_modules(root)):
        state = sys.modules["torch.distributed.fsdp"].fully_shard.state(module)
        if state is None:
            raise GrowthError(f"{type(module).__name__} is wrapped by something other than fully_shard, which can grow")
        try:
            groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
            for group in groups:
                for at, record in enumerate(() if group is None else group.fsdp_params):
                    _ = record.sharded_param, record.mesh_info.mesh, record.device
                    found.setdefault(id(record), (group.fsdp_params, at, record, group))
        except AttributeError as error:
            raise _unknown_torch(error) from error
    return list(found.values())


def _unknown_torch(error: Exception) -> GrowthError:
    return GrowthError(
        f"torch {torch.__version__} keeps FSDP's parameters otherwise than known here ({error}), so a wrapped model "
        f"cannot grow in place: {_REMEDY}"
    )
