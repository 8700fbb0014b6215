"""Methods that start from the gradient: attained norms, GradMaxOpt, TINY, zero-both."""

from __future__ import annotations

import math

import pytest
import torch
from how_cases import CASES, Case, grown_by, outputs, unchanged
from tolerances import tolerance
from torch import Tensor, nn

import fastgrow as fg
from fastgrow.how.gradmax_opt import GradMaxOpt


def _mlp(activation: nn.Module | None = None) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 5), activation or nn.ReLU(), nn.Linear(5, 7)).double()
    return model, torch.randn(64, 9).double(), torch.randn(64, 7).double()


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().sum(1).mean()


def _matrix(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """M by its definition."""
    output = model(x)
    (dz,) = torch.autograd.grad((output - y).square().sum(1).mean(), output)
    return dz.T @ x


def _new_gradient(model: nn.Sequential, x: Tensor, y: Tensor) -> float:
    """Squared norm of the gradient of the new weights."""
    model.zero_grad()
    _loss(model, x, y).backward()
    first, last = model[0].weight.grad, model[2].weight.grad
    assert first is not None
    assert last is not None
    return float(first[5:].square().sum() + last[:, 5:].square().sum())


def _grow(model: nn.Sequential, x: Tensor, y: Tensor, how: fg.how.How, units: int) -> fg.GrowthReport:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return grown_by(model, x, how, units, lambda: _loss(model, x, y), optimizer)


@pytest.mark.parametrize(
    ("norm", "units", "attained"),
    [
        ("fixed", 1, lambda s: s[0] ** 2),
        ("fixed", 3, lambda s: (s**2).sum()),  # equal columns of norm c: c^2 sum s_i^2
        ("sigma", 3, lambda s: 3 * (s**4).sum() / (s**2).sum()),  # s_i c / ||s||: c^2 sum s_i^4 / sum s_i^2, c^2 = 3
    ],
)
def test_attained_norms_of_gradmax(norm: str, units: int, attained: object) -> None:
    model, x, y = _mlp()
    singular = torch.linalg.svdvals(_matrix(model, x, y))[:units]
    c = 0.3 if norm == "fixed" else 0.3 * model[2].weight.norm(dim=0).mean().item()
    report = _grow(model, x, y, fg.how.GradMax(scale=0.3, norm=norm), units)
    wanted = c**2 * float(attained(singular))  # type: ignore[operator]
    float32 = tolerance(torch.float32, 5 * 7)  # mean norms of present units are taken in float32
    assert _new_gradient(model, x, y) == pytest.approx(wanted, rel=float32)
    assert report.sites[0].predicted_gain == pytest.approx(wanted, rel=float32)


@pytest.mark.parametrize(("tangent", "close"), [(True, 0.999), (False, 0.8)])
def test_gradmax_opt_stays_below_the_optimum_and_comes_close(tangent: bool, close: float) -> None:
    model, x, y = _mlp()
    best = 0.3**2 * float(torch.linalg.svdvals(_matrix(model, x, y))[0]) ** 2
    report = _grow(model, x, y, GradMaxOpt(scale=0.3, norm="fixed", tangent=tangent), 1)
    found = _new_gradient(model, x, y)
    assert close * best <= found <= best * (1 + 1e-12)
    assert report.sites[0].predicted_gain == pytest.approx(found, rel=1e-9)
    assert model[2].weight[:, 5].norm().item() == pytest.approx(0.3)


def test_gradmax_opt_matrix_projection_is_bounded_by_copies_of_the_first_direction() -> None:
    model, x, y = _mlp()
    best = 3 * 0.3**2 * float(torch.linalg.svdvals(_matrix(model, x, y))[0]) ** 2
    _grow(model, x, y, GradMaxOpt(scale=0.3, norm="fixed", rate=0.05, project="matrix"), 3)
    found = _new_gradient(model, x, y)
    assert found <= best * (1 + 1e-12)
    assert model[2].weight[:, 5:].norm().item() == pytest.approx(0.3 * math.sqrt(3))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid()], ids=["relu", "sigmoid"])
def test_inverse_form_climbs_and_keeps_the_function_for_any_activation(activation: nn.Module) -> None:
    gains = []
    for steps in (1, 60):
        model, x, y = _mlp(activation)
        before = outputs(model, x)
        report = _grow(model, x, y, GradMaxOpt("incoming", steps=steps, rate=0.05), 2)
        unchanged(outputs(model, x), before)
        assert not model[2].weight[:, 5:].any()
        found = _new_gradient(model, x, y)
        assert report.sites[0].predicted_gain == pytest.approx(found, rel=1e-9)
        gains.append(found)
    assert gains[1] > gains[0]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "how",
    [fg.how.ZeroBoth(), GradMaxOpt(steps=3), GradMaxOpt("incoming", steps=3), fg.how.TINY(project=False)],
    ids=["zero-both", "opt", "opt-incoming", "tiny"],
)
def test_function_stays(case: Case, how: fg.how.How, training: bool) -> None:
    model, x = case.build(training)
    before = outputs(model, x)
    target = torch.randn_like(before)
    closure = lambda: (model(x) - target).square().mean()  # noqa: E731
    grown_by(model, x, how, 2, closure)
    unchanged(outputs(model, x), before)


def test_zero_both_writes_ones() -> None:
    model, x, y = _mlp()
    _grow(model, x, y, fg.how.ZeroBoth(), 2)
    hidden = model[1](model[0](x))
    assert torch.equal(hidden[:, 5:], torch.ones(64, 2).double())
    _loss(model, x, y).backward()
    assert model[2].weight.grad is not None
    assert bool(model[2].weight.grad[:, 5:].any())
    plain = nn.Sequential(nn.Linear(9, 5, bias=False), nn.ReLU(), nn.Linear(5, 7)).double()
    with pytest.raises(fg.GrowthError, match="bias=True"):
        _grow(plain, x, y, fg.how.ZeroBoth(), 2)


def _natural(model: nn.Sequential, x: Tensor, y: Tensor, project: bool) -> Tensor:
    """TINY's matrix by its definition: residual gradient against inputs, whitened."""
    output = model(x)
    (dz,) = torch.autograd.grad((output - y).square().sum(1).mean(), output)
    if project:
        hidden = torch.cat([model[1](model[0](x)), torch.ones(len(x), 1).double()], 1).detach()
        dz = dz - hidden @ torch.linalg.lstsq(hidden, dz).solution
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    return dz.T @ x @ (vectors * values.rsqrt()) @ vectors.T


@pytest.mark.parametrize("project", [True, False])
def test_tiny_takes_the_leading_directions_of_the_whitened_residual(project: bool) -> None:
    model, x, y = _mlp()
    matrix, plain = _natural(model, x, y, project), _matrix(model, x, y)
    left, _, _ = torch.linalg.svd(matrix)
    report = _grow(model, x, y, fg.how.TINY(scale=0.3, norm="fixed", project=project), 2)
    columns = model[2].weight[:, 5:].detach() / 0.3
    assert float((left[:, :2].T @ columns).abs().diagonal().min()) == pytest.approx(1, abs=1e-6)
    wanted = 0.3**2 * float((columns.T @ plain).square().sum())
    assert _new_gradient(model, x, y) == pytest.approx(wanted, rel=1e-9)
    assert report.sites[0].predicted_gain == pytest.approx(wanted, rel=1e-9)


def test_tiny_with_an_amplitude_steps_along_the_functional_gradient() -> None:
    """The loss falls by a sum s_i^2 to first order: exact behind the identity, where the middle is linear."""
    model, x, y = _mlp(nn.Identity())
    amplitude = 1e-4
    gain = float(torch.linalg.svdvals(_natural(model, x, y, True))[:2].square().sum())
    before = _loss(model, x, y).item()
    _grow(model, x, y, fg.how.TINY(amplitude=amplitude), 2)
    assert (before - _loss(model, x, y).item()) / amplitude == pytest.approx(gain, rel=1e-2)


@pytest.mark.parametrize("amplitude", [0.0, 1e-2])
def test_tiny_starts_at_random_what_the_present_weights_leave_no_gradient_for(amplitude: float) -> None:
    model, x, y = _mlp()
    few, target = x[:8], y[:8]
    read = torch.cat([model[1](model[0](few)), torch.ones(8, 1)], 1)
    rank = 8 - int(torch.linalg.matrix_rank(read))  # of what is left of eight samples' gradients
    assert 2 <= rank <= 4
    before = model(x).detach()
    report = _grow(model, few, target, fg.how.TINY(amplitude=amplitude), rank + 2)
    assert report.sites[0].random_units == 2
    incoming, outgoing = model[0].weight[5:], model[2].weight[:, 5:]
    if amplitude:
        present = model[0].weight[:5].norm(dim=1).mean()
        torch.testing.assert_close(incoming[rank:].norm(dim=1), present.expand(2))
        assert not outgoing[:, rank:].count_nonzero()
        assert outgoing[:, :rank].norm(dim=0).min() > 0
    else:
        size = outgoing[:, 0].norm() ** 2
        torch.testing.assert_close(outgoing.T @ outgoing, size * torch.eye(rank + 2, dtype=torch.float64))
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-14)
        assert _new_gradient(model, few, target) > 0


def test_tiny_starts_all_at_random_where_nothing_is_left() -> None:
    model, x, y = _mlp()
    few, target = x[:5], y[:5]  # six present weights for five samples
    report = _grow(model, few, target, fg.how.TINY(), 2)
    assert report.sites[0].random_units == 2
    assert report.sites[0].predicted_gain is None  # their gradient is the matrix's that has been let go
    assert _new_gradient(model, few, target) > 0


def test_gains_of_tinys_random_units_are_those_of_their_gradient() -> None:
    model, x, y = _mlp()
    few, target = x[:5], y[:5]
    optimizer, sites = torch.optim.SGD(model.parameters(), lr=1.0), fg.find_sites(model, x)
    closure = lambda: _loss(model, few, target)  # noqa: E731
    report = fg.grow(
        model, {"0": 2}, fg.how.TINY(), sites=sites, optimizer=optimizer, closure=closure, measure_gain=True
    )
    assert report.sites[0].random_units == 2
    weights = _new_gradient(model, few, target)
    bias = model[0].bias.grad
    assert bias is not None
    wanted = weights + float(bias[5:].square().sum())
    assert report.sites[0].predicted_gain == pytest.approx(wanted, rel=1e-9)


def test_where_reads_the_natural_directions() -> None:
    model, x, y = _mlp()
    values = torch.linalg.svdvals(_natural(model, x, y, True))[:2]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    grower = fg.Grower(
        model,
        optimizer,
        example_inputs=x,
        when=fg.when.Every(1, times=1),
        where=fg.where.FirstOrderGain(2),
        how=fg.how.ZeroOutgoing(),
    )
    with grower.observe():
        _loss(model, x, y).backward()
    report = grower.step()
    assert report is not None
    gain = report.evidence["explanation"]["0"]["gain"]
    assert gain == pytest.approx(float(values.square().sum()), rel=1e-6)


def test_functional_relu_is_refused_where_units_would_be_dead() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(9, 5), nn.Linear(5, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    model, x = Functional(), torch.randn(8, 9)
    sites = fg.find_sites(model, x)
    for how in (GradMaxOpt(), fg.how.TINY()):
        with pytest.raises(fg.GrowthError, match="called as a function"):
            fg.grow(model, {"a": 1}, how, sites=sites, closure=lambda: model(x).square().mean())


@pytest.mark.parametrize(
    "how", [fg.how.GradMax(), fg.how.Random(), fg.how.TINY(), fg.how.GradMaxOpt()], ids=lambda how: how.name
)
@pytest.mark.parametrize("training", [True, False])
def test_outgoing_weights_behind_batch_norm(how: fg.how.How, training: bool) -> None:
    """In training mode sqrt(eps) smaller, for the norm blows units up to variance 1 after their first step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, eps=1e-4), nn.ReLU(), nn.Linear(8, 4)).train(training)
    x, y = torch.randn(64, 6), torch.randint(0, 4, (64,))
    sites = fg.find_sites(model, x)
    present = model[3].get_parameter("weight").detach().norm(dim=0).mean()

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    fg.grow(model, {"0": 2}, how, sites=sites, closure=loss)
    born = model[3].get_parameter("weight").detach()[:, 8:].norm(dim=0)
    wanted = 0.5 * float(present) * (1e-2 if training else 1.0)
    assert born.tolist() == pytest.approx([wanted, wanted], rel=1e-3)


def test_growing_behind_batch_norm_does_not_upset_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(256, 6)
    y = (x[:, :4] * x[:, 2:]).argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step() -> float:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    before = [step() for _ in range(100)][-1]
    sites = fg.find_sites(model, x)
    closure = lambda: nn.functional.cross_entropy(model(x), y)  # noqa: E731
    fg.grow(model, {"0": 8}, sites=sites, optimizer=optimizer, closure=closure)
    after = [step() for _ in range(30)]
    assert max(after) < 1.05 * before
    assert after[-1] < 0.9 * before


@pytest.mark.parametrize("relu", ["pairs", "epsilon"])
def test_small_incoming_weights_hold_their_biases(relu: str) -> None:
    """w and b of a unit are entries of one right singular vector of E[dz (h, 1)^T]."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c, self.b = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(nn.functional.relu(self.a(x) + self.c(x)))

    torch.manual_seed(0)
    model = Net().double()
    x, target = torch.randn(50, 4).double(), torch.randn(50, 3).double()
    before = model(x).detach()
    dz = 2 * (before - target) / target.numel()
    matrix = dz.T @ torch.cat([x, torch.ones(50, 1).double()], 1).repeat(1, 2)
    _, _, right = torch.linalg.svd(matrix)
    sites = fg.find_sites(model, x)
    how = fg.how.GradMax(bias=True, relu=relu)
    fg.grow(model, {"a": 2}, how, sites=sites, closure=lambda: (model(x) - target).square().mean())
    parts = [torch.cat([layer.weight[6:], layer.bias[6:, None]], 1) for layer in (model.a, model.c)]
    incoming = torch.cat(parts, 1).detach()
    incoming = incoming / incoming.norm(dim=1, keepdim=True)
    wanted = right[[0, 0] if relu == "pairs" else [0, 1]]
    assert (incoming * wanted).sum(1).abs().min() > 1 - 1e-12
    assert (model(x) - before).abs().max() < (1e-15 if relu == "pairs" else 1e-3)
