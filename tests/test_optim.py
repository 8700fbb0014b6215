"""Optimizers: torch's until something grows, then the reference's loop over blocks."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from fastgrow.kernels import block_update_cpu
from optim_reference import Reference, grow, move, stage_map
from tolerances import tolerance
from torch import Tensor, nn

import fastgrow.optim as fo
from fastgrow import GrowthError

TORCH_CASES = {
    "sgd": ("SGD", dict(lr=0.1)),
    "momentum": ("SGD", dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=1e-2)),
    "nesterov": ("SGD", dict(lr=0.1, momentum=0.9, nesterov=True, maximize=True)),
    "lr tensor": ("SGD", dict(lr=torch.tensor(0.1), momentum=0.9)),
    "adam": ("Adam", dict(lr=1e-2, weight_decay=1e-2)),
    "amsgrad": ("Adam", dict(lr=1e-2, amsgrad=True, maximize=True)),
    "adamw": ("AdamW", dict(lr=1e-2)),
}

BETAS = (0.8, 0.9)
BLOCK_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", dict(lr=0.1, weight_decay=0.1)),
    "momentum": ("SGD", dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1)),
    "nesterov": ("SGD", dict(lr=0.1, momentum=0.9, nesterov=True, maximize=True, weight_decay=0.1)),
    "adam": ("Adam", dict(lr=0.1, betas=BETAS, eps=1e-3, weight_decay=0.1)),
    "amsgrad": ("Adam", dict(lr=0.1, betas=BETAS, eps=1e-3, amsgrad=True, maximize=True)),
    "adamw": ("AdamW", dict(lr=0.1, betas=BETAS, eps=1e-3, weight_decay=0.1)),
    "avagrad": ("AvaGrad", dict(lr=0.1, betas=BETAS, eps=0.1, weight_decay=0.1)),
}
STAGE_OPTIONS = {1: {"lr": 0.5, "warmup": 3}, 2: {"lr": 2.0, "weight_decay": 0.3}}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes = [(6, 4, 3, 3), (6,), (7, 5), (3, 9)]
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def backends() -> list[str]:
    found = ["torch"]
    try:
        from fastgrow.kernels.launch import interpreting

        found += ["triton"] if interpreting() else []
    except ImportError:
        pass
    return found + (["cpu"] if block_update_cpu.missing() is None else [])


@pytest.mark.parametrize("case", TORCH_CASES)
def test_equals_torch_bit_for_bit_before_growth(case: str) -> None:
    name, options = TORCH_CASES[case]
    theirs, ours = parameters(), parameters()
    foreach = None if isinstance(options["lr"], Tensor) and name != "SGD" else True
    a = getattr(torch.optim, name)(theirs, foreach=foreach, **options)
    b = getattr(fo, name)(ours, foreach=foreach, rate_adaptation=True, **options)
    assert isinstance(b, getattr(torch.optim, name))
    for step in range(4):
        for one, two in zip(theirs, ours, strict=True):
            one.grad = None if step == 2 and one.dim() == 1 else torch.randn_like(one)
            two.grad = None if one.grad is None else one.grad.clone()
        a.step()
        b.step()
    for one, two in zip(theirs, ours, strict=True):
        assert torch.equal(one, two)
        for key, value in a.state[one].items():
            assert torch.equal(value, b.state[two][key])


class Pair:
    """An optimizer and its reference, grown and stepped together."""

    def __init__(self, method: str, options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
        self.dtype = dtype
        self.held = parameters(dtype)
        self.reference = Reference(method, [p for p in self.held], **options)
        self.optimizer = getattr(fo, method)(self.held, backend=backend, **options)

    def step(self, skip: int | None = None, gradients: list[Tensor] | None = None) -> None:
        gradients = gradients or [None if at == skip else torch.randn_like(p) for at, p in enumerate(self.held)]
        for parameter, gradient in zip(self.held, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.reference.step(gradients)

    def grow(self, at: int, index: dict[int, Tensor], stages: dict[int, Tensor], fill: float) -> None:
        old = self.held[at]
        shape = list(old.shape)
        for dim, vector in stages.items():
            shape[dim] = len(vector)
        value = move(old.detach(), torch.Size(shape), index)
        newest = stage_map(tuple(shape), stages) == max(int(v.max()) for v in stages.values())
        value[newest] = fill * torch.randn(int(newest.sum()), dtype=self.dtype)
        self.held[at] = grow(self.optimizer, old, value, index, stages)
        self.reference.grow(at, value, index, stages)

    def check(self, steps: int) -> None:
        for parameter, one in zip(self.held, self.reference.all, strict=True):
            scale = one.value.abs().max().clamp(min=1)
            error = (parameter.detach().double() - one.value).abs().max() / scale
            assert error <= tolerance(self.dtype, 32 * steps), (tuple(parameter.shape), error)


def twice_grown(pair: Pair) -> None:
    """Two growths: rows and columns of a convolution, a bias, a linear layer with scattered columns."""
    at = torch.arange
    pair.step()
    pair.step()
    pair.grow(0, {0: at(6), 1: at(4)}, {0: torch.tensor([0] * 6 + [1] * 2), 1: torch.tensor([0] * 4 + [1] * 3)}, 0.5)
    pair.grow(1, {0: at(6)}, {0: torch.tensor([0] * 6 + [1] * 2)}, 0.5)
    pair.grow(2, {1: torch.tensor([0, 1, 3, 4, 6])}, {1: torch.tensor([0, 0, 1, 0, 0, 1, 0])}, 0.5)
    pair.step()
    pair.step(skip=0)
    pair.grow(0, {0: at(8)}, {0: torch.tensor([0] * 6 + [1] * 2 + [2]), 1: torch.tensor([0] * 4 + [1] * 3)}, 2.0)
    pair.grow(1, {0: at(8)}, {0: torch.tensor([0] * 6 + [1] * 2 + [2])}, 2.0)
    pair.step()


KINDS = [("torch", torch.float64, False), ("torch", torch.float64, True), ("torch", torch.float32, True)]
KINDS += [(backend, torch.float64, True) for backend in backends()[1:]]


@pytest.mark.parametrize(("backend", "dtype", "adapted"), KINDS)
@pytest.mark.parametrize("case", BLOCK_CASES)
def test_equals_a_loop_over_blocks(case: str, adapted: bool, dtype: torch.dtype, backend: str) -> None:
    method, options = BLOCK_CASES[case]
    options = {**options, "rate_adaptation": adapted, "stage_options": STAGE_OPTIONS}
    if adapted:
        options["output_scale"] = 0.5
    pair = Pair(method, options, dtype, backend)
    twice_grown(pair)
    for _ in range(3):
        pair.step()
    pair.check(9)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "scattered rows"])
@pytest.mark.parametrize("method", ["SGD", "Adam", "AvaGrad"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_any_memory_layout(backend: str, method: str, layout: str) -> None:
    torch.manual_seed(1)
    value = torch.randn(8, 6, 3, 3, dtype=torch.float64)
    stages = {0: torch.tensor([0] * 5 + [1, 1, 2]), 1: torch.tensor([0] * 4 + [1, 2])}
    if layout == "scattered rows":
        stages = {0: torch.tensor([0, 1, 0, 1, 2, 0, 0, 1]), 1: torch.tensor([1, 0, 0, 2, 0, 0])}
    elif layout == "channels_last":
        value = value.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        value = value.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
    options: dict[str, Any] = dict(lr=0.1, rate_adaptation=True)
    options |= {} if method == "SGD" else dict(betas=BETAS, eps=0.1)
    options |= dict(momentum=0.9) if method == "SGD" else {}
    reference = Reference(method, [value], **options)
    reference.grow(0, value, {}, stages)
    reference.all[0].births = {0: 0, 1: 0, 2: 0}
    parameter = nn.Parameter(value.clone(memory_format=torch.preserve_format))
    if layout == "strided":
        parameter = nn.Parameter(torch.zeros(8, 6, 3, 6, dtype=torch.float64)[..., ::2].copy_(value))
        assert not parameter.is_contiguous()
    optimizer = getattr(fo, method)([parameter], backend=backend, **options)
    optimizer.grown(parameter, stages)
    for _ in range(3):
        parameter.grad = torch.randn(value.shape, dtype=torch.float64)
        optimizer.step()
        reference.step([parameter.grad])
    error = (parameter.detach() - reference.all[0].value).abs().max()
    assert error <= tolerance(torch.float64, 128) * value.abs().max()


@pytest.mark.parametrize("backend", backends())
def test_a_block_born_zero_is_not_frozen(backend: str) -> None:
    pair = Pair("SGD", dict(lr=0.05, rate_adaptation=True), torch.float64, backend)
    pair.step()
    pair.grow(3, {0: torch.arange(3)}, {0: torch.tensor([0, 0, 0, 1])}, 0.0)
    pair.step()
    new = pair.held[3]
    assert torch.equal(new[3], -0.05 * new.grad[3])  # the base rate
    optimizer = pair.optimizer
    pull = [torch.zeros_like(p) for p in pair.held]
    pull[3][3] = -1.0
    steps = 0
    while optimizer.state_dict()["state"][3]["waiting"][1]:
        assert steps < 60
        pair.step(gradients=pull)
        steps += 1
    assert steps > 5
    pair.step()
    pair.step()
    pair.check(steps + 4)
    rates = optimizer.stage_rates(pair.held[3])
    rms = pair.held[3].detach()
    assert rates[0] == 0.05
    assert rates[1] == pytest.approx(0.05 * (rms[3].norm() / rms[:3].norm()).item(), rel=1e-9)


@pytest.mark.parametrize("method", ["Adam", "AdamW"])
def test_first_adam_step_of_a_new_block_is_the_sign(method: str) -> None:
    torch.manual_seed(0)
    options = dict(lr=1e-2, eps=1e-30, weight_decay=0.0)
    alone = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
    grown = nn.Parameter(alone.detach().clone())
    a, b = (getattr(fo, method)([p], **options) for p in (alone, grown))

    def step() -> Tensor:
        gradient = torch.randn(grown.shape, dtype=torch.float64)
        grown.grad, alone.grad = gradient, gradient[:4, :5].clone()
        a.step()
        b.step()
        return gradient

    for _ in range(5):
        step()
    value = move(grown.detach(), torch.Size((6, 7)), {})
    stages = {0: torch.tensor([0] * 4 + [1] * 2), 1: torch.tensor([0] * 5 + [1] * 2)}
    grown = grow(b, grown, value, {}, stages)
    before = grown.detach().clone()
    gradient = step()
    moved = (grown.detach() - before)[stage_map((6, 7), stages) == 1]
    expected = -1e-2 * gradient[stage_map((6, 7), stages) == 1].sign()
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=0)
    step()
    assert (grown[:4, :5] - alone).abs().max() <= tolerance(torch.float64, 8) * alone.abs().max()


def test_momentum_is_reset_only_when_asked() -> None:
    for reset in (False, True):
        held = parameters()
        optimizer = fo.SGD(held, lr=0.1, momentum=0.9, reset_momentum=reset)
        for parameter in held:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        stages = {0: torch.tensor([0] * 7 + [1])}
        grow(optimizer, held[2], move(held[2].detach(), torch.Size((8, 5)), {}), {}, stages)
        kept = [
            optimizer.state[p].get("momentum_buffer") is not None
            for group in optimizer.param_groups
            for p in group["params"]
        ]
        assert kept == [not reset] * 4


@pytest.mark.parametrize("backend", backends())
def test_norms_follow_the_version_counter(backend: str) -> None:
    pair = Pair("SGD", dict(lr=0.1, rate_adaptation=True), torch.float64, backend)
    twice_grown(pair)
    with torch.no_grad():
        pair.held[0][:2].mul_(3)
    pair.reference.all[0].value[:2] *= 3
    pair.step()
    pair.check(8)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("case", ["momentum", "adam", "avagrad"])
def test_state_dict_continues_bit_for_bit(case: str, backend: str) -> None:
    method, options = BLOCK_CASES[case]
    pair = Pair(method, {**options, "rate_adaptation": True}, torch.float32, backend)
    twice_grown(pair)
    pair.grow(3, {0: torch.arange(3)}, {0: torch.tensor([0, 0, 0, 1])}, 0.0)
    pair.step()
    file = io.BytesIO()
    torch.save(pair.optimizer.state_dict(), file)
    file.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in pair.held]
    loaded = getattr(fo, method)(twins, lr=7.0, backend=backend)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    third = [nn.Parameter(p.detach().clone()) for p in pair.held]
    copied = copy.deepcopy(pair.optimizer)
    assert copied.backend == backend
    for group in copied.param_groups:
        third = group["params"]
    for _ in range(3):
        pair.step()
        for twin, other, parameter in zip(twins, third, pair.held, strict=True):
            twin.grad = other.grad = parameter.grad.clone()
        loaded.step()
        copied.step()
    for twin, other, parameter in zip(twins, third, pair.held, strict=True):
        assert torch.equal(twin, parameter)
        assert torch.equal(other, parameter)


def test_state_of_torch_loads() -> None:
    held = parameters()
    theirs = torch.optim.Adam(held)
    for parameter in held:
        parameter.grad = torch.randn_like(parameter)
    theirs.step()
    ours = fo.Adam(held, rate_adaptation=True)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["rate_adaptation"] is True
    ours.step()


def test_closure_groups_and_growth_before_the_first_step() -> None:
    held = parameters()
    optimizer = fo.AdamW(held[:2], lr=1e-2)
    optimizer.add_param_group({"params": held[2:], "lr": 1e-3, "rate_adaptation": True})
    optimizer.grown(held[2], {0: torch.tensor([0] * 5 + [1] * 2)})
    optimizer.set_stage(1, lr=0.5, warmup=2)
    before = held[2].detach().clone()

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in held)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert not torch.equal(before, held[2])
    assert [group["stage_options"] for group in optimizer.param_groups] == [{1: {"lr": 0.5, "warmup": 2}}] * 2


def test_bfloat16_blocks_move() -> None:
    held = [nn.Parameter(torch.randn(20, 30).bfloat16())]
    optimizer = fo.Adam(held, lr=0.1, rate_adaptation=True)
    optimizer.grown(held[0], {0: torch.tensor([0] * 12 + [1] * 8), 1: torch.tensor([0] * 20 + [1] * 10)})
    before = held[0].detach().clone()
    held[0].grad = torch.ones_like(held[0])
    optimizer.step()
    ratio = optimizer.stage_rates(held[0])[1]
    assert (held[0] != before).all()
    mask = stage_map((20, 30), {0: torch.tensor([0] * 12 + [1] * 8), 1: torch.tensor([0] * 20 + [1] * 10)}) == 1
    value = held[0].detach().double()
    assert ratio == pytest.approx(0.1 * (value[mask].norm() / value[~mask].norm()).item(), rel=1e-5)


def test_what_is_refused() -> None:
    held = parameters()
    optimizer = fo.SGD(held, lr=0.1)
    with pytest.raises(GrowthError, match="no such parameter"):
        optimizer.grown(nn.Parameter(torch.ones(2)), {})
    with pytest.raises(GrowthError, match="dimension 0"):
        optimizer.grown(held[0], {0: torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(GrowthError, match="0 is the seed"):
        optimizer.set_stage(0, lr=0.5)
    with pytest.raises(GrowthError, match="stage 1: lr=-1"):
        optimizer.set_stage(1, lr=-1)
    with pytest.raises(GrowthError, match="capturable"):
        fo.Adam(held, capturable=True).grown(held[1], {0: torch.tensor([0, 0, 0, 0, 0, 1])})
    assert not any("stages" in state for state in optimizer.state.values())
    embedding = nn.Embedding(5, 4, sparse=True)
    sparse = fo.SGD(embedding.parameters(), lr=0.1, rate_adaptation=True)
    sparse.grown(embedding.weight, {1: torch.tensor([0, 0, 0, 1])})
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(GrowthError, match="sparse=False"):
        sparse.step()


def test_orthogonalised_gradient_at_both_ends() -> None:
    held, plain = parameters(torch.float64), parameters(torch.float64)
    optimizer = fo.OrthogonalizedSGD(held, lr=0.1, momentum=0.9, anneal_steps=4)
    theirs = torch.optim.SGD(plain, lr=0.1, momentum=0.9)
    assert optimizer.lam() == 0
    old = [torch.randn_like(p) for p in held]
    for _ in range(2):
        for parameter, gradient in zip(held, old, strict=True):
            parameter.grad = gradient / 2
        optimizer.accumulate()
    seen = []
    for _ in range(6):
        before = [p.detach().clone() for p in held]
        seen.append(optimizer.lam())
        gradients = [torch.randn_like(p) for p in held]
        along = sum((g * s).sum() for g, s in zip(gradients, old, strict=True)) / sum(s.square().sum() for s in old)
        for p, q, g, s in zip(held, plain, gradients, old, strict=True):
            p.grad, q.grad = g, g - seen[-1] * along * s
        optimizer.step()
        theirs.step()
        if len(seen) == 1:
            moved = sum(((p - b) * s).sum() for p, b, s in zip(held, before, old, strict=True))
            length = (
                sum(s.square().sum() for s in old).sqrt()
                * sum((p - b).square().sum() for p, b in zip(held, before, strict=True)).sqrt()
            )
            assert abs(moved) <= tolerance(torch.float64, 400) * length
        for p, q in zip(held, plain, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert seen == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert not any("old_gradient" in state for state in optimizer.state.values())


def test_orthogonalised_gradient_is_padded_through_growth() -> None:
    held = parameters(torch.float64)
    optimizer = fo.OrthogonalizedSGD(held, lr=0.1, anneal_steps=10, scope="parameter")
    for parameter in held:
        parameter.grad = torch.randn_like(parameter)
    optimizer.accumulate()
    optimizer.zero_grad()
    new = grow(
        optimizer,
        held[2],
        move(held[2].detach(), torch.Size((9, 5)), {}),
        {},
        {0: torch.tensor([0] * 7 + [1] * 2)},
    )
    before, new.grad = new.detach().clone(), torch.randn_like(new)
    old = optimizer.state[new]["old_gradient"].clone()
    optimizer.step()
    assert torch.equal(old[7:], torch.zeros_like(old[7:]))
    assert torch.equal(new[7:] - before[7:], -0.1 * new.grad[7:] + 0 * before[7:]) or torch.allclose(
        new[7:] - before[7:], -0.1 * new.grad[7:], rtol=1e-12
    )
    assert abs(((new - before) * old).sum()) <= tolerance(torch.float64, 45) * old.norm() * (new - before).norm()
