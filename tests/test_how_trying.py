"""Methods that split units or try them: Splitting, Firefly, and the rehearsal they run in."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from how_cases import CASES, Case, grown_by, outputs
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg
from fastgrow.how.splitting import smallest_eigenpairs


def _mlp(activation: nn.Module) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), activation, nn.Linear(3, 2)).double()
    return model, torch.randn(32, 4).double(), torch.randn(32, 2).double()


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().sum(1).mean()


def _splitting_matrix(model: nn.Sequential, x: Tensor, y: Tensor, unit: int, curve: object) -> Tensor:
    """E[dL/dsigma sigma'' h h^T] by its definition."""
    z = model[0](x).detach()
    output = model(x).detach().requires_grad_()
    (dz,) = torch.autograd.grad((output - y).square().sum(1).mean(), output)
    weight = (dz @ model[2].weight.detach())[:, unit] * curve(z[:, unit])  # type: ignore[operator]
    return (x * weight[:, None]).T @ x


def _tanh_curve(z: Tensor) -> Tensor:
    return -2 * torch.tanh(z) * (1 - torch.tanh(z) ** 2)


def _softplus_curve(z: Tensor) -> Tensor:
    return 10 * torch.sigmoid(10 * z) * torch.sigmoid(-10 * z)


@pytest.mark.parametrize(
    ("activation", "curve"), [(nn.Tanh(), _tanh_curve), (nn.ReLU(), _softplus_curve)], ids=["tanh", "relu"]
)
def test_the_units_with_the_smallest_eigenvalues_split_along_the_eigenvectors(
    activation: nn.Module, curve: object
) -> None:
    model, x, y = _mlp(activation)
    pairs = []
    for unit in range(3):
        values, vectors = torch.linalg.eigh(_splitting_matrix(model, x, y, unit, curve))
        pairs.append((float(values[0]), unit, vectors[:, 0]))
    value, unit, vector = min(pairs, key=lambda pair: pair[0])
    old, mean = model[0].weight.detach().clone(), model[0].weight.norm(dim=1).mean().item()
    out = model[2].weight.detach().clone()
    grown_by(model, x, fg.how.Splitting(epsilon=1e-2), 1, lambda: _loss(model, x, y))
    new = model[0].weight.detach()
    move = (new[unit] - new[3]) / 2
    assert move.norm().item() == pytest.approx(1e-2 * mean, rel=1e-6)
    assert float((move @ vector).abs() / move.norm()) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close((new[unit] + new[3]) / 2, old[unit])
    torch.testing.assert_close(model[2].weight[:, unit].detach(), out[:, unit] / 2)
    torch.testing.assert_close(model[2].weight[:, 3].detach(), out[:, unit] / 2)
    assert value < 0


def test_splitting_changes_the_loss_by_half_epsilon_squared_times_the_eigenvalue() -> None:
    model, x, y = _mlp(nn.Tanh())
    values = [float(torch.linalg.eigvalsh(_splitting_matrix(model, x, y, u, _tanh_curve))[0]) for u in range(3)]
    step = 1e-3 * float(model[0].weight.norm(dim=1).mean())
    before = _loss(model, x, y).item()
    grown_by(model, x, fg.how.Splitting(epsilon=1e-3), 2, lambda: _loss(model, x, y))
    wanted = step**2 / 2 * sum(sorted(values)[:2])
    assert _loss(model, x, y).item() - before == pytest.approx(wanted, rel=1e-3)


def test_lanczos_finds_every_units_smallest_eigenpair() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(5, 40, 40).double()
    matrices = matrices + matrices.mT
    matrices[1] = 0
    start = torch.randn(40, 5).double()
    values, vectors = smallest_eigenpairs(lambda v: torch.einsum("unm,mu->nu", matrices, v), start, 40)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrices)[:, 0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(vectors.norm(dim=0), torch.ones(5).double())
    residual = torch.einsum("unm,mu->nu", matrices, vectors) - values * vectors
    assert float(residual.norm(dim=0).max()) < 1e-6


def test_more_splits_than_units_and_flat_middles_are_refused() -> None:
    model, x, y = _mlp(nn.Tanh())
    with pytest.raises(fg.GrowthError, match="at most once"):
        grown_by(model, x, fg.how.Splitting(), 4, lambda: _loss(model, x, y))
    model, x, y = _mlp(nn.Identity())
    with pytest.raises(fg.GrowthError, match="does not curve"):
        grown_by(model, x, fg.how.Splitting(), 1, lambda: _loss(model, x, y))
    assert model[0].out_features == 3


def test_firefly_lowers_the_loss_over_the_new_weights_alone() -> None:
    changes = {}
    for steps in (1, 40):
        model, x, y = _mlp(nn.ReLU())
        old = copy.deepcopy(model)
        before = _loss(model, x, y).item()
        grown_by(model, x, fg.how.Firefly(steps=steps, epsilon=1e-2), 2, partial(_loss, model, x, y))
        changes[steps] = _loss(model, x, y).item() - before
        assert torch.equal(model[0].weight[:3], old[0].weight)
        assert torch.equal(model[2].weight[:, :3], old[2].weight)
        torch.testing.assert_close(model[2].weight[:, 3:].norm(dim=0).detach(), torch.full((2,), 1e-2).double())
        norm = 0.5 * float(old[0].weight.norm(dim=1).mean())
        incoming = torch.cat([model[0].weight[3:], model[0].bias[3:, None]], 1).detach()  # biases count
        torch.testing.assert_close(incoming.norm(dim=1), torch.full((2,), norm).double(), rtol=1e-6, atol=0)
        assert bool((incoming[:, -1] != 0).all())
    assert changes[40] < changes[1]
    assert changes[40] < 0


def test_full_firefly_keeps_the_best_candidates() -> None:
    model, x, y = _mlp(nn.Tanh())
    before = _loss(model, x, y).item()
    grown_by(model, x, fg.how.Firefly("full", steps=40, epsilon=1e-2, split_epsilon=0.1), 3, lambda: _loss(model, x, y))
    assert model[0].out_features == 6
    assert _loss(model, x, y).item() < before


def test_a_policy_asks_for_no_more_splits_than_there_are_units() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 4))
    x, y = torch.randn(20, 3), torch.randn(20, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grower = fg.Grower(
        model,
        optimizer,
        example_inputs=x,
        when=fg.when.Every(1, times=2),
        where=fg.where.RoundRobin(5),
        how=fg.how.Splitting(rounds=2),
    )
    for _ in range(2):
        with grower.observe():
            _loss(model, x, y).backward()
        grower.step()
    assert [report.sites[0].new_width for report in grower.history] == [4, 8]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "how",
    [fg.how.Splitting(epsilon=1e-4), fg.how.Firefly(steps=2), fg.how.Firefly("full", steps=2, split_epsilon=1e-4)],
    ids=["splitting", "firefly", "firefly-full"],
)
def test_function_stays_nearly(case: Case, how: fg.how.How, training: bool) -> None:
    model, x = case.build(training)
    before = outputs(model, x)
    target = torch.randn_like(before)
    grown_by(model, x, how, 2, lambda: (model(x) - target).square().mean())
    change = float((outputs(model, x) - before).abs().max() / before.abs().max())
    assert change < 5e-3  # epsilon 1e-4, through layers that batch norm may scale up


def test_a_rehearsal_leaves_nothing_behind() -> None:
    model, x = CASES[1].build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.mse_loss(model(x), torch.zeros(8, 3).double()).backward()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    rng = torch.random.get_rng_state()
    sites = fg.find_sites(model, x)
    calls = 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("the data ran out")
        return model(x).square().mean()

    with pytest.raises(RuntimeError, match="the data ran out"):
        fg.grow(model, {sites[0].name: 2}, fg.how.Firefly(steps=5), sites=sites, closure=failing, optimizer=optimizer)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == identities
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert all(torch.equal(parameter.grad, gradients[name]) for name, parameter in model.named_parameters())
    assert model[0].out_channels == 5
    assert torch.equal(torch.random.get_rng_state(), rng)


def test_methods_that_need_the_loss_say_so() -> None:
    model, x = CASES[0].build()
    sites = fg.find_sites(model, x)
    with pytest.raises(fg.GrowthError, match="give closure="):
        fg.grow(model, {"0": 2}, fg.how.Firefly(), sites=sites)
    grower = fg.Grower(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        sites=sites,
        when=fg.when.Every(1, times=1),
        where=fg.where.Everywhere(units=2),
        how=fg.how.Firefly(steps=2),
    )
    with grower.observe():
        model(x).square().mean().backward()
    report = grower.step(closure=lambda: model(x).square().mean())
    assert report is not None
    assert [site.new_width for site in report.sites] == [7, 9]
