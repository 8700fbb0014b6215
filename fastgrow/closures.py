"""The closure that a person gives: called for its loss or its inputs, with everything left as it was found."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .distributed import replicas_of, together, without_gradient_traffic
from .errors import GrowthError
from .names import modules_in
from .sites import unwrap

__all__ = ["backpropagated", "checked_loss", "inputs_of", "preserved", "ran_hidden", "undrawn_on_failure"]

_REENTRANT = (
    "the model checkpoints activations with use_reentrant=True, which cannot backpropagate to chosen "
    "tensors; use use_reentrant=False, or observe your own backward pass and give seen="
)


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """``.grad``s, buffers, modes and RNG state are put back, no rank waits for gradients.

    Parameters have no ``.grad`` inside; theirs come back as the same objects, whatever was left in their place.
    """
    modules = modules_in(unwrap(model))
    modes = [(module, module.training) for module in modules]
    held = {id(b): b for module in modules for b in module._buffers.values() if b is not None}
    buffers = [(buffer, buffer.detach().clone()) for buffer in held.values()]
    parameters = _parameters(modules)
    gradients = [parameter.grad for parameter in parameters]
    put_back = _random_state(model)
    with without_gradient_traffic(model):
        try:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = None
            yield
        finally:
            put_back()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if parameter.grad is not gradient:
                    parameter.grad = gradient
            for module, training in modes:
                if module.training != training:
                    module.training = training
            if buffers:
                with torch.no_grad():
                    for buffer, value in buffers:
                        buffer.copy_(value)


@contextlib.contextmanager
def undrawn_on_failure(model: nn.Module) -> Iterator[None]:
    """Random numbers drawn inside are put back where the block fails."""
    put_back = _random_state(model)
    try:
        yield
    except BaseException:
        put_back()
        raise


def _parameters(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    return list({id(p): p for module in modules for p in module._parameters.values() if p is not None}.values())


def _random_state(model: nn.Module) -> Callable[[], None]:
    """What sets the generators of the CPU and of the model's devices back to where they stand."""
    devices: list[int] = []
    if torch.cuda.is_available():
        devices = sorted({p.device.index for p in _parameters(modules_in(unwrap(model))) if p.is_cuda})
    state, states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]

    def put_back() -> None:
        torch.set_rng_state(state)
        for device, value in zip(devices, states, strict=True):
            torch.cuda.set_rng_state(value, device)

    return put_back


def _check(closure: object) -> None:
    if not callable(closure):
        raise GrowthError(f"closure is a {type(closure).__name__}; wanted a function that returns the loss")


def checked_loss(closure: Callable[[], Tensor]) -> Tensor:
    """The closure's loss; GrowthError unless it is a tensor of one element that can be backpropagated."""
    _check(closure)
    loss = closure()
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        shown = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise GrowthError(
            f"closure returned {shown}; wanted the loss, a tensor of one element that requires grad, not yet "
            "backpropagated"
        )
    return loss


def backpropagated(loss: Tensor, ends: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """The gradients of a closure's loss at tensors or gradient edges, None where it does not depend on one."""
    try:
        return torch.autograd.grad(loss, list(ends), allow_unused=True)
    except RuntimeError as error:
        if "through the graph a second time" in str(error):
            raise GrowthError(
                "the closure's loss has been backpropagated already; return it without calling backward()"
            ) from error
        if "heckpoint" not in str(error):
            raise
        raise GrowthError(_REENTRANT) from error


def ran_hidden(layer: str) -> GrowthError:
    """The error for a layer of which nothing was seen but a call with gradients off."""
    return GrowthError(f"layer {layer!r} ran with gradients off: under torch.no_grad(), or {_REENTRANT}")


class _Known(BaseException):
    """Ends a closure's call; no Exception, for a closure may catch those."""


def inputs_of(model: nn.Module, closure: Callable[[], Tensor]) -> Any:
    """The arguments that the closure's own call gives the model; the call ends there."""
    _check(closure)
    inner = unwrap(model)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise _Known

    # A wrapper's own as well: it has then sent nothing to other ranks, and no thread has begun.
    hooks = [
        module.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
        for module in {id(m): m for m in (model, inner)}.values()
    ]
    try:
        with preserved(model), torch.enable_grad(), contextlib.ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # compiled code was traced without the hooks
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(together(replicas_of(model)))
            stack.enter_context(contextlib.suppress(_Known))
            closure()
    finally:
        for hook in hooks:
            hook.remove()
    if not calls:
        raise GrowthError("the closure never called the model, so its sites cannot be found; give sites=")
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, calls[0])
    if not kwargs:
        return args
    names = list(inspect.signature(inner.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}
