"""Grown models in one file: widths and attributes beside the weights, read back into a fresh seed model.

The file is read by ``torch.load(weights_only=True)``: it holds tensors, numbers, strings, lists and dicts,
never pickled code. A model is first rebuilt (`Structure`: shapes, index maps and stages, module attributes,
replaced modules; no sites are needed), then its values are copied in.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import stages
from .arguments import as_list, copies_of
from .distributed import replicas_of, together
from .errors import GrowthError
from .insertions import Insertion, insertions, reinsert
from .names import is_wrapper
from .nn import is_twin, twin
from .optimizer_state import unwrapped
from .reserve import release
from .sharded import collected, copy_into, is_sharded, laid_out, remembered, reshard, wrapped_modules
from .sites import unwrap
from .widen import AttributeEdit, ModuleSwap, TensorEdit, widen

if TYPE_CHECKING:
    from .grower import Grower

__all__ = ["Structure", "load", "plain", "rebuild", "save", "structure_of"]

_FORMAT = "fastgrow checkpoint"
_VERSION = 1
_SECTIONS = {"structure": Mapping, "values": bool, "tensors": Mapping, "optimizers": list, "copies": list}
_STRUCTURE = {"shapes": Mapping, "stages": Mapping, "attributes": Mapping, "activations": Mapping}

Structure = Mapping[str, Any]
"""shapes: {tensor: [sizes]}; stages: {tensor: {dimension: {"stage", "origin"}}} as `fastgrow.stages` has
them; attributes: {module: {attribute: value}}; without_room: the same, as they are without reserved room;
activations: {module: class in fastgrow.nn}; inserted: {module: the `Insertion` that it holds}. Names are those of
``state_dict()`` without the components of wrappers."""


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Any = None,
    grower: Grower | None = None,
    *,
    also: nn.Module | Iterable[nn.Module] = (),
    rng: bool = False,
    values: bool = True,
) -> None:
    """Write a model, grown or not, into one file that `load` reads.

    model: also behind ``torch.compile`` or DistributedDataParallel (save on one rank). A model that is wrapped by
    ``fully_shard`` is saved by all ranks together: tensors are gathered one by one, rank 0 writes, and the file is
    that of a model that was never sharded. optimizer: one or a list; by default those of the grower. also: EMA
    copies; by default those of the grower.
    rng: include torch's random state of the CPU and of every CUDA device. values=False: neither weights nor
    optimizer states, for a file beside a checkpoint that another program writes.
    The file holds all parameters and buffers (those that are not saved by ``state_dict()`` only where they
    grew), widths, inserted layers, the module attributes that growth changed, replaced modules, the stage of each
    unit, optimizer states, and the Grower's policies and history. A learning-rate scheduler or a GradScaler has a
    ``state_dict()`` of its own: it is the caller's to keep.

    The file appears complete or not at all. Save before `fg.finalize`, which forgets how the model came by its
    widths: afterwards the file loads only into a model of the same widths. Raises `GrowthError` for tensors that
    are sharded or have no values, and for state that is more than tensors, numbers, strings, lists and dicts.
    """
    path = Path(path)
    optimizers, copies = _companions(optimizer, grower, also)
    replicas = replicas_of(model) if wrapped_modules(model) else None
    kept = replicas is None or replicas.rank == 0
    content: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "structure": structure_of(model),
        "values": values,
        "tensors": _values(model, kept) if values else {},
        "copies": [_values(copied, kept) for copied in copies] if values else [],
        "optimizers": [
            {"kind": type(one).__name__, "state": collected(one.state_dict(), kept)} for one in optimizers if values
        ],
        "grower": None if grower is None else grower.state_dict(),
        "rng": _rng_state() if rng else None,
    }
    with together(replicas):
        if kept:
            _write(path, plain(content, str(path)))


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Any = None,
    grower: Grower | None = None,
    *,
    also: nn.Module | Iterable[nn.Module] = (),
    rng: bool = False,
) -> nn.Module:
    """Read a file of `save` into a freshly built seed model, which is widened first.

    model: built as the saved one was before it grew (or already of the saved widths), on any device, also
    behind ``torch.compile`` or DistributedDataParallel (every rank loads; the wrapper is renewed in place), or
    wrapped by ``fully_shard`` (every rank loads, and keeps its shards).
    optimizer, grower, also: as given to `save`, freshly built on this model; parameters that are widened are
    replaced in their param groups, in order. Those that the file holds and the call does not name stay unread.
    rng: restore the random state; the file must hold it. A file without values gives widths, stages and the
    Grower's state; new weights are zero until the other program has loaded them. Where the file holds inserted
    layers, sites found in the seed are refused afterwards: ``grower.sites = fg.find_sites(model, x)``.
    A run that is resumed so continues bit for bit, given the same batches and schedulers.

    Returns the model. Raises `GrowthError`, with nothing changed, for a file that is damaged, of another
    program, of a later version or of another architecture; FileNotFoundError where there is none.
    """
    content = _read(Path(path))
    optimizers, copies = _companions(optimizer, grower, also)
    name = str(path)
    _check_companions(name, content, optimizers, grower, copies, rng)
    replicas = replicas_of(model)
    if replicas is not None:
        replicas.check_renewable()
    followers = list(optimizers)
    if grower is not None:
        followers += [one for one in grower.optimizers if all(one is not other for other in followers)]
    with _undone_on_error(name, [model, *copies], followers, grower):
        rebuild(model, content["structure"], optimizers=followers, also=copies, source=name)
        targets = []
        if content["values"]:
            for one, values in zip([model, *copies], [content["tensors"], *content["copies"]], strict=False):
                targets += _targets(name, one, values)
            for one, saved in zip(optimizers, content["optimizers"], strict=False):
                one.load_state_dict(laid_out(one, saved["state"]))
        if grower is not None:
            grower.load_state_dict(content["grower"])
        # Values last: in-place copies between equal shapes are all that cannot be undone.
        with torch.no_grad():
            for tensor, value in targets:
                copy_into(tensor, value)
    if replicas is not None:
        replicas.renew()
    if rng:
        _set_rng_state(content["rng"])
    return model


def structure_of(model: nn.Module) -> dict[str, Any]:
    """What growth made of a model, values aside (see `Structure`): plain dicts, numbers and int64 tensors."""
    found = _tensors(model)
    axes: dict[str, Any] = {}
    for name, (module, leaf) in found.items():
        grown = stages.axes_of(module).get(leaf, {})
        if grown:
            axes[name] = {
                dim: {"stage": axis.stage.clone(), "origin": axis.origin.clone()} for dim, axis in grown.items()
            }
    modules = _modules(model)
    return {
        "shapes": {name: list(getattr(module, leaf).shape) for name, (module, leaf) in found.items()},
        "stages": axes,
        "attributes": {
            name: {attribute: vars(module)[attribute] for attribute in stages.edited_attributes(module)}
            for name, module in modules.items()
            if stages.edited_attributes(module)
        },
        "without_room": {name: bare for name, module in modules.items() if (bare := stages.without_room(module))},
        "activations": {name: type(module).__name__ for name, module in modules.items() if is_twin(module)},
        "inserted": {name: asdict(insertion) for name, insertion in insertions(unwrap(model)).items()},
    }


def rebuild(
    model: nn.Module,
    structure: Structure,
    *,
    optimizers: Iterable[Any] = (),
    also: Iterable[nn.Module] = (),
    source: str = "the saved structure",
) -> None:
    """Give a seed model the inserted layers, widths, attributes, activations and stages of a saved one.

    Values come later. New entries are zero, old ones move to where they would have moved in growth. Optimizers
    and copies follow. Raises `GrowthError`, with nothing changed, for another architecture.
    """
    _check_structure(source, structure)
    roots, optimizers = [unwrap(model), *also], list(optimizers)
    with _undone_on_error(source, roots, optimizers):
        _reinsert(roots, structure, optimizers)
        _rebuild(roots, structure, optimizers, source)


def _reinsert(roots: Sequence[nn.Module], structure: Structure, optimizers: Sequence[Any]) -> None:
    wanted = {name: Insertion.read(entry) for name, entry in structure.get("inserted", {}).items()}
    reinsert(roots[0], wanted, structure["shapes"], optimizers=optimizers, also=roots[1:])


def _rebuild(roots: Sequence[nn.Module], structure: Structure, optimizers: Sequence[Any], source: str) -> None:
    model, shapes, axes = roots[0], structure["shapes"], structure["stages"]
    found, modules = _tensors(model, shapes), _modules(model)
    missing, extra = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    if missing or extra:
        kind, names = ("lacks", missing) if missing else ("has beside them", extra)
        raise GrowthError(
            f"{source} holds another architecture: {type(model).__name__} {kind} {_some(names)}; "
            "build the model as the saved one was built before it grew"
        )
    held = {name: tuple(getattr(module, leaf).shape) for name, (module, leaf) in found.items()}
    if any(held[name] != tuple(shapes[name]) for name in found):
        release(model, optimizer=optimizers, also=roots[1:])  # room of another size
    edits = []
    for name, (module, leaf) in found.items():
        present, wanted = tuple(getattr(module, leaf).shape), tuple(int(n) for n in shapes[name])
        if present != wanted:
            edits.append(_edit(source, name, present, wanted, axes.get(name, {})))
    bare = structure.get("without_room", {})
    attributes = [
        AttributeEdit(module, attribute, value, bare.get(module, {}).get(attribute))
        for module, values in structure["attributes"].items()
        for attribute, value in values.items()
    ]
    swaps = []
    for name, kind in structure["activations"].items():
        standing = modules.get(name)
        replacement = None if standing is None else twin(standing)
        if standing is not None and is_twin(standing) and type(standing).__name__ == kind:
            continue
        if replacement is None or type(replacement).__name__ != kind:
            seen = "nothing" if standing is None else f"a {type(standing).__name__}"
            raise GrowthError(
                f"{source} holds another architecture: {name!r} is a fastgrow.nn.{kind}, the model has {seen}"
            )
        swaps.append(ModuleSwap(name, replacement))
    widen(model, edits, attributes=attributes, swaps=swaps, optimizers=optimizers, also=roots[1:])
    for root in roots:
        stages.load_state(root, axes)


def _edit(
    source: str, name: str, present: tuple[int, ...], wanted: tuple[int, ...], axes: Mapping[int, Any]
) -> TensorEdit:
    """From a seed's shape to the saved one, by the saved positions of the seed's indices."""
    same_rank = len(present) == len(wanted)
    moves: dict[int, Tensor] = {}
    for dim, (old, new) in enumerate(zip(present, wanted, strict=False)):
        origin = axes.get(dim, {}).get("origin")
        if origin is None and old == new:
            continue
        if not isinstance(origin, Tensor) or (len(origin) != old and old != new):
            seed = f", grown from {len(origin)}" if isinstance(origin, Tensor) else ", not grown"
            raise GrowthError(
                f"{source} holds another architecture: {name!r} has shape {wanted}{seed} in dimension {dim}; the "
                f"model's has {present}; build the model as the saved one was built before it grew"
            )
        if old != new:
            moves[dim] = origin
    if not same_rank:
        raise GrowthError(f"{source} holds another architecture: {name!r} has shape {wanted}, the model's {present}")
    return TensorEdit(name, moves, wanted)


# -- what a model holds, under names without wrappers --------------------------------------------------


def _walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    yield prefix, module
    inside = is_wrapper(module)
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, prefix if inside else f"{prefix}{name}.")


def _tensors(model: nn.Module, known: Collection[str] = ()) -> dict[str, tuple[nn.Module, str]]:
    """Name -> (owner, leaf) of every parameter and buffer that a file holds; `known`: names in one."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for prefix, module in _walk(unwrap(model)):
        grown = stages.axes_of(module)
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(prefix + leaf, (module, leaf))
        for leaf, buffer in module._buffers.items():
            # A buffer that state_dict() leaves out is computed: kept only where growth has shaped it.
            computed = leaf in module._non_persistent_buffers_set and leaf not in grown
            if buffer is not None and (not computed or prefix + leaf in known):
                found.setdefault(prefix + leaf, (module, leaf))
    return found


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> the module itself, inside any wrapper of it."""
    return {prefix.removesuffix("."): module for prefix, module in _walk(unwrap(model))}


def _values(model: nn.Module, kept: bool) -> dict[str, Tensor]:
    """Every tensor's values; kept: whether this rank is the one that writes those of a sharded model."""
    values = {}
    reshard(model)
    wrapped = bool(wrapped_modules(model))
    for name, (module, leaf) in _tensors(model).items():
        tensor: Tensor = getattr(module, leaf).detach()
        if is_sharded(tensor):
            if not wrapped:
                raise GrowthError(f"save: {name!r} is sharded, but not by fully_shard; gather it (full_tensor) first")
            tensor = collected(tensor, kept)
        if tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor):
            raise GrowthError(f"save: {name!r} has no values ({tensor.device}); materialise the model first")
        values[name] = tensor
    return values


def _targets(source: str, model: nn.Module, values: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """(tensor of the model, its saved value), everything about them checked."""
    found = _tensors(model)
    if found.keys() != values.keys():
        raise GrowthError(
            f"{source} holds another architecture: the file alone has "
            f"{_some(sorted(values.keys() - found.keys()))}, "
            f"{type(unwrap(model)).__name__} alone {_some(sorted(found.keys() - values.keys()))}"
        )
    pairs: dict[int, tuple[Tensor, Tensor, str]] = {}
    for name, (module, leaf) in found.items():
        tensor, value = getattr(module, leaf), values[name]
        if not isinstance(value, Tensor) or value.shape != tensor.shape:
            seen = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise GrowthError(f"{source}: {name!r} is {seen} in the file; wanted shape {tuple(tensor.shape)}")
        if tensor.is_meta:
            raise GrowthError(f"load: {name!r} lies on the meta device; materialise the model first (model.to_empty)")
        if id(tensor) in pairs and not _same(pairs[id(tensor)][1], value):
            raise GrowthError(
                f"{source} holds another architecture: {pairs[id(tensor)][2]!r} and {name!r} are tied in the model "
                "and two tensors in the file"
            )
        pairs[id(tensor)] = (tensor, value, name)
    return [(tensor, value) for tensor, value, _ in pairs.values()]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() or torch.equal(one.nan_to_num(), other.nan_to_num())


# -- the file ------------------------------------------------------------------------------------------


def _write(path: Path, content: Mapping[str, Any]) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp's file is the owner's alone; a checkpoint has the rights of any new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise GrowthError(
            f"{path} can't be read ({reason[0]}): it is damaged, cut short, or no checkpoint of fastgrow.save"
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        seen = f"a dict with {_some(list(content))}" if isinstance(content, dict) else type(content).__name__
        raise GrowthError(
            f"{path} is no checkpoint of fastgrow.save: it holds {seen}; a plain state dict is read with "
            "model.load_state_dict"
        )
    if content.get("version") != _VERSION:
        raise GrowthError(
            f"{path} has version {content.get('version')!r} of the format; this fastgrow reads {_VERSION}: "
            "load it with the fastgrow that wrote it, or a later one"
        )
    for section, kind in _SECTIONS.items():
        if not isinstance(content.get(section), kind):
            raise GrowthError(f"{path} is damaged: its section {section!r} is missing or no {kind.__name__}")
    _check_structure(str(path), content["structure"])
    return content


def _check_structure(source: str, structure: Any) -> None:
    for section, kind in _STRUCTURE.items():
        if not isinstance(structure, Mapping) or not isinstance(structure.get(section), kind):
            raise GrowthError(f"{source} is damaged: {section!r} is missing in its structure, or no {kind.__name__}")


def _check_companions(
    source: str,
    content: Mapping[str, Any],
    optimizers: Sequence[Any],
    grower: Grower | None,
    copies: Sequence[nn.Module],
    rng: bool,
) -> None:
    saved = [entry["kind"] for entry in content["optimizers"]]
    given = [type(one).__name__ for one in optimizers]
    if content["values"] and given and given != saved:
        raise GrowthError(
            f"{source} holds the state of {', '.join(saved) or 'no optimizer'}; {', '.join(given)} was given; give "
            "the optimizers it was saved with, in order, or none"
        )
    if grower is not None and content.get("grower") is None:
        raise GrowthError(f"{source} was saved without a Grower; load without one")
    if content["values"] and copies and len(copies) != len(content["copies"]):
        raise GrowthError(
            f"{source} holds {len(content['copies'])} copies of the model (also=), {len(copies)} were given"
        )
    if rng and content.get("rng") is None:
        raise GrowthError(f"{source} holds no random state; it was saved without rng=True")


def _companions(
    optimizer: Any, grower: Grower | None, also: nn.Module | Iterable[nn.Module]
) -> tuple[list[Any], list[nn.Module]]:
    optimizers = list(grower.optimizers) if optimizer is None and grower is not None else as_list(optimizer)
    copies = copies_of(also)
    return optimizers, copies or ([] if grower is None else list(grower.also))


def plain(value: Any, where: str) -> Any:
    """The same, in types that ``weights_only`` reads; anything else is named."""
    if isinstance(value, Tensor):
        value = value.detach()
        # A view would take its whole storage into the file.
        whole = value.untyped_storage().nbytes() if value.layout == torch.strided else 0
        return value.clone() if whole > value.numel() * value.element_size() else value
    if value is None or type(value) in (bool, int, float, str, complex):
        return value
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    if isinstance(value, Mapping):
        return {plain(key, where): plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain(item, f"{where}[{at}]") for at, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise GrowthError(
        f"{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings, lists and dicts only"
    )


# -- all or nothing ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _undone_on_error(
    source: str, roots: Sequence[nn.Module], optimizers: Sequence[Any], grower: Grower | None = None
) -> Iterator[None]:
    """Put modules, optimizers and the Grower back if anything fails; other errors become `GrowthError`."""
    modules = {id(module): module for root in roots for module in root.modules()}
    registries = [
        (registry, dict(registry))
        for module in modules.values()
        for registry in (module._parameters, module._buffers, module._modules, vars(module))
    ]
    held = [
        (
            one,
            one.state,
            {key: dict(entries) for key, entries in one.state.items()},
            one.param_groups,
            [(group, {**group, "params": list(group["params"])}) for group in one.param_groups],
        )
        for one in unwrapped(optimizers)
    ]
    before_grower = None if grower is None else grower.state_dict()
    put_records_back = remembered(roots)
    try:
        yield
    except BaseException as error:
        put_records_back()
        for registry, before in registries:
            registry.clear()
            registry.update(before)
        for one, state, entries, groups, contents in held:
            for group, before in contents:
                group.clear()
                group.update(before)
            state.clear()
            state.update(entries)
            one.__setstate__({"state": state, "param_groups": groups})
        if grower is not None and before_grower is not None:
            grower.load_state_dict(before_grower)
        if isinstance(error, Exception) and source not in str(error):
            raise GrowthError(f"{source} does not fit: {error}") from error
        raise


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_rng_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(value, device)


def _some(names: Sequence[Any], most: int = 4) -> str:
    shown = ", ".join(repr(name) for name in names[:most]) or "nothing"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
