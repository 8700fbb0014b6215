"""Torch's modules and those of fastgrow that stand in for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

from ..names import modules_in
from .activations import LeakyReLU, PReLU, ReLU, ReLU6
from .attention import MultiheadAttention

__all__ = ["attention_opened", "attention_traced", "is_twin", "original", "twin"]

_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: ReLU,
    nn.ReLU6: ReLU6,
    nn.LeakyReLU: LeakyReLU,
    nn.PReLU: PReLU,
    nn.MultiheadAttention: MultiheadAttention,
}
_ORIGINALS = {ours: theirs for theirs, ours in _TWINS.items()}


def _recast(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    other = kind.__new__(kind)
    other.__dict__ = module.__dict__.copy()
    return other


def twin(module: nn.Module) -> nn.Module | None:
    """The module of fastgrow that stands in for one of torch's; None where none is needed.

    Activations with derivative 1 at 0, attention whose heads grow. It shares the original's parameters, hooks and
    attributes.
    """
    kind = _TWINS.get(type(module))
    return None if kind is None else _recast(module, kind)


def is_twin(module: nn.Module) -> bool:
    """Whether a module stands in for one of torch's."""
    return type(module) in _ORIGINALS


def original(module: nn.Module) -> nn.Module | None:
    """Torch's own module for one of ours; None for any other, and for attention that torch's cannot express."""
    kind = _ORIGINALS.get(type(module))
    if kind is None or (isinstance(module, MultiheadAttention) and not module.fits_torch):
        return None
    return _recast(module, kind)


def _causal_as_told(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True


@contextlib.contextmanager
def attention_opened(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Torch's attention runs as `MultiheadAttention` does: layer by layer, its head count an attribute like others.

    Torch's own hides its projections in one function, or in a fused kernel. For tracing, and while layers are watched;
    the modules stay the same objects. Modules of any other class, subclasses of torch's too, are left alone.
    """
    opened = [module for module in modules if type(module) is nn.MultiheadAttention]
    try:
        for module in opened:
            module.__class__ = MultiheadAttention
        yield
    finally:
        for module in opened:
            if isinstance(module, MultiheadAttention) and not module.fits_torch:  # it has grown meanwhile
                continue
            module.__class__ = nn.MultiheadAttention


@contextlib.contextmanager
def attention_traced(model: nn.Module) -> Iterator[None]:
    """`attention_opened` for tensors without values: no fused kernels, and no mask is looked at to learn its kind."""
    fused = torch.backends.mha.get_fastpath_enabled()
    detect = transformer._detect_is_causal_mask
    with attention_opened(modules_in(model)):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            transformer._detect_is_causal_mask = _causal_as_told
            yield
        finally:
            transformer._detect_is_causal_mask = detect
            torch.backends.mha.set_fastpath_enabled(fused)
