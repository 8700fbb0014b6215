"""Stacks by every growth method: each member grows as it would alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from stack_cases import BATCH, HIDDEN, INS, MEMBERS, OUTS, Stack, batch, each_loss, member, net
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg

HOWS: dict[str, Callable[[], fg.how.How]] = {
    "mean": lambda: fg.how.GradMax(scale=0.7),
    "fixed": lambda: fg.how.GradMax(norm="fixed"),
    "sigma": lambda: fg.how.GradMax(norm="sigma"),
    "bias": lambda: fg.how.GradMax(bias=True),
}


@pytest.mark.parametrize("how", list(HOWS))
@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU], ids=lambda act: act.__name__)
def test_gradmax_grows_each_member_as_alone(act: type[nn.Module], how: str) -> None:
    """Growing and training: the same losses, member by member, as networks of their own."""
    model, (x, y) = net("baddbmm", act()), batch()
    alone = [member(model, number) for number in range(MEMBERS)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    report = fg.grow(
        model,
        {"0": 2},
        HOWS[how](),
        sites=fg.find_sites(model, x),
        optimizer=optimizer,
        closure=lambda: each_loss(model(x), y).sum(),
    )
    assert report.sites[0].captured == 1.0
    curve = _trained(optimizer, lambda: each_loss(model(x), y))
    gains = 0.0
    for number, single in enumerate(alone):
        own = torch.optim.SGD(single.parameters(), lr=0.1, momentum=0.9)

        def losses(single: nn.Module = single, number: int = number) -> Tensor:
            return each_loss(single(x[number])[None], y[number][None])

        grown = fg.grow(single, {"0": 2}, HOWS[how](), optimizer=own, closure=lambda f=losses: f().sum())
        gains += grown.sites[0].predicted_gain or 0.0
        assert_close(curve[:, number], _trained(own, losses)[:, 0], torch.float64, 20 * BATCH * HIDDEN)
    assert report.sites[0].predicted_gain == pytest.approx(gains, rel=1e-12)


def _trained(optimizer: torch.optim.Optimizer, losses: Callable[[], Tensor], steps: int = 20) -> Tensor:
    """(steps, members)"""
    curve = []
    for _ in range(steps):
        optimizer.zero_grad()
        now = losses()
        now.sum().backward()
        optimizer.step()
        curve.append(now.detach())
    return torch.stack(curve)


@pytest.mark.parametrize("form", ["outgoing", "incoming"])
@pytest.mark.parametrize("project", ["columns", "matrix"])
@pytest.mark.parametrize("tangent", [False, True])
def test_gradmax_opt_climbs_in_each_member_as_alone(
    form: str, project: str, tangent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (x, y) = net("baddbmm"), batch()
    alone = [member(model, number) for number in range(MEMBERS)]
    how = fg.how.GradMaxOpt(form, steps=20, project=project, tangent=tangent)
    length = OUTS if form == "outgoing" else INS
    drawn = torch.randn(length, MEMBERS, 2, dtype=torch.float64)
    monkeypatch.setattr("fastgrow.how.gradmax_opt.torch.randn", lambda *shape, **kw: drawn.reshape(shape))
    fg.grow(model, {"0": 2}, how, sites=fg.find_sites(model, x), closure=lambda: each_loss(model(x), y).sum())
    for number, single in enumerate(alone):
        own = drawn[:, number]
        monkeypatch.setattr("fastgrow.how.gradmax_opt.torch.randn", lambda *shape, own=own, **kw: own.reshape(shape))
        fg.grow(
            single,
            {"0": 2},
            how,
            closure=lambda single=single, number=number: F.mse_loss(single(x[number]), y[number]),
        )
        grown = member(model, number)
        for at in (0, 2):
            assert_close(grown[at].weight, single[at].weight, torch.float64, 20 * BATCH * HIDDEN)


@pytest.mark.parametrize("norm", ["mean", "fixed"])
def test_random_takes_each_members_own_norm(norm: str) -> None:
    model, (x, _) = net("baddbmm"), batch()
    with torch.no_grad():
        model[2].weight.mul_(torch.tensor([1.0, 5.0, 0.1]).double().reshape(-1, 1, 1))
    present = model[2].weight.detach().norm(dim=2).mean(1)  # (members,)
    fg.grow(model, {"0": 4}, fg.how.Random(scale=0.3, norm=norm), sites=fg.find_sites(model, x))
    new = model[2].weight.detach()[:, HIDDEN:].norm(dim=2)  # (members, 4)
    wanted = 0.3 * present if norm == "mean" else torch.full_like(present, 0.3)
    torch.testing.assert_close(new, wanted[:, None].expand(-1, 4), rtol=1e-6, atol=0)


def test_zero_outgoing_draws_by_a_members_fan_in() -> None:
    torch.manual_seed(0)
    model, (x, _) = net("baddbmm"), batch()
    fg.grow(model, {"0": 2000}, fg.how.ZeroOutgoing(), sites=fg.find_sites(model, x))
    new = model[0].weight.detach()[:, :, HIDDEN:]
    # the deviation of the estimate from n draws is 1 / sqrt(2 n) of the value: six of them
    assert new.std().item() == pytest.approx((2 / INS) ** 0.5, rel=6 / (2 * new.numel()) ** 0.5)
    assert not model[2].weight.detach()[:, HIDDEN:].any()


class Functional(nn.Module):
    """ReLUs that are function calls: units come as signed pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Stack(INS, HIDDEN, "baddbmm"), Stack(HIDDEN, OUTS, "baddbmm")

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def test_pairs_behind_a_function_call_live_in_every_member() -> None:
    torch.manual_seed(4)
    model, (x, y) = Functional().double(), batch()
    sites = fg.find_sites(model, x)
    before = model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    report = fg.grow(model, {"a": 4}, sites=sites, optimizer=optimizer, closure=lambda: each_loss(model(x), y).sum())
    assert_close(model(x), before, torch.float64, HIDDEN)
    model.zero_grad()
    each_loss(model(x), y).sum().backward()
    assert model.a.weight.grad is not None
    new = model.a.weight.grad[:, :, HIDDEN:]
    assert (new.norm(dim=1) > 0).all()
    assert report.sites[0].predicted_gain == pytest.approx(new.square().sum().item(), rel=1e-6)
    # each unit attains at least 0.99 of its mask's optimum, in each member by itself
    hidden = torch.relu(model.a(x))[..., HIDDEN:]
    output = model(x)
    (dz,) = torch.autograd.grad(each_loss(output, y).sum(), output)
    norms = model.b.weight.detach()[:, HIDDEN:].norm(dim=2)
    for number in range(MEMBERS):
        for unit in range(4):
            mask = (hidden[number, :, unit] > 0).double()[:, None]
            best = torch.linalg.matrix_norm(dz[number].T @ (x[number] * mask), 2)
            assert new[number, :, unit].norm() >= 0.99 * norms[number, unit] * best


@pytest.mark.parametrize(
    "how",
    [fg.how.Net2Net(), fg.how.Sparkling(warmup=0), fg.how.Firefly(), fg.how.ZeroBoth()],
    ids=lambda how: how.name,
)
def test_other_methods_grow_stacks(how: fg.how.How) -> None:
    torch.manual_seed(5)
    model, (x, y) = net("baddbmm"), batch()
    before = model(x).detach()
    fg.grow(model, {"0": 2}, how, sites=fg.find_sites(model, x), closure=lambda: each_loss(model(x), y).sum())
    assert model[0].weight.shape == (MEMBERS, INS, HIDDEN + 2)
    if how.name in ("Net2Net", "ZeroBoth"):
        assert_close(model(x), before, torch.float64, 2 * HIDDEN, scale=before.abs().max().item() * HIDDEN)


@pytest.mark.parametrize(
    "how", [fg.how.TINY(), fg.how.Splitting(), fg.how.VarianceTransfer()], ids=lambda how: how.name
)
def test_methods_of_single_fan_ins_refuse_stacks_by_name(how: fg.how.How) -> None:
    model, (x, y) = net("baddbmm"), batch()
    with pytest.raises(fg.GrowthError, match=r"site '0'.*(stack|use how)"):
        fg.grow(model, {"0": 2}, how, sites=fg.find_sites(model, x), closure=lambda: each_loss(model(x), y).sum())
    assert model[0].weight.shape == (MEMBERS, INS, HIDDEN)


def test_more_units_than_the_rank_are_orthogonal_in_each_member() -> None:
    model, (x, y) = net("baddbmm"), batch()
    fg.grow(model, {"0": OUTS}, sites=fg.find_sites(model, x), closure=lambda: each_loss(model(x), y).sum())
    new = model[2].weight.detach()[:, HIDDEN:]  # (members, units, out), INS of them from the growth matrix
    unit = new / new.norm(dim=2, keepdim=True)
    eye = torch.eye(OUTS, dtype=torch.float64).expand(MEMBERS, -1, -1)
    assert_close(unit @ unit.mT, eye, torch.float64, OUTS * OUTS)
