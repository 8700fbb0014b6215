"""`fg.grow`: the function kept, the gradient as large as it can be, everything else as it was."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from nets import Branching, Gated, Plain, Residual, classification, image_batch, incoming_gradients, probe
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg


def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    if name == "gated":
        x = torch.randn(4, 5, 3, dtype=torch.float64)
        return Gated().double(), x, torch.arange(4) % 3
    x, y = image_batch()
    return {"plain": Plain, "residual": Residual, "branching": Branching}[name]().double(), x, y


PROBED = [
    ("plain", "conv1"),
    ("plain", "conv2"),
    ("plain", "fc1"),
    ("residual", "stem"),
    ("residual", "a1"),
    ("residual", "down"),
    ("branching", "left"),
    ("branching", "right"),
    ("branching", "up"),
]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("name", "site_name"), PROBED)
def test_attained_gradient_is_the_optimum(name: str, site_name: str, mode: str) -> None:
    """Against the matrix that brute-force probing of one new unit gives, in float64."""
    model, x, y = case(name)
    model.train(mode == "train")
    sites = fg.find_sites(model, x)
    site = sites[site_name]
    loss_of = lambda m: F.cross_entropy(m(x), y)  # noqa: E731
    truth = torch.linalg.svdvals(probe(model, sites, site, loss_of))
    old_width, units = sites.width(model, site), 2
    before = loss_of(model).item()
    report = fg.grow(
        model, {site_name: units}, fg.how.GradMax(norm="fixed", scale=0.3), sites=sites, closure=lambda: loss_of(model)
    )
    assert loss_of(model).item() == pytest.approx(before, rel=1e-12)
    model.zero_grad()
    loss_of(model).backward()
    attained = incoming_gradients(model, sites, site, old_width).norm().item()
    optimum = 0.3 * truth[:units].norm().item()
    assert optimum > 0
    assert 0.999 * optimum <= attained <= optimum * (1 + 1e-9)
    assert report.sites[0].captured is not None
    assert report.sites[0].captured >= 0.999


@pytest.mark.parametrize(
    ("name", "site_name", "units"),
    [("gated", "qkv", 1), ("gated", "gate_up", 3), ("branching", "grouped", 4), ("branching", "after", 2)],
)
def test_units_of_several_channels_keep_the_function_and_learn(name: str, site_name: str, units: int) -> None:
    model, x, y = case(name)
    sites = fg.find_sites(model, x)
    site, old_width = sites[site_name], sites.width(model, sites[site_name])
    loss_of = classification(model, x, y)
    before = loss_of().item()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    report = fg.grow(model, {site_name: units}, sites=sites, optimizer=optimizer, closure=loss_of)
    assert loss_of().item() == pytest.approx(before, rel=1e-12)
    model.zero_grad()
    loss_of().backward()
    gradient = incoming_gradients(model, sites, site, old_width)
    assert report.sites[0].predicted_gain is not None
    free = gradient if not site.gates else gradient[:, gradient.abs().sum(0) > 0]
    assert free.square().sum().item() == pytest.approx(report.sites[0].predicted_gain, rel=1e-6)
    assert (gradient.norm(dim=1) > 0).all()
    optimizer.step()
    assert loss_of().item() < before


class _ReGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.gate(x)) * self.up(x))


def test_a_gates_relu_needs_no_pairs() -> None:
    torch.manual_seed(0)
    model, x, y = _ReGLU().double(), torch.randn(9, 4).double(), torch.randint(3, (9,))
    sites, loss_of = fg.find_sites(model, x), classification(model, x, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    report = fg.grow(model, {"gate": 3}, sites=sites, optimizer=optimizer, closure=loss_of)
    loss_of().backward()
    assert report.sites[0].predicted_gain == pytest.approx(model.up.weight.grad[6:].square().sum().item(), rel=1e-6)
    for relu in ("pairs", "epsilon"):
        with pytest.raises(fg.GrowthError, match="random gate"):
            fg.grow(model, {"gate": 2}, fg.how.GradMax(relu=relu), sites=sites, closure=loss_of)


@pytest.mark.parametrize("name", ["plain", "residual", "branching", "gated"])
@pytest.mark.parametrize("how", [fg.how.GradMax(), fg.how.Random(), fg.how.ZeroOutgoing()], ids=lambda how: how.name)
def test_all_sites_at_once_keep_the_output_in_float32(name: str, how: fg.how.How) -> None:
    model, x, y = case(name)
    model, x = model.float(), x.float()
    sites = fg.find_sites(model, x)
    model.eval()
    before = model(x)
    model.train()
    even = {site.name: 2 * site.multiple for site in sites}
    fg.grow(model, even, how, sites=sites, closure=classification(model, x, y))
    assert {s.name: sites.widths(model)[s.name] for s in sites} == {s.name: s.width + even[s.name] for s in sites}
    model.eval()
    scale = before.abs().max().item()
    assert (model(x) - before).abs().max().item() <= 64 * torch.finfo(torch.float32).eps * scale
    model.train()
    F.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_grown_attributes_and_norms() -> None:
    model, x, y = case("residual")
    fg.grow(model, {"stem": 2, "a1": 1}, sites=fg.find_sites(model, x), closure=classification(model, x, y))
    assert (model.stem.out_channels, model.a1.in_channels, model.a1.out_channels, model.bn1.num_features) == (
        6,
        6,
        4,
        4,
    )
    assert model.bn0.weight[4:].tolist() == [1.0, 1.0]
    assert model.bn0.running_var[4:].tolist() == [1.0, 1.0]
    assert model.bn0.bias[4:].tolist() == [0.0, 0.0]


def test_relu_modules_are_swapped_and_given_back() -> None:
    model, x, y = case("residual")
    report = fg.grow(model, {"stem": 2}, sites=fg.find_sites(model, x), closure=classification(model, x, y))
    assert report.swapped == ["relu"]
    assert type(model.relu) is fg.nn.ReLU
    before = model.eval()(x)
    fg.finalize(model)
    assert type(model.relu) is nn.ReLU
    assert torch.equal(model(x), before)
    assert not any("fastgrow" in key for module in model.modules() for key in vars(module))


class Functional(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(4, 5, 3, stride=2)
        self.fc = nn.Linear(5 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(x)))
        return self.fc(F.relu(self.conv2(x)).flatten(1))


@pytest.mark.parametrize("norm", [False, True])
def test_functional_relu_grows_in_signed_pairs(norm: bool) -> None:
    torch.manual_seed(1)
    model = Functional(norm).double()
    x, y = image_batch()
    sites, loss_of = fg.find_sites(model, x), classification(model, x, y)
    before = loss_of().item()
    with pytest.raises(fg.GrowthError, match="signed pairs: ask for an even number"):
        fg.grow(model, {"conv1": 3}, sites=sites, closure=loss_of)
    with pytest.raises(fg.GrowthError, match="called as a function"):
        fg.grow(model, {"conv1": 2}, fg.how.GradMax(relu="swap"), sites=sites, closure=loss_of)
    fg.grow(model, {"conv1": 4, "conv2": 2}, sites=sites, closure=loss_of)
    assert loss_of().item() == pytest.approx(before, rel=1e-9)
    outgoing = model.conv2.weight[:5, 4:]
    assert torch.equal(outgoing[:, 0::2], -outgoing[:, 1::2])
    loss_of().backward()
    gradients = incoming_gradients(model, sites, sites["conv1"], 4).norm(dim=1)
    assert (gradients > 1e-3 * gradients.max()).all()


@pytest.mark.parametrize("relu", ["pairs", "epsilon"])
def test_more_signed_units_than_the_rank_are_random_of_the_same_norm(relu: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5)).double()
    x, y = torch.randn(16, 3, dtype=torch.float64), torch.randn(16, 5, dtype=torch.float64)
    before = model(x).detach()
    units, known = (10, 6) if relu == "pairs" else (5, 3)
    report = fg.grow(model, {"0": units}, fg.how.GradMax(relu=relu), closure=lambda: (model(x) - y).square().mean())
    assert report.sites[0].random_units == units - known
    incoming, outgoing = model[0].weight[4:].norm(dim=1), model[2].weight[:, 4:].norm(dim=0)
    torch.testing.assert_close(incoming, incoming[:1].expand(units))
    torch.testing.assert_close(outgoing, outgoing[:1].expand(units))
    columns = model[2].weight[:, 4 :: 2 if relu == "pairs" else 1] / outgoing[0]
    torch.testing.assert_close(columns[:, 3:].T @ columns, torch.eye(5, dtype=torch.float64)[3:])
    assert (model(x) - before).abs().max() < (1e-12 if relu == "pairs" else 1e-2)


def test_epsilon_start_is_alive_and_nearly_keeps_the_output() -> None:
    torch.manual_seed(1)
    model = Functional().double()
    x, y = image_batch()
    sites, loss_of = fg.find_sites(model, x), classification(model, x, y)
    before = loss_of().item()
    fg.grow(model, {"conv1": 3}, fg.how.GradMax(relu="epsilon", epsilon=1e-4), sites=sites, closure=loss_of)
    after = loss_of().item()
    assert after != before
    assert after == pytest.approx(before, abs=1e-3)
    loss_of().backward()
    assert (incoming_gradients(model, sites, sites["conv1"], 4).norm(dim=1) > 0).all()


def test_bias_counts_when_asked() -> None:
    model, x, y = case("plain")
    sites, loss_of = fg.find_sites(model, x), classification(model, x, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    report = fg.grow(model, {"fc1": 2}, fg.how.GradMax(bias=True), sites=sites, optimizer=optimizer, closure=loss_of)
    loss_of().backward()
    assert model.fc1.weight.grad is not None
    assert model.fc1.bias.grad is not None
    attained = model.fc1.weight.grad[7:].square().sum() + model.fc1.bias.grad[7:].square().sum()
    assert attained.item() == pytest.approx(report.sites[0].predicted_gain, rel=1e-9)


def test_more_units_than_the_rank_are_random_of_the_same_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    x = torch.randn(16, 3, dtype=torch.float64)
    report = fg.grow(model, {"0": 7}, closure=lambda: model(x).square().mean())
    assert report.sites[0].random_units == 7 - 3
    norms = model[2].weight[:, 4:].norm(dim=0)
    torch.testing.assert_close(norms, norms[:1].expand(7))
    columns = model[2].weight[:, 4:9]
    torch.testing.assert_close(columns.T @ columns, torch.eye(5, dtype=torch.float64) * norms[0] ** 2)


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=1e-3),
        lambda p: torch.optim.RMSprop(p, lr=1e-3),
    ],
    ids=["sgd", "adamw", "rmsprop"],
)
def test_optimizer_state_goes_on(build: object) -> None:
    model, x, y = case("residual")
    sites, loss_of = fg.find_sites(model, x), classification(model, x, y)
    optimizer = build(model.parameters())  # type: ignore[operator]
    for _ in range(3):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()
    old = {name: p for name, p in model.named_parameters()}
    kept = {name: {k: copy.deepcopy(v) for k, v in optimizer.state[p].items()} for name, p in old.items()}
    fg.grow(model, {"stem": 2, "a1": 1}, sites=sites, optimizer=optimizer, closure=loss_of)
    parameters = dict(model.named_parameters())
    assert {id(p) for p in parameters.values()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert set(optimizer.state) == set(parameters.values())
    for name, state in kept.items():
        for key, value in state.items():
            new = optimizer.state[parameters[name]][key]
            if torch.is_tensor(value) and value.dim():
                block = tuple(slice(0, extent) for extent in value.shape)
                assert torch.equal(new[block], value), (name, key)
                rest = new.clone()
                rest[block] = 0
                assert not rest.any(), (name, key)
            else:
                assert torch.equal(torch.as_tensor(new), torch.as_tensor(value))
    optimizer.zero_grad()
    loss_of().backward()
    optimizer.step()


def test_the_closure_leaves_no_trace() -> None:
    model, x, y = case("residual")
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    gradient = model.down.weight.grad
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    seed = torch.random.get_rng_state()
    calls = []

    def closure() -> Tensor:
        calls.append(torch.rand(()))
        return F.cross_entropy(model(x), y)

    sites = fg.find_sites(model, x)
    fg.grow(model, {"a1": 1}, sites=sites, closure=closure)
    assert len(calls) == 1
    assert torch.equal(model.stem.weight.grad, torch.ones_like(model.stem.weight))
    assert model.down.weight.grad is gradient
    for name, value in model.named_buffers():
        if "bn1" not in name:
            assert torch.equal(value, buffers[name]), name
    assert torch.equal(seed, torch.random.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[object]:
    return [
        [(n, id(p), p.detach().clone()) for n, p in model.named_parameters()],
        [(n, id(b), b.clone()) for n, b in model.named_buffers()],
        [type(m) for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [[id(p) for p in g["params"]] for g in optimizer.param_groups],
    ]


def same(first: object, second: object) -> bool:
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))  # type: ignore[arg-type]
    return torch.equal(first, second) if isinstance(first, Tensor) else first == second  # type: ignore[arg-type]


class Boom(Exception):
    pass


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({"nowhere": 2}, "no site is named 'nowhere'"),
        ({"head": 2}, "output"),
        ({"stem": 0}, "wanted an integer of at least 1"),
        ({"stem": -1}, "wanted an integer of at least 1"),
        ({"stem": 1.5}, "wanted an integer of at least 1"),
        ({"stem": 1, "head": 1}, "output"),
        ([("stem", 1)], "wanted a mapping"),
    ],
)
def test_bad_requests_change_nothing(units: object, message: str) -> None:
    model, x, y = case("residual")
    optimizer = torch.optim.Adam(model.parameters())
    sites, before = fg.find_sites(model, x), snapshot(model, optimizer)
    with pytest.raises(fg.GrowthError, match=message):
        fg.grow(model, units, sites=sites, optimizer=optimizer, closure=classification(model, x, y))  # type: ignore[arg-type]
    assert same(before, snapshot(model, optimizer))


def test_bad_closures_change_nothing() -> None:
    model, x, y = case("residual")
    optimizer = torch.optim.Adam(model.parameters())
    sites, before = fg.find_sites(model, x), snapshot(model, optimizer)

    def boom() -> Tensor:
        model(x)
        raise Boom

    def overflowing() -> Tensor:
        return F.cross_entropy(model(x) * float("inf"), y)

    for closure, error, message in (
        (boom, Boom, ""),
        (overflowing, fg.GrowthError, "layer .*not finite"),
        (lambda: model(x), fg.GrowthError, "wanted the loss"),
        (lambda: F.cross_entropy(model(x), y).detach(), fg.GrowthError, "wanted the loss"),
        (None, fg.GrowthError, "give closure="),
    ):
        with pytest.raises(error, match=message):
            fg.grow(model, {"stem": 1}, sites=sites, optimizer=optimizer, closure=closure)  # type: ignore[arg-type]
        assert same(before, snapshot(model, optimizer))


def test_without_sites_they_are_found_from_the_closure() -> None:
    model, x, y = case("plain")
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        return F.cross_entropy(model(x), y)

    fg.grow(model, {"conv1": 2}, closure=closure)
    assert model.conv1.out_channels == 6
    assert len(calls) == 2
    fg.grow(model, {"conv1": 1}, closure=closure)
    assert model.conv1.out_channels == 7


def test_frozen_parameters_stay_frozen_and_grow() -> None:
    model, x, y = case("plain")
    model.conv1.weight.requires_grad_(False)
    fg.grow(model, {"conv1": 2}, sites=fg.find_sites(model, x), closure=classification(model, x, y))
    assert model.conv1.weight.shape[0] == 6
    assert not model.conv1.weight.requires_grad


def test_layernorm_streams_are_refused_by_name() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.head = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.embed(x)))

    model, x = Stream(), torch.randn(4, 3)
    sites = fg.find_sites(model, x)
    assert sites["embed"].multiple == 8
    with pytest.raises(fg.GrowthError, match="'norm' \\(LayerNorm\\) mixes its channels"):
        fg.grow(model, {"embed": 8}, sites=sites, closure=lambda: model(x).square().mean())
    with pytest.raises(fg.GrowthError, match="multiples of 8"):
        fg.grow(model, {"embed": 3}, sites=sites, closure=lambda: model(x).square().mean())


def test_activation_that_is_not_zero_at_zero_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))
    x = torch.randn(8, 3)
    with pytest.raises(fg.GrowthError, match="'0'.*sigmoid"):
        fg.grow(model, {"0": 2}, closure=lambda: model(x).square().mean())
    model[1] = nn.ReLU()
    squared = nn.Sequential(model[0], Squared(), model[2])
    with pytest.raises(fg.GrowthError, match="derivative 0"):
        fg.grow(squared, {"0": 2}, closure=lambda: squared(x).square().mean())


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


def test_growth_again_and_again_in_a_chain_of_biased_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())))
    x = torch.randn(4, 3, 6, 6)
    sites = fg.find_sites(model, x)
    for _ in range(3):
        before = model(x)
        fg.grow(model, {site.name: 1 for site in sites}, sites=sites, closure=lambda: model(x).square().mean())
        torch.testing.assert_close(model(x), before)
    assert model[4].weight.shape == (6, 6, 3, 3)


def test_scaled_loss_does_not_change_the_directions() -> None:
    model, x, y = case("plain")
    twin = copy.deepcopy(model)
    sites = fg.find_sites(model, x)
    fg.grow(model, {"conv1": 2}, sites=sites, closure=classification(model, x, y))
    fg.grow(twin, {"conv1": 2}, sites=sites, closure=lambda: 1e-9 * F.cross_entropy(twin(x), y))
    torch.testing.assert_close(model.conv2.weight, twin.conv2.weight)


def test_dry_run() -> None:
    model, x, _ = case("residual")
    sites = fg.find_sites(model, x)
    before = sum(p.numel() for p in model.parameters())
    planned = fg.plan(model, {"stem": 2, "a1": 3}, sites=sites)
    assert planned.widths == {"stem": (4, 6), "a1": (3, 6)}
    assert planned.parameters[0] == before
    assert planned.flops[1] > planned.flops[0]
    assert planned.memory[1] > planned.memory[0]
    fg.grow(model, {"stem": 2, "a1": 3}, fg.how.ZeroOutgoing(), sites=sites)
    assert planned.parameters[1] == sum(p.numel() for p in model.parameters())
    refused = fg.plan(model, {"stem": 2, "head": 1, "nowhere": 1}, sites=sites)
    assert set(refused.refused) == {"head", "nowhere"}
    assert set(refused.widths) == {"stem"}


def test_no_warnings() -> None:
    model, x, y = case("plain")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fg.grow(model, {"conv1": 1}, sites=fg.find_sites(model, x), closure=classification(model, x, y))


def test_the_padding_row_of_an_embedding_is_not_counted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 3)).double()
    x = torch.randint(0, 7, (6, 5))
    assert (x == 0).any()
    target = torch.randn(6, 5, 3).double()

    def closure() -> Tensor:
        return F.mse_loss(model(x), target)

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    report = fg.grow(model, {"0": 2}, sites=fg.find_sites(model, x), optimizer=optimizer, closure=closure)
    closure().backward()
    assert report.predicted_gain == pytest.approx(model[0].weight.grad[:, 4:].square().sum().item(), rel=1e-10)


def test_a_plan_counts_the_memory_of_buffers_and_of_each_dtype() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Tanh())
    model.append(nn.Conv2d(6, 2, 1))
    sites = fg.find_sites(model, torch.randn(2, 3, 8, 8))
    model[5].bfloat16()

    def held() -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))

    plan = fg.plan(model, {"0": 4, "3": 2}, sites=sites)
    assert plan.memory[0] == held()
    fg.grow(model, {"0": 4, "3": 2}, fg.how.Random(), sites=sites)
    assert plan.memory[1] == held()
