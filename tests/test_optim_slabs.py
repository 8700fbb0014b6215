"""Grown parameters on the ATen path: cut into slabs, gathered columns, half precision, scaled gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_reference import Reference
from tolerances import tolerance
from torch import Tensor, nn

import fastgrow.optim as fo
from fastgrow.optim import entry

METHODS: dict[str, dict[str, Any]] = {
    "SGD": dict(lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": dict(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.01),
    "AdamW": dict(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.01),
    "AvaGrad": dict(lr=0.1, betas=(0.8, 0.9), eps=0.1),
}
SCATTERED = [0, 1, 0, 2, 0, 1, 0, 0, 2, 1, 0, 0, 1]


def seen(shape: tuple[int, ...], stages: dict[int, Tensor], method: str, **more: Any) -> tuple[nn.Parameter, Any, Any]:
    """A parameter whose stages are all as old as the optimizer, in fastgrow.optim and in the reference."""
    torch.manual_seed(0)
    options = {**METHODS[method], "rate_adaptation": True, **more}
    value = torch.randn(shape, dtype=torch.float64)
    reference = Reference(method, [value], **options)
    reference.grow(0, value, {}, stages)
    parameter = nn.Parameter(value.clone())
    optimizer = getattr(fo, method)([parameter], **{"backend": "torch", **options})
    optimizer.grown(parameter, stages)
    for stage in reference.all[0].births:
        reference.all[0].births[stage] = 0
    return parameter, optimizer, reference


@pytest.mark.parametrize("shape", [(7, 13), (1, 13), (13, 70), (5, 13, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_scattered_stages_and_small_slabs(method: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of one stage in many runs are gathered by index; slabs of two rows must add up all the same."""
    monkeypatch.setattr(entry, "_CPU_SLAB", 2 * 13)
    dim = 1 if shape[1] == 13 else 0
    parameter, optimizer, reference = seen(shape, {dim: torch.tensor(SCATTERED)}, method)
    for _ in range(4):
        parameter.grad = torch.randn(shape, dtype=torch.float64)
        optimizer.step()
        reference.step([parameter.grad])
    error = (parameter.detach() - reference.all[0].value).abs().max()
    assert error <= tolerance(torch.float64, 32 * 4) * reference.all[0].value.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_on_the_cpu(method: str, dtype: torch.dtype) -> None:
    """More columns than a vector register holds: torch's fused SGD goes wrong there in half precision."""
    torch.manual_seed(0)
    stages = {0: torch.tensor([0] * 12 + [1] * 8), 1: torch.tensor([0] * 64 + [1] * 36)}
    value = torch.randn(20, 100).to(dtype)
    options = {**METHODS[method], "rate_adaptation": True}
    sides = [nn.Parameter(value.clone()), nn.Parameter(value.double())]
    optimizers = [getattr(fo, method)([one], backend="torch", **options) for one in sides]
    for one, optimizer in zip(sides, optimizers, strict=True):
        optimizer.grown(one, stages)
    for _ in range(3):
        gradient = torch.randn(20, 100).to(dtype)
        for one, optimizer in zip(sides, optimizers, strict=True):
            one.grad = gradient.to(one.dtype)
            optimizer.step()
    error = (sides[0].double() - sides[1]).abs().max()
    assert error <= tolerance(dtype, 30) * sides[1].abs().max()


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("method", ["SGD", "Adam"])
def test_a_fused_optimizer_takes_scaled_gradients(method: str, backend: str) -> None:
    """With fused=True a GradScaler leaves both the division and the skipped step to the optimizer."""
    stages = {0: torch.tensor([0] * 5 + [1] * 3)}
    results = []
    for scaled in (False, True):
        parameter, optimizer, _ = seen((8, 6), stages, method, fused=True, backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for factor in (1.0, float("inf"), 2.0):
            if scaled or factor < float("inf"):
                optimizer.zero_grad()
                scaler.scale(factor * (parameter * torch.arange(6.0)).sum()).backward()
                scaler.step(optimizer)
                scaler.update()
        results.append(parameter.detach())
    assert torch.isfinite(results[1]).all()
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=0)


def test_equals_torch_fused_bit_for_bit_before_growth() -> None:
    for name in ("SGD", "Adam", "AdamW"):
        sides = []
        for optim in (torch.optim, fo):
            torch.manual_seed(0)
            held = [nn.Parameter(torch.randn(33, 17)), nn.Parameter(torch.randn(9))]
            optimizer = getattr(optim, name)(held, lr=0.1, fused=True)
            for _ in range(3):
                for one in held:
                    one.grad = torch.randn_like(one)
                optimizer.step()
            sides.append(held)
        assert all(torch.equal(one, two) for one, two in zip(*sides, strict=True))
