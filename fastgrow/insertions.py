"""Layers that were put into a model: how they stand there, and the record that builds them again.

The record lies in one plain attribute of the module that took the place of another: it survives
``copy.deepcopy`` and shows neither in ``state_dict()`` nor among the parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import stages
from .errors import GrowthError
from .names import find_module, find_tensor, is_wrapper, modules_in
from .nn import Beside, original
from .widen import Joining, ModuleSwap, widen

__all__ = ["RECORD", "Insertion", "LayerSpec", "attach", "composite", "forget", "insertions", "places", "reinsert"]

RECORD = "_fastgrow_inserted"
"""Name of the attribute that holds an `Insertion` as a plain dict."""

Way = Literal["behind", "before", "beside"]

_ACTIVATIONS = frozenset(nn.modules.activation.__all__) - {"MultiheadAttention", "Softmax", "Softmin", "LogSoftmax"}
_KINDS = _ACTIVATIONS | {"Linear", *(f"{kind}{dims}d" for kind in ("Conv", "BatchNorm") for dims in (1, 2, 3))}


@dataclass(frozen=True)
class LayerSpec:
    """A module of ``torch.nn`` and the arguments that build it."""

    kind: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> LayerSpec:
        """Of an activation of torch (or its twin in `fastgrow.nn`), from the arguments that its class takes."""
        plain = original(module) or module
        if type(plain).__name__ not in _ACTIVATIONS or type(plain) is not getattr(nn, type(plain).__name__, None):
            raise GrowthError(
                f"insert_layer: activation={module!r} is none of torch.nn's activations, so no file could build it "
                "again; give one of these, or None"
            )
        names = [name for name in inspect.signature(type(module).__init__).parameters if hasattr(module, name)]
        arguments = {name: getattr(module, name) for name in names if name not in ("device", "dtype", "inplace")}
        return cls(type(module).__name__, arguments)

    def build(self) -> nn.Module:
        """The module, its layer weights not initialised and no random number drawn."""
        if self.kind not in _KINDS:
            raise GrowthError(f"an inserted layer is a {self.kind}; wanted one of {', '.join(sorted(_KINDS))}")
        kind = getattr(nn, self.kind)
        if issubclass(kind, (nn.Linear, nn.modules.conv._ConvNd)):
            return nn.utils.skip_init(kind, **self.arguments)
        with torch.random.fork_rng(devices=[]):
            return kind(**self.arguments)

    def resized(self, shapes: Mapping[str, Sequence[int]]) -> LayerSpec:
        """The same with the sizes of its own tensors, {leaf: shape}."""
        shape = shapes.get("weight")
        if shape is None:
            return self
        names = {
            "PReLU": ("num_parameters",),
            "Linear": ("out_features", "in_features"),
        }.get(self.kind, ("num_features",) if "Norm" in self.kind else ("out_channels", "in_channels"))
        sizes = {name: int(size) for name, size in zip(names, shape, strict=False)}
        return replace(self, arguments={**self.arguments, **sizes})


@dataclass(frozen=True)
class Insertion:
    """One call of `fastgrow.insert_layer`. Names are those of the model at that time, without wrappers.

    number: 1, 2, ... in the order of the calls. place: the module that was replaced, by itself followed by the
    new layers ("behind"), preceded by them ("before"), or with them on a second way past it ("beside").
    stage: of the new weights. follows: new parameter (its name below `place`) -> the present one whose param
    group it joined, and whose dtype, device and requires_grad it took.
    """

    number: int
    place: str
    way: Way
    layers: tuple[LayerSpec, ...]
    stage: int
    follows: Mapping[str, str]

    @classmethod
    def read(cls, state: Mapping[str, Any]) -> Insertion:
        """From the plain dict that a module or a file holds."""
        layers = tuple(LayerSpec(**layer) for layer in state["layers"])
        return cls(**{**state, "layers": layers})

    def name(self, position: int) -> str:
        """Of the new module at this position, below `place`."""
        return {"behind": f"{position + 1}", "before": f"{position}", "beside": f"branch.{position}"}[self.way]

    def build(self, model: nn.Module) -> list[nn.Module]:
        """The new modules: dtype, device, memory format and requires_grad of what they follow, stages recorded."""
        modules = [layer.build() for layer in self.layers]
        for position, module in enumerate(modules):
            recorded = {}
            for leaf, parameter in module.named_parameters():
                reference = self.reference(model, f"{self.name(position)}.{leaf}")
                module.to(reference.device, reference.dtype)
                parameter = module.get_parameter(leaf)
                parameter.requires_grad_(reference.requires_grad)
                axis = stages.Axis.seed(parameter.shape[0])
                recorded[leaf] = {0: replace(axis, stage=torch.full_like(axis.stage, self.stage))}
                if leaf == "weight" and _is_channels_last(reference) and parameter.dim() == reference.dim():
                    module.to(memory_format=torch.channels_last if parameter.dim() == 4 else torch.channels_last_3d)  # type: ignore[call-overload]
            stages.record(module, recorded)
        return modules

    def reference(self, model: nn.Module, new: str) -> nn.Parameter:
        """The present parameter that a new one follows."""
        found = find_tensor(model, self.follows[new])
        if found is None:
            raise GrowthError(f"the model has no parameter {self.follows[new]!r}, which an inserted layer follows")
        return found[0].get_parameter(found[1])

    def joining(self, model: nn.Module, modules: Sequence[nn.Module]) -> list[Joining]:
        """What `fastgrow.widen` tells the optimizers; before the model changes."""
        return [
            Joining(parameter, self.reference(model, f"{self.name(position)}.{leaf}"), stages.stages_of(module, leaf))
            for position, module in enumerate(modules)
            for leaf, parameter in module.named_parameters()
        ]


def composite(insertion: Insertion, old: nn.Module, modules: Sequence[nn.Module]) -> nn.Module:
    """What stands in the place of `old`."""
    if insertion.way == "beside":
        whole: nn.Module = Beside(old, nn.Sequential(*modules))
    else:
        whole = nn.Sequential(old, *modules) if insertion.way == "behind" else nn.Sequential(*modules, old)
    inside = set(old.modules())
    for part in whole.modules():
        if part not in inside:
            part.training = old.training
    vars(whole)[RECORD] = asdict(insertion)
    return whole


def attach(
    model: nn.Module,
    insertion: Insertion,
    modules: Sequence[nn.Module],
    *,
    optimizers: Iterable[Any] = (),
    also: Iterable[nn.Module] = (),
) -> None:
    """Put finished modules into a model, its copies and its optimizers, all or nothing."""
    old = find_module(model, insertion.place)
    if old is None:
        raise GrowthError(f"the model has no module {insertion.place!r}, where a layer is to be inserted")
    joining = insertion.joining(model, modules)
    whole = composite(insertion, old, modules)
    swap = ModuleSwap(insertion.place, whole)
    widen(model, (), swaps=(swap,), optimizers=optimizers, also=also, joining=joining)


def insertions(model: nn.Module) -> dict[str, Insertion]:
    """Every insertion, the oldest first, by the present name of the module that holds it."""
    found = [(name, Insertion.read(vars(module)[RECORD])) for name, module in _recorded(model)]
    return dict(sorted(found, key=lambda entry: entry[1].number))


def places(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> frozenset[str]:
    """The present names of the modules that hold inserted layers. modules: the model's, where at hand."""
    for module in modules_in(model) if modules is None else modules:
        if RECORD in module.__dict__:
            return frozenset(name for name, _ in _recorded(model))
    return frozenset()


def forget(model: nn.Module) -> None:
    """Remove the records: the inserted layers count as the model's own."""
    for _, module in _recorded(model):
        vars(module).pop(RECORD)


def reinsert(
    model: nn.Module,
    wanted: Mapping[str, Insertion],
    shapes: Mapping[str, Sequence[int]],
    *,
    optimizers: Iterable[Any] = (),
    also: Iterable[nn.Module] = (),
) -> None:
    """Insert the layers that another model of the same seed has, at the sizes they have there; values come later.

    wanted: that model's `insertions`; shapes: {tensor: sizes} of it. Layers that stand there already are left alone.
    """
    optimizers, also = list(optimizers), list(also)
    present = {(one.place, one.number) for one in insertions(model).values()}
    for name, insertion in sorted(wanted.items(), key=lambda entry: entry[1].number):
        if (insertion.place, insertion.number) in present:
            continue
        prefixes = [f"{name}.{insertion.name(at)}." for at in range(len(insertion.layers))]
        sizes = [{name[len(p) :]: s for name, s in shapes.items() if name.startswith(p)} for p in prefixes]
        layers = tuple(layer.resized(size) for layer, size in zip(insertion.layers, sizes, strict=True))
        sized = replace(insertion, layers=layers)
        attach(model, sized, sized.build(model), optimizers=optimizers, also=also)


def _recorded(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    if RECORD in vars(module):
        yield prefix.removesuffix("."), module
    inside = is_wrapper(module)
    for name, child in module._modules.items():
        if child is not None:
            yield from _recorded(child, prefix if inside else f"{prefix}{name}.")


def _is_channels_last(tensor: Tensor) -> bool:
    if tensor.dim() not in (4, 5) or tensor.is_contiguous():
        return False
    last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return tensor.is_contiguous(memory_format=last)
