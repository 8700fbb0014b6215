"""What a closure may do on its way to the loss, what it may not, and what is left behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from nets import small
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastgrow as fg

READERS = [
    fg.how.GradMax(),
    fg.how.GradMaxOpt(form="incoming", steps=3),
    fg.how.Splitting(),
    fg.how.TINY(),
    fg.how.Firefly(steps=3),
    fg.how.Firefly("full", steps=3),
]
NAMES = ["GradMax", "GradMaxOpt-incoming", "Splitting", "TINY", "Firefly", "Firefly-full"]
reading = pytest.mark.parametrize("how", READERS, ids=NAMES)


def tanh_net() -> tuple[nn.Sequential, Tensor, Tensor, fg.Sites]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 5).double(), torch.randint(0, 3, (6,))
    return model, x, y, fg.find_sites(model, x)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


class Kept:
    """A model's parameters, gradients, modes and the RNG, to be found again: the same objects, the same bits."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = [(p, p.detach().clone()) for p in model.parameters()]
        self.gradients = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
        self.modes = [module.training for module in model.modules()]
        self.rng = torch.get_rng_state()

    def check(self, rng: bool = True) -> None:
        assert all(p is q for p, (q, _) in zip(self.model.parameters(), self.parameters, strict=True))
        assert all(torch.equal(p, value) for p, value in self.parameters)
        for parameter, (gradient, value) in zip(self.model.parameters(), self.gradients, strict=True):
            assert parameter.grad is gradient
            assert value is None or torch.equal(parameter.grad, value)  # type: ignore[arg-type]
        assert [module.training for module in self.model.modules()] == self.modes
        assert not rng or torch.equal(torch.get_rng_state(), self.rng)


@reading
@pytest.mark.parametrize("held", [False, True], ids=["no gradients", "gradients"])
def test_a_closure_that_backpropagates_is_refused_and_leaves_the_gradients_alone(how: fg.how.How, held: bool) -> None:
    model, x, y, sites = tanh_net()
    if held:
        F.cross_entropy(model(x), y).backward()

    def closure() -> Tensor:
        model.eval()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    kept = Kept(model)
    with pytest.raises(fg.GrowthError, match="backpropagated already; return it without calling backward"):
        fg.grow(model, {"0": 2}, how, sites=sites, closure=closure)
    kept.check()


def test_gains_are_not_measured_on_a_loss_that_was_backpropagated() -> None:
    """Found before the growth, not by the first backward pass after it."""
    model, x, y, sites = tanh_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    kept = Kept(model)
    with pytest.raises(fg.GrowthError, match="backpropagated already"):
        fg.grow(model, {"0": 2}, fg.how.Random(), sites=sites, optimizer=optimizer, closure=closure, measure_gain=True)
    kept.check()


def test_backward_passes_on_the_way_to_the_loss_do_not_count() -> None:
    """An adversarial batch, and a loss whose graph was kept: directions and gains are those of the loss alone."""

    def attack(model: nn.Module, x: Tensor, y: Tensor, backward: bool) -> Tensor:
        start = x.clone().requires_grad_()
        loss = F.cross_entropy(model(start), y)
        if not backward:
            return x + 0.1 * torch.autograd.grad(loss, start)[0].sign()
        loss.backward()
        assert start.grad is not None
        return x + 0.1 * start.grad.sign()

    def grown(kind: str) -> tuple[float | None, Tensor]:
        model, x, y, sites = tanh_net()
        fixed = attack(model, x, y, backward=False)

        def closure() -> Tensor:
            inputs = attack(model, x, y, backward=True) if kind == "attacked inside" else fixed
            loss = F.cross_entropy(model(inputs), y)
            if kind == "graph kept":
                loss.backward(retain_graph=True)
            return loss

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        report = fg.grow(model, {"0": 2}, sites=sites, optimizer=optimizer, closure=closure)
        assert all(p.grad is None for p in model.parameters())
        return report.predicted_gain, model[2].weight.detach()

    gain, outgoing = grown("plain")
    for kind in ("attacked inside", "graph kept"):
        found = grown(kind)
        assert found[0] == gain
        assert torch.equal(found[1], outgoing)


def penalised(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        start = x.clone().requires_grad_()
        output = model(start)
        (slope,) = torch.autograd.grad(output.sum(), start, create_graph=True)
        return F.cross_entropy(output, y) + (slope.norm(dim=1) - 1).square().mean()

    return closure


@pytest.mark.parametrize("how", [fg.how.Random(), fg.how.Firefly(steps=3)], ids=["Random", "Firefly"])
def test_a_gradient_penalty_needs_no_sites(how: fg.how.How) -> None:
    model, x, y, _ = tanh_net()
    report = fg.grow(model, {"0": 2}, how, closure=penalised(model, x, y))
    assert report.sites[0].new_width == 6


def test_a_gradient_penalty_has_no_growth_matrix() -> None:
    model, x, y, sites = tanh_net()
    kept = Kept(model)
    for given in ({}, {"sites": sites}):
        with pytest.raises(fg.GrowthError, match="leave the penalty out"):
            fg.grow(model, {"0": 2}, closure=penalised(model, x, y), **given)
    kept.check()


def test_sites_are_found_from_a_call_that_ends_at_the_model() -> None:
    """A closure that backpropagates, draws, catches what it can and counts: cut off there, nothing left behind."""
    model, x, y, _ = tanh_net()
    counts = {"begun": 0, "ended": 0, "left": 0}

    def closure() -> Tensor:
        counts["begun"] += 1
        try:
            loss = F.cross_entropy(model(x + torch.randn(6, 5) * 1e-3), y)
        except Exception:
            raise AssertionError("the closure was shown an error") from None
        finally:
            counts["left"] += 1
        counts["ended"] += 1
        return loss

    state = torch.get_rng_state()
    fg.grow(model, {"0": 2}, closure=closure)
    assert counts == {"begun": 2, "ended": 1, "left": 2}
    assert torch.equal(torch.get_rng_state(), state)
    assert not model._forward_pre_hooks
    with pytest.raises(fg.GrowthError, match="backpropagated already"):
        fg.grow(model, {"0": 2}, closure=lambda: [loss := closure(), loss.backward()][0])
    with pytest.raises(fg.GrowthError, match="never called the model"):
        fg.grow(model, {"0": 2}, closure=lambda: x.sum())
    with pytest.raises(fg.GrowthError, match="closure is a Tensor"):
        fg.grow(model, {"0": 2}, closure=closure())


def test_sites_are_found_through_a_compiled_model_and_keyword_arguments() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, *, factor: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x) * factor))

    model, x = Named(), torch.randn(6, 5)
    compiled = torch.compile(model, backend="eager")
    factor = torch.ones(6, 1).requires_grad_()
    compiled(x, factor=factor)
    fg.grow(compiled, {"a": 2}, closure=lambda: compiled(x, factor=factor).sum())
    assert model.a.out_features == 6
    assert compiled(x, factor=factor).shape == (6, 3)


@reading
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")], ids=["inf", "nan", "minus inf"])
def test_a_batch_that_is_not_finite_grows_nothing(how: fg.how.How, value: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    x, y = torch.randn(6, 5), torch.randint(0, 3, (6,))
    sites = fg.find_sites(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        model[0].weight[:, 0].abs_()  # of -inf ReLU makes zeros: the loss is finite all the same
    x[0, 0] = value
    kept = Kept(model)
    with pytest.raises(fg.GrowthError, match=r"layer '\d'.*(lower the learning rate|check the loss)"):
        fg.grow(model, {"0": 2}, how, sites=sites, optimizer=optimizer, closure=lambda: F.cross_entropy(model(x), y))
    kept.check()


def test_a_layer_inside_a_reentrant_checkpoint_is_named() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, first: int) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.first = first

        def trunk(self, x: Tensor) -> Tensor:
            return torch.tanh(self.b(torch.tanh(self.a(x))))

        def forward(self, x: Tensor) -> Tensor:
            if self.first:
                return self.c(checkpoint(self.trunk, x, use_reentrant=True))
            with torch.no_grad():
                x = self.trunk(x)
            return self.c(x)

    x, y = torch.randn(6, 5), torch.randint(0, 3, (6,))
    for first in (0, 1):
        model = Checkpointed(first)
        sites = fg.find_sites(model, x)
        closure = partial(loss_of, model, x.clone().requires_grad_(), y)
        for name in ("a", "b"):
            with pytest.raises(fg.GrowthError, match=rf"layer '{name}' ran with gradients off.*use_reentrant=False"):
                fg.grow(model, {name: 2}, sites=sites, closure=closure)


def test_nothing_to_grow_is_an_empty_report() -> None:
    model, x, _ = small()
    sites = fg.find_sites(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        raise AssertionError("called")

    total = sum(p.numel() for p in model.parameters())
    for how in (*READERS, fg.how.Random(), fg.how.Net2Net(), fg.how.VarianceTransfer()):
        for given in ({"sites": sites}, {}):
            report = fg.grow(model, {}, how, optimizer=optimizer, closure=closure, measure_gain=True, **given)
            assert (report.sites, report.method, report.parameters) == ([], how.name, total)
    with pytest.raises(fg.GrowthError, match="is not an optimizer"):
        fg.grow(model, {}, sites=sites, optimizer="sgd")
    with pytest.raises(fg.GrowthError, match="also='x'"):
        fg.grow(model, {}, sites=sites, also="x")
    with pytest.raises(fg.GrowthError, match="instance of Sites"):
        fg.grow(model, {}, sites=["0"])
    with pytest.raises(fg.GrowthError, match="measure_gain=True needs the loss"):
        fg.grow(model, {}, sites=sites, measure_gain=True)


@pytest.mark.parametrize(
    "how",
    [fg.how.Random(), fg.how.Net2Net(noise=0.1), fg.how.ZeroOutgoing()],
    ids=["Random", "Net2Net", "ZeroOutgoing"],
)
def test_a_refused_growth_draws_no_random_numbers(how: fg.how.How) -> None:
    model, _, _, sites = tanh_net()
    kept = Kept(model)
    with pytest.raises(fg.GrowthError, match="LBFGS"):
        fg.grow(model, {"0": 2}, how, sites=sites, optimizer=torch.optim.LBFGS(model.parameters()))
    kept.check()


def test_a_refused_layer_draws_no_random_numbers() -> None:
    model, x, _, _ = tanh_net()
    kept = Kept(model)
    with pytest.raises(fg.GrowthError, match="LBFGS"):
        fg.insert_layer(
            model, "0", units=2, how=fg.how.Random(), example_inputs=x, optimizer=torch.optim.LBFGS(model.parameters())
        )
    kept.check()


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(7, 5), nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_random_units_that_would_never_learn_are_refused() -> None:
    model, x = Functional(), torch.randn(6, 7)
    with pytest.raises(fg.GrowthError, match=r"site 'a'.*relu, called as a function; use nn.ReLU.*ZeroOutgoing"):
        fg.grow(model, {"a": 2}, fg.how.Random(), sites=fg.find_sites(model, x))


def test_random_units_learn_behind_gates() -> None:
    """Both factors at zero would keep each other there."""
    torch.manual_seed(0)
    model, x, y = Gated(), torch.randn(6, 7), torch.randint(0, 3, (6,))
    expected = model(x)
    fg.grow(model, {"gate": 2}, fg.how.Random(), sites=fg.find_sites(model, x))
    assert torch.equal(model.up.weight[5:], torch.zeros(2, 7))
    assert (model(x) - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()
    F.cross_entropy(model(x), y).backward()
    assert model.up.weight.grad[5:].count_nonzero() == 14
