"""The compiled step of grown parameters on a CPU, against a torch.optim optimizer for every block."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastgrow.kernels import block_update_cpu as loop
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_reference import Reference, grow, move, stage_map
from tolerances import tolerance
from torch import Tensor, nn

import fastgrow.optim as fo
from fastgrow import GrowthError

built = pytest.mark.skipif(loop.missing() is not None, reason=str(loop.missing()))

BETAS = (0.8, 0.9)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", dict(lr=0.1, weight_decay=0.1)),
    "momentum": ("SGD", dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1)),
    "nesterov": ("SGD", dict(lr=0.1, momentum=0.9, nesterov=True, maximize=True)),
    "adam": ("Adam", dict(lr=0.1, betas=BETAS, eps=1e-3, weight_decay=0.1)),
    "amsgrad": ("Adam", dict(lr=0.1, betas=BETAS, eps=1e-3, amsgrad=True, maximize=True)),
    "decoupled": ("Adam", dict(lr=0.1, betas=BETAS, eps=1e-3, decoupled_weight_decay=True, weight_decay=0.2)),
    "adamw": ("AdamW", dict(lr=0.1, betas=BETAS, eps=1e-3, weight_decay=0.1, amsgrad=True)),
    "avagrad": ("AvaGrad", dict(lr=0.1, betas=BETAS, eps=0.1, weight_decay=0.1, maximize=True)),
}
STAGE_OPTIONS = {1: {"lr": 0.5, "warmup": 3}, 2: {"lr": 2.0, "weight_decay": 0.3}}

Stages = dict[int, list[int]]
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None, Stages]] = {  # shape, order in memory, stages
    "one": ((1, 1), None, {0: [0]}),
    "vector": ((37,), None, {0: [0] * 20 + [1] * 9 + [2] * 8}),
    "linear": ((33, 257), None, {0: [0] * 20 + [1] * 9 + [2] * 4, 1: [0] * 129 + [1] * 100 + [2] * 28}),
    "conv": ((13, 11, 3, 3), None, {0: [0] * 8 + [1] * 3 + [2] * 2, 1: [0] * 7 + [1] * 4}),
    "conv inputs": ((5, 31, 5, 5), None, {1: [0] * 20 + [1] * 8 + [2] * 3}),
    "flatten": ((7, 12 * 9), None, {1: [stage for stage in [0] * 8 + [1] * 3 + [2] for _ in range(9)]}),
    "periodic": ((9, 60), None, {0: [0] * 6 + [1] * 3, 1: [0, 0, 2] * 20}),
    "long periods": ((4, 1200), None, {1: ([0] * 200 + [1] * 60 + [2] * 40) * 4}),
    "channels last": ((11, 10, 3, 3), (0, 2, 3, 1), {0: [0] * 8 + [1] * 3, 1: [0] * 7 + [1] * 2 + [2]}),
    "transposed": ((23, 19), (1, 0), {0: [0] * 12 + [1] * 11, 1: [0] * 9 + [1] * 4 + [2] * 6}),
    "scattered rows": ((30, 5), None, {0: [0, 1, 2] * 10, 1: [1, 0, 0, 0, 3]}),
    "three dimensions": ((3, 4, 6), None, {0: [0, 0, 1], 1: [0, 0, 0, 2], 2: [0] * 5 + [1]}),
    "no seed": ((4, 3), None, {0: [2, 2, 3, 3]}),
    "many stages": ((3, 90), None, {1: [at % 11 for at in range(90)]}),
}


def vectors(stages: Stages) -> dict[int, Tensor]:
    return {dim: torch.tensor(vector) for dim, vector in stages.items()}


def laid_out(value: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """The same values, with these dimensions from slow to fast in memory."""
    if order is None:
        return value.contiguous()
    back = [order.index(dim) for dim in range(len(order))]
    return value.permute(order).contiguous().permute(back)


class Blockwise:
    """A 1-dimensional parameter and a float64 torch.optim optimizer of its own for every block."""

    def __init__(self, method: str, value: Tensor, stages: Tensor, options: dict[str, Any]) -> None:
        self.shape, self.stages, self.options = value.shape, stages, options
        own = {k: v for k, v in options.items() if k not in ("rate_adaptation", "stage_options", "output_scale")}
        self.parts = {int(k): nn.Parameter(value.double()[stages == k]) for k in stages.unique()}
        self.optimizers = {k: getattr(torch.optim, method)([part], **own) for k, part in self.parts.items()}
        self.steps = 0

    def step(self, gradient: Tensor) -> None:
        self.steps += 1
        for k, rate in self.rates().items():
            (group,) = self.optimizers[k].param_groups
            group["lr"] = rate
            group["weight_decay"] = self.of(k).get("weight_decay", self.options.get("weight_decay", 0.0))
            self.parts[k].grad = gradient.double()[self.stages == k]
        for optimizer in self.optimizers.values():
            optimizer.step()

    def of(self, stage: int) -> dict[str, float]:
        return self.options.get("stage_options", {}).get(stage, {})

    def rates(self) -> dict[int, float]:
        norms = {k: part.detach().norm().item() for k, part in self.parts.items()}
        seed = norms[min(norms)]
        rates = {}
        for k, norm in norms.items():
            adapted = self.options["rate_adaptation"] and len(self.shape) > 1 and k > min(norms)
            rate = self.options["lr"] * self.of(k).get("lr", 1.0) * (norm / seed if adapted else 1.0)
            rates[k] = rate * min(1.0, self.steps / self.of(k).get("warmup", 1))
        return rates

    def value(self) -> Tensor:
        value = torch.empty(self.shape, dtype=torch.float64)
        for k, part in self.parts.items():
            value[self.stages == k] = part.detach()
        return value


def run(method: str, dtype: torch.dtype, names: list[str], steps: int, **more: Any) -> tuple[Any, list[nn.Parameter]]:
    """`steps` steps of the loop over all these cases at once, each compared with its blocks' own optimizers."""
    torch.manual_seed(0)
    kind, options = METHODS[method]
    options = {**options, "rate_adaptation": True, "stage_options": STAGE_OPTIONS, **more}
    values = [laid_out(torch.randn(CASES[name][0], dtype=torch.float64).to(dtype), CASES[name][1]) for name in names]
    held = [nn.Parameter(value.clone(memory_format=torch.preserve_format)) for value in values]
    optimizer = getattr(fo, kind)(held, backend="cpu", **options)
    stages = [vectors(CASES[name][2]) for name in names]
    for parameter, given_stages in zip(held, stages, strict=True):
        optimizer.grown(parameter, given_stages)
        optimizer.state[parameter]["births"] = dict.fromkeys(optimizer.state[parameter]["births"], 0)
    maps = [stage_map(tuple(v.shape), s) for v, s in zip(values, stages, strict=True)]
    if kind == "AvaGrad":
        reference = Reference(kind, values, **options)
        for at, (value, given_stages) in enumerate(zip(values, stages, strict=True)):
            reference.grow(at, value, {}, given_stages)
            reference.all[at].births = dict.fromkeys(reference.all[at].blocks(), 0)
    else:
        blockwise = [Blockwise(kind, value, of, options) for value, of in zip(values, maps, strict=True)]
    for _ in range(steps):
        for parameter in held:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        if kind == "AvaGrad":
            reference.step([parameter.grad for parameter in held])
        else:
            for one, parameter in zip(blockwise, held, strict=True):
                one.step(parameter.grad)
    expected = [one.value for one in reference.all] if kind == "AvaGrad" else [one.value() for one in blockwise]
    for name, parameter, value in zip(names, held, expected, strict=True):
        # each step rounds the value, its moments and the sums behind its rate a few times
        bound = tolerance(dtype, 8 * steps) * value.abs().max().clamp(min=1)
        assert (parameter.detach().double() - value).abs().max() <= bound, name
    return optimizer, held


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_equals_an_optimizer_for_every_block(method: str, dtype: torch.dtype) -> None:
    names = [name for name in CASES if name != "no seed"]
    run(method, dtype, names, 4)
    for name in names:
        run(method, dtype, [name], 2)


@built
@pytest.mark.parametrize("method", ["momentum", "adam", "avagrad"])
def test_chunks_may_end_anywhere(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in CASES if name != "no seed"]
    for size in (1, 7, 64, 1000):
        monkeypatch.setattr(loop, "CHUNK", size)
        run(method, torch.float64, names, 3)


@built
def test_rates_are_the_rule_without_adaptation_and_seed() -> None:
    run("adam", torch.float64, ["linear", "conv"], 3, rate_adaptation=False)
    parameter = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    optimizer = fo.SGD([parameter], lr=0.5, rate_adaptation=True, backend="cpu")
    optimizer.grown(parameter, {0: torch.tensor([2, 2, 3, 3])})
    with torch.no_grad():
        parameter[:2] = 0
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # no norm to compare with: the base rate everywhere
    assert torch.equal(parameter, torch.tensor([[-0.5], [-0.5], [0.5], [0.5]]).double().expand(4, 3))


@st.composite
def blocks(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], Stages]:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    order = tuple(draw(st.permutations(range(len(shape)))))
    grown = draw(st.lists(st.sampled_from(range(len(shape))), unique=True, min_size=1))
    stages = {dim: draw(st.lists(st.integers(0, 3), min_size=shape[dim], max_size=shape[dim])) for dim in grown}
    return shape, order, stages


@built
@settings(max_examples=40, deadline=None)
@given(block=blocks(), method=st.sampled_from(["momentum", "amsgrad", "avagrad"]), seed=st.integers(0, 99))
def test_any_shape_order_and_stages(
    block: tuple[tuple[int, ...], tuple[int, ...], Stages], method: str, seed: int
) -> None:
    shape, order, stages = block
    torch.manual_seed(seed)
    value = laid_out(torch.randn(shape, dtype=torch.float64), order)
    kind, options = METHODS[method]
    sides = []
    for backend in ("cpu", "torch"):
        parameter = nn.Parameter(value.clone(memory_format=torch.preserve_format))
        optimizer = getattr(fo, kind)([parameter], rate_adaptation=True, backend=backend, **options)
        optimizer.grown(parameter, vectors(stages))
        torch.manual_seed(seed)
        for _ in range(2):
            parameter.grad = torch.randn(shape, dtype=torch.float64)
            optimizer.step()
        sides.append((parameter, optimizer.stage_rates(parameter), optimizer.state_dict()["state"][0]))
    (ours, rates, state), (theirs, expected, other) = sides
    bound = tolerance(torch.float64, 32) * theirs.abs().max().clamp(min=1)
    assert (ours - theirs).abs().max() <= bound
    assert rates == pytest.approx(expected, rel=tolerance(torch.float64, ours.numel()))
    assert state["waiting"] == other["waiting"]
    assert state["step"] == other["step"] == 2


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["momentum", "adamw", "avagrad"])
def test_threads_change_no_bit(method: str, dtype: torch.dtype, threads: None) -> None:
    kind, options = METHODS[method]
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        held = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((301, 703), (3, 5), (90, 70, 3, 3), (40000,))]
        optimizer = getattr(fo, kind)(held, rate_adaptation=True, backend="cpu", **options)
        for parameter in held:
            sizes = parameter.shape[:2]
            optimizer.grown(parameter, {d: torch.arange(n) * 3 // n for d, n in enumerate(sizes)})
        for _ in range(2):
            for parameter in held:
                parameter.grad = torch.randn(parameter.shape).to(dtype)
            optimizer.step()
        results.append((held, [optimizer.state[p][name] for p in held for name in optimizer._moment_names]))
    for held, moments in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(held, results[0][0], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(moments, results[0][1], strict=True))


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_step_leaves_the_norms_of_what_it_wrote(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(loop, "CHUNK", 333)
    names = ["linear", "periodic", "long periods", "three dimensions"]
    values = [torch.randn(CASES[name][0]).to(dtype) for name in names]
    maps = [stage_map(tuple(v.shape), vectors(CASES[n][2])) for v, n in zip(values, names, strict=True)]
    ranks = [torch.unique(one, return_inverse=True)[1].reshape(-1) for one in maps]
    zero = torch.zeros(1, dtype=torch.int64)
    table = loop.BlockTable(values, [(zero, rank) for rank in ranks], [rank.bincount().tolist() for rank in ranks])
    gradients = [torch.ones_like(value) for value in values]
    table.bind([values, gradients])
    scalars = torch.tensor([0.1, 0.0, 1.0, 0.0, 0.0] * table.total + [0.0] * 4, dtype=torch.float64)
    ratio = torch.ones(table.total, dtype=torch.float64)
    expected = [value - 0.1 for value in values]
    options: dict[str, bool] = dict(momentum=False, nesterov=False, maximize=False)
    table.sgd(scalars, ratio, norms=True, **options)
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=tolerance(dtype, 1), atol=tolerance(dtype, 1))
    left, anew = (torch.full_like(ratio, float("nan")) for _ in range(2))
    table.finish(table.partial, left)
    table.norms(anew)
    assert torch.equal(left, anew)
    of_blocks = [value.double()[of == k] for value, of in zip(values, maps, strict=True) for k in of.unique()]
    true = torch.stack([block.square().sum() for block in of_blocks])
    assert ((left - true).abs() <= tolerance(table.acc if dtype == torch.float64 else torch.float32, 64) * true).all()


@built
@pytest.mark.parametrize("method", ["momentum", "adam", "avagrad"])
def test_what_is_written_in_between_renews_the_norms(method: str) -> None:
    kind, options = METHODS[method]
    sides = []
    for backend in ("cpu", "torch"):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(8, 9, dtype=torch.float64))
        optimizer = getattr(fo, kind)([parameter], rate_adaptation=True, backend=backend, **options)
        optimizer.grown(parameter, {0: torch.tensor([0] * 5 + [1] * 3)})
        for _ in range(3):
            parameter.grad = torch.randn_like(parameter)
            before = parameter._version
            optimizer.step()
            assert parameter._version > before
            with torch.no_grad():
                parameter[5:].mul_(2)
                for name in optimizer._moment_names:
                    optimizer.state[parameter][name].mul_(0.5)
        sides.append(parameter.detach())
    assert (sides[0] - sides[1]).abs().max() <= tolerance(torch.float64, 32) * sides[1].abs().max()


@built
@pytest.mark.parametrize("kind", ["other strides", "negated view", "other dtype", "expanded"])
def test_gradients_as_they_come(kind: str) -> None:
    torch.manual_seed(0)
    results = []
    base = torch.randn(6, 8, dtype=torch.complex128)
    plain = -base.imag if kind == "negated view" else torch.randn(6, 8, dtype=torch.float64)
    plain = plain[:1].expand(6, 8).clone() if kind == "expanded" else plain
    for given_as_is in (True, False):
        parameter = nn.Parameter(torch.ones(6, 8, dtype=torch.float64))
        optimizer = fo.SGD([parameter], lr=0.1, momentum=0.9, rate_adaptation=True, backend="cpu")
        optimizer.grown(parameter, {0: torch.tensor([0] * 4 + [1] * 2)})
        gradient = plain.clone()
        if given_as_is and kind == "negated view":
            gradient = torch.view_as_real(base.contiguous()).clone()[..., 1].contiguous()
            gradient = torch._neg_view(gradient)
            assert gradient.is_neg()
            assert torch.equal(gradient, plain)
        elif given_as_is and kind == "other strides":
            gradient = plain.t().contiguous().t()
        elif given_as_is and kind == "expanded":
            gradient = plain[:1].expand(6, 8)
        parameter.grad = gradient
        if given_as_is and kind == "other dtype":
            parameter.grad = None
            parameter.grad_dtype = torch.float32
            parameter.grad = gradient.float()
        elif kind == "other dtype":
            parameter.grad = gradient.float().double()
        for _ in range(2):
            optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)


@built
def test_half_precision_storage_is_rounded_to_even() -> None:
    """bfloat16 values are stepped in float32 and rounded once."""
    torch.manual_seed(0)
    value, gradient = torch.randn(40, 50).bfloat16(), torch.randn(40, 50).bfloat16()
    value[0, :3] = torch.tensor([float("nan"), float("inf"), 3e38])
    parameter = nn.Parameter(value.clone())
    optimizer = fo.SGD([parameter], lr=0.125, output_scale=0.5, backend="cpu")
    parameter.grad = gradient
    optimizer.step()
    expected = (value.float() - 0.0625 * gradient.float()).bfloat16()
    torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=0, equal_nan=True)


@built
def test_growth_in_the_middle_of_training() -> None:
    """Blocks of three ages, one of them born zero, through deepcopy and state_dict."""
    torch.manual_seed(0)
    for kind, options in (METHODS["momentum"], METHODS["adam"], METHODS["avagrad"]):
        sides = []
        for backend in ("cpu", "torch"):
            torch.manual_seed(0)
            parameter = nn.Parameter(torch.randn(6, 10))
            optimizer = getattr(fo, kind)([parameter], rate_adaptation=True, backend=backend, **options)
            rows = [0] * 6
            for stage in range(3):
                for _ in range(2):
                    parameter.grad = torch.randn(parameter.shape)
                    optimizer.step()
                optimizer = copy.deepcopy(optimizer)
                (parameter,) = optimizer.param_groups[0]["params"]
                rows = [*rows, stage + 1, stage + 1]
                value = move(parameter.detach(), torch.Size((len(rows), 10)), {})
                value[-2:] = 0.3 * stage
                parameter = grow(optimizer, parameter, value, {}, {0: torch.tensor(rows)})
            for _ in range(3):
                parameter.grad = torch.randn(parameter.shape)
                optimizer.step()
            other = getattr(fo, kind)([parameter], rate_adaptation=True, backend=backend, **options)
            other.load_state_dict(optimizer.state_dict())
            parameter.grad = torch.randn(parameter.shape)
            other.step()
            sides.append(parameter.detach())
        assert (sides[0] - sides[1]).abs().max() <= tolerance(torch.float32, 80) * sides[1].abs().max()


@built
def test_one_call_steps_all_grown_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [nn.Parameter(torch.randn(4, 3)) for _ in range(60)]
    optimizer = fo.Adam(held, rate_adaptation=True, foreach=True)
    calls: list[str] = []
    launch = loop.BlockTable.launch
    monkeypatch.setattr(
        loop.BlockTable, "launch", lambda self, name, *a, **k: calls.append(name) or launch(self, name, *a, **k)
    )
    for parameter in held:
        optimizer.grown(parameter, {0: torch.tensor([0, 0, 1, 1])})
    for _ in range(3):
        for parameter in held:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert calls == ["norms", "adam", "adam", "adam"]


def test_without_the_loop_torch_steps_and_an_explicit_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "missing", lambda: "the compiled loop for CPUs is not built")
    results = []
    for backend in ("auto", "torch", "cpu"):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(5, 4))
        optimizer = fo.SGD([parameter], lr=0.1, rate_adaptation=True, backend=backend)
        optimizer.grown(parameter, {0: torch.tensor([0, 0, 0, 1, 1])})
        parameter.grad = torch.randn(5, 4)
        if backend == "cpu":
            with pytest.raises(GrowthError, match="backend='cpu', but the compiled loop .* backend='auto'"):
                optimizer.step()
        else:
            optimizer.step()
            results.append(parameter.detach())
    assert torch.equal(*results)


@built
def test_what_the_loop_does_not_take() -> None:
    strided = torch.randn(6, 10)[:, ::2]
    for value, match in ((strided, "not dense"), (torch.randn(6, 5).half(), "float16")):
        results = []
        for backend in ("auto", "torch", "cpu"):
            parameter = nn.Parameter(value.clone(memory_format=torch.preserve_format))
            if value is strided:
                parameter = nn.Parameter(torch.zeros(6, 10)[:, ::2].copy_(strided))
                assert not parameter.is_contiguous()
            optimizer = fo.Adam([parameter], lr=0.1, rate_adaptation=True, backend=backend)
            optimizer.grown(parameter, {0: torch.tensor([0, 0, 0, 1, 1, 1])})
            parameter.grad = torch.ones_like(parameter)
            if backend == "cpu":
                with pytest.raises(GrowthError, match=match):
                    optimizer.step()
            else:
                optimizer.step()
                results.append(parameter.detach())
        assert torch.equal(*results)
    with pytest.raises(GrowthError, match="'auto', 'triton', 'cpu', 'torch'"):
        fo.SGD([nn.Parameter(strided)], lr=0.1, backend="openmp")
