"""What reading gradient norms costs, and may not cost: steps that are left out, reads that are left out."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastgrow.kernels.launch import triton_missing
from nets import Residual
from tolerances import assert_close, tolerance
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastgrow as fg
from fastgrow import ops, riding

OBSERVE = sys.modules["fastgrow.observe"]  # the name in the package is the class


def batches_of(count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of different sizes, so that a mean over samples is not one over batches."""
    torch.manual_seed(1)
    return [(torch.randn(3 + n % 3, 2, 8, 6), torch.randint(3, (3 + n % 3,))) for n in range(count)]


def grower_of(model: nn.Module, x: Tensor, **options: Any) -> fg.Grower:
    options.setdefault("where", fg.where.Everywhere(units=1))
    return fg.Grower(model, torch.optim.SGD(model.parameters(), lr=0.0), example_inputs=x, **options)


def watched(model: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def steps_of(grower: fg.Grower, data: list[tuple[Tensor, Tensor]], parts: int = 1) -> list[bool]:
    """Whether each step's observation set hooks; stops after the first growth."""
    hooked = []
    for x, y in data:
        seen = []
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            with grower.observe():
                output = grower.model(xs)
                F.cross_entropy(output, ys).backward()
                seen.append(watched(grower.model))
        assert len(set(seen)) == 1
        hooked.append(seen[0])
        if grower.step() is not None:
            break
    assert not watched(grower.model)
    return hooked


# -- every ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("growth", ["exact", "sketch"])
def test_a_measurement_is_the_mean_over_its_steps_and_the_others_carry_no_hook(every: int, growth: Any) -> None:
    torch.manual_seed(0)
    model = Residual().eval().double()  # batch statistics stay put: both ways see the same network
    reference = copy.deepcopy(model)
    data = [(x.double(), y) for x, y in batches_of(10)]
    grower = grower_of(
        model, data[0][0], when=fg.when.Milestones([9]), batches=3, every=every, growth=growth, where=fg.where.NAGN(0.0)
    )
    hooked = steps_of(grower, data)
    measured = [9 - 2 * every, 9 - every, 9]
    assert [step for step, was in enumerate(hooked, 1) if was] == measured
    (report,) = grower.history
    assert report.step == 9

    with fg.observe(reference, grower.sites, growth=False) as seen:
        for step in measured:
            x, y = data[step - 1]
            F.cross_entropy(reference(x), y).backward()
    assert report.evidence["nagn_after_norm"] == pytest.approx(seen.nagn_after_norm, rel=1e-12)


@pytest.mark.parametrize(
    ("place", "own", "after"), [("after_norm", False, True), ("before_norm", True, False)], ids=["after", "before"]
)
def test_a_policy_has_one_place_read(place: Any, own: bool, after: bool) -> None:
    torch.manual_seed(0)
    model = Residual()
    x, y = batches_of(1)[0]
    grower = grower_of(model, x, when=fg.when.Milestones([1]), where=fg.where.NAGN(0.0, read=place))
    steps_of(grower, [(x, y)])
    evidence = grower.history[0].evidence
    assert grower.sites.layers["stem"].norm is not None
    assert ("stem" in evidence["nagn"]) is own
    assert ("stem" in evidence["nagn_after_norm"]) is after


def test_directions_too_are_those_of_the_measured_steps() -> None:
    torch.manual_seed(0)
    model = Residual().eval().double()
    reference = copy.deepcopy(model)
    data = [(x.double(), y) for x, y in batches_of(5)]
    grower = grower_of(model, data[0][0], when=fg.when.Milestones([5]), batches=3, every=2)
    steps_of(grower, data)
    with fg.observe(reference, grower.sites, rank=1) as seen:
        for x, y in data[::2]:
            F.cross_entropy(reference(x), y).backward()
    units = {site.name: 1 for site in grower.history[0].sites}
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.0)
    fg.grow(reference, units, grower.how, sites=grower.sites, optimizer=optimizer, seen=seen)
    for grown, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        assert_close(grown, wanted, torch.float64, 1 << 20)


def test_every_micro_batch_of_a_measured_step_is_measured() -> None:
    data = [(torch.randn(4, 2, 8, 6), torch.randint(3, (4,))) for _ in range(8)]
    grower = grower_of(Residual(), data[0][0], when=fg.when.Milestones([6]), batches=2, every=3, accumulation=2)
    assert steps_of(grower, data, parts=2) == [False, False, True, False, False, True]
    assert grower.history[0].step == 6


def test_a_metric_starts_a_span_that_ends_with_a_measured_step() -> None:
    data = batches_of(8)
    when = fg.when.Plateau(window=1, stop_gain=0.0)
    grower = grower_of(Residual(), data[0][0], when=when, batches=2, every=3)
    grower.step(metric=0.5)
    grower.step(metric=0.5)
    assert grower.armed
    assert steps_of(grower, data) == [True, False, False, True]


def test_a_growth_foreseen_too_late_for_the_whole_span_measures_what_is_left() -> None:
    data = batches_of(4)
    grower = grower_of(Residual(), data[0][0], when=fg.when.Milestones([4]), batches=3, every=3)
    assert steps_of(grower, data) == [True, False, False, True]


def test_a_resumed_run_measures_the_same_steps() -> None:
    data = batches_of(9)
    options: dict[str, Any] = {"batches": 3, "every": 3}
    first = grower_of(Residual(), data[0][0], when=fg.when.Milestones([9]), **options)
    before = steps_of(first, data[:4])
    second = grower_of(Residual(), data[0][0], when=fg.when.Milestones([9]), **options)
    second.load_state_dict(first.state_dict())
    after = steps_of(second, data[4:])
    assert before + after == [False, False, True, False, False, True, False, False, True]
    assert second.history[0].step == 9


def test_a_gain_is_measured_over_its_span() -> None:
    data = batches_of(6)
    grower = grower_of(Residual(), data[0][0], when=fg.when.Gain(0.0, every=3), batches=2, every=2)
    assert steps_of(grower, data) == [True, False, True]
    assert grower.history[0].step == 3


@pytest.mark.parametrize("every", [0, 2.0, True])
def test_every_is_a_whole_number(every: Any) -> None:
    with pytest.raises(fg.GrowthError, match=r"every=.*integer of at least 1"):
        grower_of(Residual(), batches_of(1)[0][0], when=fg.when.Every(4), every=every)


# -- one place --------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of every gradient that was read."""
    found: list[int] = []
    real = ops.sum_of_squares

    def counted(x: Tensor) -> Tensor:
        found.append(x.numel())
        return real(x)

    monkeypatch.setattr(OBSERVE.kernel_ops, "sum_of_squares", counted)
    return found


def test_one_place_is_read_where_one_is_asked_for(reads: list[int]) -> None:
    torch.manual_seed(0)
    model = Residual()
    x, y = batches_of(1)[0]
    sites = fg.find_sites(model, x)
    found, counts = {}, {}
    for place in (True, "own", "after_norm"):
        reads.clear()
        with fg.observe(model, sites, nagn=place, growth=False) as seen:
            F.cross_entropy(model(x), y).backward()
        found[place], counts[place] = seen, len(reads)
    normed = {name for name, info in sites.layers.items() if info.norm is not None}
    assert len(normed) == 3
    # 6 layers, 3 norms; the residual sum hands `down` and `b1` the same gradient, which is read once
    assert (counts[True], counts["own"], counts["after_norm"]) == (8, 5, 5)
    assert set(found[True].nagn) == set(sites.layers)
    both = found[True]
    assert found["own"].nagn == both.nagn
    assert found["after_norm"].nagn_after_norm == both.nagn_after_norm
    assert found["own"].nagn_after_norm == {name: both.nagn[name] for name in both.nagn if name not in normed}
    assert found["after_norm"].nagn == {name: both.nagn[name] for name in both.nagn if name not in normed}


def test_growth_reads_what_it_needs_at_any_place() -> None:
    torch.manual_seed(0)
    model = Residual()
    x, y = batches_of(1)[0]
    sites = fg.find_sites(model, x)
    values = []
    for place in (True, "after_norm", "own"):
        with fg.observe(model, sites, nagn=place, rank=1) as seen:
            F.cross_entropy(model(x), y).backward()
        values.append({name: d.values for name, d in seen.directions(1).items()})
    assert values[0] == values[1] == values[2]


class Shared(nn.Module):
    """Two layers added up; the gradient of one of them gains a second part, before or after the sum hands it on."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x), self.two(x)
        if self.order == "alone":
            return self.head(one + two)
        extra = two.square() if self.order == "earlier" else torch.zeros(())
        total = one + two
        if self.order == "later":
            extra = two.square()
        return self.head(total + extra)


@pytest.mark.parametrize("order", ["alone", "earlier", "later"])
def test_a_gradient_handed_to_two_layers_counts_for_each_as_it_arrives(order: str, reads: list[int]) -> None:
    torch.manual_seed(0)
    model = Shared(order)
    x = torch.randn(6, 3)
    sites = fg.find_sites(model, x)
    outputs: list[Tensor] = []
    for layer in (model.one, model.two):
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    with fg.observe(model, sites, growth=False) as seen:
        loss = model(x).square().mean()
        gradients = torch.autograd.grad(loss, outputs)
    assert len(reads) == (2 if order == "alone" else 3)
    for name, gradient in zip(("one", "two"), gradients, strict=True):
        wanted = (6 * gradient.double().square().sum() / 4).sqrt().item()
        assert seen.nagn[name] == pytest.approx(wanted, rel=tolerance(torch.float32, 24))


@pytest.mark.parametrize("place", ["before", 2, ["own"]])
def test_an_unknown_place_is_refused(place: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(fg.GrowthError, match=r"nagn=.*'after_norm'"):
        fg.observe(model, fg.find_sites(model, torch.randn(2, 2)), nagn=place)


@pytest.mark.parametrize("count", [(1 << 15) - 1, 1 << 15, (1 << 15) + 1, 1 << 16, (1 << 16) + 5])
@pytest.mark.parametrize("values", ["equal", "random"])
def test_sums_on_the_cpu_around_the_length_of_one_run(count: int, values: str) -> None:
    torch.manual_seed(0)
    x = torch.full((count,), 0.3) if values == "equal" else torch.randn(count)
    assert_close(ops.sum_of_squares(x, backend="torch"), x.double().square().sum(), torch.float32, count)


# -- riding on the activation's backward ------------------------------------------------------------


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> list[bool]:
    """Whether each gradient brought its sum; kernels run interpreted where there is no GPU."""
    found: list[bool] = []

    def asked(gradient: Tensor) -> Tensor | None:
        total = riding.carried_sum(gradient)
        found.append(total is not None)
        return total

    monkeypatch.setattr(OBSERVE, "carried_sum", asked)
    monkeypatch.setattr(riding, "rides", lambda x: x.dtype in riding._DTYPES and triton_missing(x) is None)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # two runs are compared bit by bit
    torch.manual_seed(0)
    return found


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "relu6 in place": lambda: nn.ReLU6(inplace=True),
    "leaky": lambda: nn.LeakyReLU(0.1),
    "leaky in place": lambda: nn.LeakyReLU(0.1, inplace=True),
    "twin": fg.nn.ReLU,
}


def two_layers(activation: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), activation(), nn.Conv2d(5, 4, 3), activation(), nn.Flatten()
    )
    model.append(nn.Linear(4 * 4 * 3, 3))
    return model.to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_carried_sums_change_no_bit_of_a_training_step(
    activation: str, dtype: torch.dtype, carried: list[bool], device: torch.device
) -> None:
    if activation.startswith("leaky") and dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter truncates products to bfloat16, where GPUs round")
    model = two_layers(ACTIVATIONS[activation], dtype, device)
    kinds = [type(module) for module in model]
    x = torch.randn(5, 2, 8, 7, device=device, dtype=dtype).requires_grad_()
    sites = fg.find_sites(model, x.detach())
    own = copy.deepcopy(model)
    with torch.no_grad():
        for each in (model, own):
            each[0].weight[0] = 0.0  # a channel whose values are all equal: exact zeros behind a norm of bias 0
    wanted = own(x)
    wanted_grads = torch.autograd.grad(wanted.square().mean(), [x, *own.parameters()])
    with fg.observe(model, sites, growth=False) as seen:
        output = model(x)
        grads = torch.autograd.grad(output.square().mean(), [x, *model.parameters()])
    assert torch.equal(output, wanted)
    assert all(torch.equal(got, want) for got, want in zip(grads, wanted_grads, strict=True))
    assert [type(module) for module in model] == kinds
    double = dtype == torch.float64
    assert carried == ([False] * 4 if double else [False, True, True, False])  # output, conv 2, the norm, conv 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(riding, "rides", lambda x: False)
        with fg.observe(model, sites, growth=False) as plain:
            torch.autograd.grad(model(x).square().mean(), [x])
    rel = tolerance(torch.float64 if double else torch.float32, 5 * 5 * 6 * 5)
    assert seen.nagn == pytest.approx(plain.nagn, rel=rel)
    assert seen.nagn_after_norm == pytest.approx(plain.nagn_after_norm, rel=rel)


class Twice(nn.Module):
    """The layer's output has a second reader, before or after the activation in the order of calls."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.relu = nn.ReLU()
        self.outer = nn.Linear(4, 2)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x)
        if self.first:
            return self.outer(z * z + self.relu(z))
        return self.outer(self.relu(z) + z * z)


@pytest.mark.parametrize("first", [True, False])
def test_a_second_reader_of_the_values_is_counted(first: bool, carried: list[bool], device: torch.device) -> None:
    model = Twice(first).to(device)
    x = torch.randn(6, 3, device=device)
    sites = fg.find_sites(model, x)
    with fg.observe(model, sites, growth=False) as seen:
        z: list[Tensor] = []
        hook = model.inner.register_forward_hook(lambda module, args, output: z.append(output))
        output = model(x)
        (gradient,) = torch.autograd.grad(output.square().mean(), z, retain_graph=True)
        hook.remove()
    assert carried[-1] is False
    rows = len(x)
    wanted = (rows * gradient.double().square().sum() / gradient[0].numel()) ** 0.5
    assert seen.nagn["inner"] == pytest.approx(wanted.item(), rel=tolerance(torch.float32, gradient.numel()))


def test_sums_are_carried_through_a_residual_sum(carried: list[bool], device: torch.device) -> None:
    model = Residual().to(device)
    x, y = (t.to(device) for t in batches_of(1)[0])
    sites = fg.find_sites(model, x)
    with fg.observe(model, sites, growth=False) as seen:
        F.cross_entropy(model(x), y).backward()
    # head, b1, down, a2 and its norm, a1 and its norm, stem and its norm: the stream behind bn0 has two readers,
    # but its own activation adds up their gradients before it passes them on
    assert sorted(carried) == [False] * 4 + [True] * 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(riding, "rides", lambda x: False)
        with fg.observe(model, sites, growth=False) as plain:
            F.cross_entropy(model(x), y).backward()
    rel = tolerance(torch.float32, x.numel() * 3)
    assert seen.nagn == pytest.approx(plain.nagn, rel=rel)
    assert seen.nagn_after_norm == pytest.approx(plain.nagn_after_norm, rel=rel)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_hook_that_changes_the_gradient_in_place_is_counted(
    inplace: bool, carried: list[bool], device: torch.device
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace), nn.Linear(4, 2)).to(device)
    model[0].register_forward_hook(lambda module, args, output: output.register_hook(lambda g: g.mul_(2.0)) and None)
    x = torch.randn(6, 3, device=device)
    sites = fg.find_sites(model, x)
    with fg.observe(model, sites, growth=False) as seen:
        model(x).square().mean().backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(riding, "rides", lambda x: False)
        with fg.observe(model, sites, growth=False) as plain:
            model(x).square().mean().backward()
    assert seen.nagn == pytest.approx(plain.nagn, rel=tolerance(torch.float32, 24))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_second_derivatives_are_those_of_torch(activation: str, carried: list[bool], device: torch.device) -> None:
    model = two_layers(ACTIVATIONS[activation], torch.float32, device).eval()
    x = torch.randn(5, 2, 8, 7, device=device, requires_grad=True)

    def penalty() -> tuple[Tensor, ...]:
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [x, *model.parameters()], allow_unused=True)

    wanted = penalty()
    with riding.riding(model):
        assert type(model[2]) in riding._CARRIERS.values()
        got = penalty()
    for g, w in zip(got, wanted, strict=True):
        assert (g is None) == (w is None)
        assert g is None or torch.equal(g, w)


def test_checkpointing_and_autocast(carried: list[bool], device: torch.device) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, 4), nn.ReLU())
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.body, x, use_reentrant=False))

    model = Checkpointed().to(device)
    x = torch.randn(6, 3, device=device)
    sites = fg.find_sites(model, x)
    with fg.observe(model, sites, growth=False) as seen, torch.autocast(device.type, torch.bfloat16):
        model(x).float().square().mean().backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    assert True in carried
    with torch.autocast(device.type, torch.bfloat16):
        model(x).float().square().mean().backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))  # type: ignore[arg-type]
    assert set(seen.nagn) == set(sites.layers)


def test_what_cannot_carry_goes_torchs_way(carried: list[bool], device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(device)
    x = torch.randn(6, 3, device=device)
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    wanted = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    with riding.riding(model):
        got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        with torch.no_grad():
            model(x)
        part = nn.Linear(3, 8).to(device)(x).chunk(2, dim=1)[0]  # a view: torch refuses it in place, by any way
        model[1].inplace = True
        with pytest.raises(RuntimeError, match="view"):
            model[1](part).sum().backward()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert type(model[1]) is nn.ReLU


def test_nothing_is_left_behind_by_an_exception(carried: list[bool], device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(device)
    sites = fg.find_sites(model, torch.randn(6, 3, device=device))
    kinds = []

    def stopped(module: nn.Module, args: Any) -> None:
        kinds.append(type(model[1]))
        raise KeyError

    with (
        model[2].register_forward_pre_hook(stopped),
        pytest.raises(KeyError),
        fg.observe(model, sites, growth=False),
    ):
        model(torch.randn(6, 3, device=device))
    assert kinds != [nn.ReLU]
    assert type(model[1]) is nn.ReLU
    assert not watched(model)


def test_a_compiled_model_is_not_compiled_again(carried: list[bool], device: torch.device) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    from torch._dynamo.testing import CompileCounter

    model, counter = Own().to(device), CompileCounter()
    x = torch.randn(6, 3, device=device)
    sites = fg.find_sites(model, x)
    compiled = torch.compile(model, backend=counter)
    for _ in range(2):
        compiled(x).square().mean().backward()
        with fg.observe(compiled, sites, growth=False) as seen:
            compiled(x).square().mean().backward()
        assert carried == [False, True]
        carried.clear()
        assert set(seen.nagn) == set(sites.layers)
    assert counter.frame_count == 1
