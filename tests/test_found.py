"""What demanding users met: each test failed once."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg


def small() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network of linear layers in float64, a batch and its targets."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    return model, torch.randn(16, 8).double(), torch.randn(16, 4).double()


def halves(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean loss of the whole batch, its samples in two forward passes of unequal size."""
    return 0.25 * F.mse_loss(model(x[:4]), y[:4]) + 0.75 * F.mse_loss(model(x[4:]), y[4:])


def pair(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss of two views of each sample."""
    return F.mse_loss(model(x), model(x.flip(1)))


@pytest.mark.parametrize("criterion", [halves, pair], ids=["halves", "pair"])
def test_forward_passes_of_one_loss_are_one_batch(criterion: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
    model, x, y = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    report = fg.grow(
        model, {"0": 2}, sites=fg.find_sites(model, x), optimizer=optimizer, closure=lambda: criterion(model, x, y)
    )
    criterion(model, x, y).backward()
    gradient = model[0].weight.grad
    assert gradient is not None
    assert report.predicted_gain == pytest.approx(gradient[16:].square().sum().item(), rel=1e-10)


@pytest.mark.parametrize("growth", [True, "sketch"])
def test_parts_of_a_batch_have_its_growth_matrix(growth: bool | str) -> None:
    model, x, y = small()
    sites = fg.find_sites(model, x)
    found = []
    for criterion in (halves, lambda model, x, y: F.mse_loss(model(x), y)):
        with fg.observe(model, sites, growth=growth, rank=4) as seen:
            criterion(model, x, y).backward()
        found.append(seen)
    parts, whole = found
    assert parts.samples == whole.samples == 16
    torch.testing.assert_close(parts.directions(4)["0"].values, whole.directions(4)["0"].values)


class Normed(nn.Module):
    """A site whose channels pass a norm that mixes them."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 16)
        self.norm = norm
        self.outer = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.norm(self.inner(x)))


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("how", [fg.how.Random, fg.how.ZeroOutgoing], ids=lambda how: how.__name__)
def test_norms_that_mix_channels_keep_the_function_or_refuse(kind: str, how: type[fg.how.How]) -> None:
    torch.manual_seed(0)
    model = Normed(getattr(nn, kind)(16, eps=1e-5)).double()
    x = torch.randn(16, 8).double()
    before = model(x)
    sites = fg.find_sites(model, x)
    if kind == "LayerNorm" or how is fg.how.ZeroOutgoing:
        with pytest.raises(fg.GrowthError, match="'inner'.*mixes its channels.*Net2Net"):
            fg.grow(model, {"inner": 16}, how(), sites=sites)
        assert sites.widths(model) == {"inner": 16}
    else:
        fg.grow(model, {"inner": 16}, how(), sites=sites)
    torch.testing.assert_close(model(x), before)


def test_backward_passes_behind_the_block_are_not_observed() -> None:
    model, x, y = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grower = fg.Grower(model, optimizer, example_inputs=x, when=fg.when.Every(2), where=fg.where.NAGN())
    for _ in range(4):
        with grower.observe():
            loss = F.mse_loss(model(x), y)
            gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        torch.stack([gradient.square().sum() for gradient in gradients]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step()
    assert len(grower.history) == 2


def test_a_loss_that_depends_on_gradients_is_refused() -> None:
    model, x, y = small()

    def penalised() -> Tensor:
        inputs = x.clone().requires_grad_()
        output = model(inputs)
        (slope,) = torch.autograd.grad(output.sum(), inputs, create_graph=True)
        return F.mse_loss(output, y) + slope.square().mean()

    with pytest.raises(fg.GrowthError, match="'2'.*create_graph=True"):
        fg.grow(model, {"0": 2}, sites=fg.find_sites(model, x), closure=penalised)
    assert model[0].out_features == 16
    fg.grow(model, {"0": 2}, fg.how.ZeroOutgoing(), sites=fg.find_sites(model, x))


def test_a_closure_that_calls_backward_is_told() -> None:
    model, x, y = small()

    def closure() -> Tensor:
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    with pytest.raises(fg.GrowthError, match="return it without calling backward"):
        fg.grow(model, {"0": 2}, sites=fg.find_sites(model, x), closure=closure)


class Called(nn.Module):
    """A ReLU that is a function call, in front of a stream that a LayerNorm reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 10)
        self.b = nn.Linear(10, 6)
        self.norm = nn.LayerNorm(6)
        self.c = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.norm(self.b(torch.relu(self.a(x)))))


def looped(grower: fg.Grower, x: Tensor, y: Tensor, steps: int) -> None:
    (optimizer,) = grower.optimizers
    for _ in range(steps):
        with grower.observe():
            F.mse_loss(grower.model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step()


@pytest.mark.parametrize(
    ("how", "name", "widths"),
    [
        (fg.how.GradMax(), "a", [12, 14]),  # signed pairs
        (fg.how.VarianceTransfer(), "a", [12, 14]),  # pairs
        (fg.how.Net2Net(), "b", [12, 24]),  # a LayerNorm's channels all copied, twice
        (fg.how.Sparkling(), "b", [12, 24]),
    ],
    ids=["GradMax", "VarianceTransfer", "Net2Net", "Sparkling"],
)
def test_policies_ask_for_what_the_method_can_grow(how: fg.how.How, name: str, widths: list[int]) -> None:
    torch.manual_seed(0)
    model, x, y = Called(), torch.randn(16, 8), torch.randn(16, 4)
    grower = fg.Grower(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        sites=fg.find_sites(model, x, include=[name]),
        when=fg.when.Every(2),
        where=fg.where.Everywhere(units=1),
        how=how,
    )
    looped(grower, x, y, 4)
    assert [report.sites[0].new_width for report in grower.history] == widths


@pytest.mark.parametrize("how", [fg.how.GradMax(), fg.how.Random()], ids=["GradMax", "Random"])
def test_a_site_that_the_method_cannot_grow_is_refused_before_training(how: fg.how.How) -> None:
    model, x = Called(), torch.randn(16, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(fg.GrowthError, match=r"'b'.*'norm'.*exclude=\['b'\]"):
        fg.Grower(
            model, optimizer, sites=fg.find_sites(model, x), when=fg.when.Plateau(), where=fg.where.NAGN(), how=how
        )
    fg.Grower(model, optimizer, example_inputs=x, when=fg.when.Plateau(), where=fg.where.Everywhere({"a": 2}), how=how)


CALLS: dict[str, tuple[str, Callable[..., object]]] = {
    "a method's class": ("how=the class GradMax.*write GradMax", lambda **c: fg.grow(**c | {"how": fg.how.GradMax})),
    "a method's name": ("how='gradmax'", lambda **c: fg.grow(**c | {"how": "gradmax"})),
    "a position": ("units=.*site name", lambda **c: fg.grow(**c | {"units": {0: 2}})),
    "a loss": ("closure is a Tensor", lambda **c: fg.grow(**c | {"closure": c["closure"]()})),
    "a list of sites": ("sites=", lambda **c: fg.grow(**c | {"sites": ["0"]})),
    "a plan of a list": ("units=.*site name", lambda **c: fg.plan(c["model"], ["0"], sites=c["sites"])),
    "when's class": ("write Plateau", lambda **c: grower(c, when=fg.when.Plateau)),
    "where's class": ("write NAGN", lambda **c: grower(c, where=fg.where.NAGN)),
    "how's class": ("write GradMax", lambda **c: grower(c, how=fg.how.GradMax)),
    "how for where": ("instance of Where", lambda **c: grower(c, where=fg.how.GradMax())),
    "names for sites": ("instance of Sites", lambda **c: grower(c, sites=["0"])),
    "a reduction": ("loss_reduction='none'", lambda **c: grower(c, loss_reduction="none")),
    "a scale": ("loss_scale='x'", lambda **c: grower(c, loss_scale="x")),
    "a rank": ("rank=2.5", lambda **c: fg.observe(c["model"], c["sites"], rank=2.5)),
    "a negative count": ("k=-1", lambda **c: seen(**c).directions(-1)),
    "one chain for a list": ("a list of chains", lambda **c: fg.name_sites(c["model"], torch.ones(1, 8), ["0", "2"])),
    "no model": ("model=None", lambda **c: fg.find_sites(None, torch.ones(1, 8))),
    "a position to leave out": ("exclude=0", lambda **c: fg.find_sites(c["model"], torch.ones(1, 8), exclude=[0])),
    "one milestone": ("when.Milestones: steps=5", lambda **c: fg.when.Milestones(5)),
    "a grower for its history": ("grower.history", lambda **c: fg.report(grower(c))),
}


def grower(call: dict[str, object], **options: object) -> fg.Grower:
    model = call["model"]
    assert isinstance(model, nn.Module)
    options = {"sites": call["sites"], "when": fg.when.Every(5), **options}
    return fg.Grower(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)  # type: ignore[arg-type]


def seen(model: nn.Module, sites: fg.Sites, closure: Callable[[], Tensor], **rest: object) -> fg.Observation:
    with fg.observe(model, sites) as found:
        closure().backward()
    return found


@pytest.mark.parametrize("wrong", CALLS)
def test_wrong_calls_say_what_was_wanted(wrong: str) -> None:
    model, x, y = small()
    call = {
        "model": model,
        "units": {"0": 2},
        "sites": fg.find_sites(model, x),
        "closure": lambda: F.mse_loss(model(x), y),
    }
    message, act = CALLS[wrong]
    with pytest.raises(fg.GrowthError, match=message):
        act(**call)


def test_one_copy_may_stand_for_a_list() -> None:
    model, x, y = small()
    average = copy.deepcopy(model)
    fg.grow(model, {"0": 2}, sites=fg.find_sites(model, x), also=average, closure=lambda: F.mse_loss(model(x), y))
    assert average[0].out_features == 18
    assert fg.Grower(
        model, None, sites=fg.find_sites(model, x), when=fg.when.Every(5), how=fg.how.Random(), also=average
    ).also == [average]


def test_width_of_a_grouped_transposed_convolution_counts_channels() -> None:
    up = nn.ConvTranspose1d(4, 8, 3, groups=2), nn.ConvTranspose1d(8, 6, 3, groups=2)
    model = nn.Sequential(up[0], nn.Tanh(), up[1], nn.Tanh(), nn.Conv1d(6, 3, 1))
    sites = fg.find_sites(model, torch.randn(2, 4, 5))
    assert (sites["0"].width, sites["0"].multiple) == (8, 2)
    fg.grow(model, {"0": 4, "2": 2}, fg.how.Random(), sites=sites)
    assert up[0].out_channels == up[1].in_channels == sites.widths(model)["0"] == 12
    assert up[1].out_channels == model[4].in_channels == sites.widths(model)["2"] == 8


class Scaler:
    """A loss scale as a GradScaler has it, without its device."""

    def get_scale(self) -> float:
        return 1024.0


@pytest.mark.parametrize(
    ("scale", "factor", "accumulation", "reduction", "batches"),
    [(Scaler(), 1024.0, 1, "mean", 1), (1.0, 1.0, 4, "mean", 1), (0.25, 0.25, 4, "mean", 1), (1.0, 1.0, 2, "sum", 3)],
    ids=["scaler", "accumulated", "divided", "sums"],
)
def test_gains_do_not_move_with_scale_reduction_and_accumulation(
    scale: object, factor: float, accumulation: int, reduction: str, batches: int
) -> None:
    model, x, y = small()
    read: list[dict[str, float]] = []

    class Reading(fg.when.Gain):
        def gain(self, gains: Mapping[str, float]) -> bool:
            read.append(dict(gains))
            return False

    def first(accumulation: int, reduction: str, factor: float, **options: object) -> dict[str, float]:
        options["accumulation"], options["loss_reduction"] = accumulation, reduction
        grower = fg.Grower(
            model,
            None,
            sites=fg.find_sites(model, x),
            when=Reading(0.1),
            where=fg.where.Everywhere(units=2),
            **options,  # type: ignore[arg-type]
        )
        read.clear()
        while not read:
            model.zero_grad()
            for part in range(accumulation):
                rows = slice(part * 16 // accumulation, (part + 1) * 16 // accumulation)
                with grower.observe():
                    (F.mse_loss(model(x[rows]), y[rows], reduction=reduction) * factor).backward()
            grower.step()
        return read[0]

    plain = first(1, "mean", 1.0)
    assert first(accumulation, reduction, factor, loss_scale=scale, batches=batches) == pytest.approx(plain, rel=1e-10)


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    model, x, y = small()
    stale = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    sites = fg.find_sites(model, x)
    with pytest.raises(fg.GrowthError, match="none of them of this Sequential"):
        fg.grow(model, {"0": 2}, sites=sites, optimizer=stale, closure=lambda: F.mse_loss(model(x), y))
    with pytest.raises(fg.GrowthError, match="none of them of this Sequential"):
        fg.Grower(model, stale, sites=sites, when=fg.when.Every(5))
    own = torch.optim.SGD(model[2].parameters(), lr=0.1)
    fg.grow(model, {"0": 2}, sites=sites, optimizer=[stale, own], closure=lambda: F.mse_loss(model(x), y))
    assert own.param_groups[0]["params"][0] is model[2].weight


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 2))


def test_a_grower_leaves_out_what_its_method_cannot_grow() -> None:
    """The stream behind LayerNorms: left out with its reason where the Grower found the sites, else refused."""
    model, x = encoder(), torch.randn(4, 5, 3)
    optimizer = torch.optim.Adam(model.parameters())
    options: dict[str, Any] = {"when": fg.when.Every(1, times=1), "where": fg.where.Everywhere(units=2)}
    grower = fg.Grower(model, optimizer, example_inputs=x, **options)
    assert "mixes its channels" in grower.sites.frozen["0"]
    with grower.observe():
        model(x).square().mean().backward()
    optimizer.step()
    grower.step()
    (report,) = grower.history
    assert {site.name for site in report.sites} == {site.name for site in grower.sites}
    assert model[1].layers[0].linear1.out_features == 18
    assert model[0].out_features == 8
    found = fg.find_sites(model, x)
    with pytest.raises(fg.GrowthError, match=r"exclude=\['0'\]"):
        fg.Grower(model, optimizer, sites=found, **options)
    with pytest.raises(fg.GrowthError, match="nothing in the model can grow"):
        fg.Grower(nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)), None, example_inputs=x, **options)


def test_a_policy_that_names_what_cannot_grow_is_told_so() -> None:
    model, x = Called(), torch.randn(16, 8)
    for where in (fg.where.Everywhere({"b": 2}), fg.where.NAGN(max_width={"b": 90})):
        with pytest.raises(fg.GrowthError, match=r"names 'b', which fits no site \(site 'b'.*found: a"):
            fg.Grower(model, None, example_inputs=x, when=fg.when.Every(2), where=where)


def gains(model: nn.Module, name: str, units: int, x: Tensor, sites: fg.Sites) -> tuple[float, float]:
    """Predicted at learning rate 1, and found: the squared gradient that the new units' incoming weights attain."""
    torch.manual_seed(1)
    target = torch.randn_like(model(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    (grown,) = fg.grow(
        model, {name: units}, sites=sites, optimizer=optimizer, closure=lambda: F.mse_loss(model(x), target)
    ).sites
    model.zero_grad()
    F.mse_loss(model(x), target).backward()
    gradient = model.get_submodule(name).weight.grad
    assert isinstance(gradient, Tensor)
    assert grown.predicted_gain is not None
    return grown.predicted_gain, gradient[grown.old_width :].square().sum().item()


def test_a_group_norm_keeps_the_size_of_its_groups_growth_after_growth() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(4, 8), nn.Tanh(),
        nn.Flatten(), nn.Linear(128, 5),
    ).double()  # fmt: skip
    x = torch.randn(4, 3, 8, 8).double()
    sites = fg.find_sites(model, x)
    for _ in range(3):
        for name, units in {"0": 4, "3": 2}.items():
            predicted, found = gains(model, name, units, x, sites)
            assert predicted == pytest.approx(found, rel=1e-8)


class Bent(nn.Module):
    """One activation between two layers, as a module or as a function."""

    def __init__(self, bend: Callable[[Tensor], Tensor], norm: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.bend = bend
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.bend(self.norm(self.a(x))))


SLOPE = torch.tensor([0.25]).double()
BENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu": F.leaky_relu,
    "prelu": lambda x: F.prelu(x, SLOPE),
    "Hardtanh": nn.Hardtanh(-1.0, 1.0),
    "LeakyReLU": nn.LeakyReLU(0.3),
}


@pytest.mark.parametrize("bend", BENDS)
def test_activations_that_no_twin_replaces_keep_their_own_derivative(bend: str) -> None:
    torch.manual_seed(0)
    model, x = Bent(BENDS[bend]).double(), torch.randn(9, 6).double()
    predicted, found = gains(model, "a", 2, x, fg.find_sites(model, x))
    assert predicted == pytest.approx(found, rel=1e-8)


def test_units_behind_a_hardtanh_that_is_flat_at_zero_learn() -> None:
    torch.manual_seed(0)
    model, x = Bent(nn.Hardtanh(0.0, 1.0)).double(), torch.randn(9, 6).double()
    _, found = gains(model, "a", 2, x, fg.find_sites(model, x))
    assert found > 0


class RootMeanSquare(nn.Module):
    """An RMSNorm written out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.variance_epsilon = 0.3

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@pytest.mark.parametrize("norm", [RootMeanSquare, lambda: nn.RMSNorm(8, eps=0.3)], ids=["written", "module"])
def test_an_rms_norms_new_eps_is_that_of_the_next_growth(norm: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Normed(norm()).double(), torch.randn(9, 8).double()
    model.inner, model.outer = nn.Linear(8, 8).double(), nn.Linear(8, 4).double()
    sites = fg.find_sites(model, x)
    for _ in range(3):
        predicted, found = gains(model, "inner", 1, x, sites)
        assert predicted == pytest.approx(found, rel=1e-8)


@pytest.mark.parametrize("norm", [False, True], ids=["bare", "batch_norm"])
@pytest.mark.parametrize("bend", [F.relu, F.relu6, nn.Hardtanh(0.0, 1.0)], ids=["relu", "relu6", "hardtanh"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_signed_pairs_are_solved_where_they_start(norm: bool, bend: Callable[[Tensor], Tensor], scale: float) -> None:
    torch.manual_seed(0)
    model, x = Bent(bend, norm).double(), scale * torch.randn(9, 6).double()
    predicted, found = gains(model, "a", 4, x, fg.find_sites(model, x))
    assert predicted == pytest.approx(found, rel=1e-6)


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


SMALL_OP = fg.ops.ConvGeometry(3, padding=1)
OPS: dict[str, tuple[str, Callable[[Tensor], object]]] = {
    "a list": ("x is a list", lambda x: fg.ops.sum_of_squares([1.0])),  # type: ignore[arg-type]
    "no tensors": ("wanted a list", lambda x: fg.ops.sums_of_squares(None)),  # type: ignore[arg-type]
    "None": ("grad is a NoneType", lambda x: fg.ops.activation_backward(None, x, "relu")),  # type: ignore[arg-type]
    "half a direction": ("k = 1.5", lambda x: fg.ops.top_directions([x], 1.5)),  # type: ignore[arg-type]
    "out is a list": ("out is a list", lambda x: fg.ops.linear_growth_matrix(x, x, out=[x])),  # type: ignore[arg-type]
    "out is an input": ("out shares memory with grad_output", lambda x: fg.ops.linear_growth_matrix(x, x, out=x)),
    "out is a view of one": (
        "out shares memory with input",
        lambda x: fg.ops.linear_growth_matrix(x.clone(), x, out=x.view(-1).as_strided((6, 6), (1, 6))),
    ),
    "out is expanded": ("out is expanded", lambda x: fg.ops.linear_growth_matrix(x, x, out=x[:1].clone().expand(6, 6))),
    "out of a convolution": (
        "out shares memory",
        lambda x: fg.ops.conv2d_growth_matrix(
            *[x.view(1, 1, 6, 6)] * 2, SMALL_OP, SMALL_OP, out=x.as_strided((9, 9), (1, 1))
        ),
    ),
}


@pytest.mark.parametrize("wrong", OPS)
def test_wrong_ops_say_what_was_wanted(wrong: str) -> None:
    message, act = OPS[wrong]
    x = torch.randn(6, 6)
    before = x.clone()
    with pytest.raises(fg.GrowthError, match=message):
        act(x)
    assert torch.equal(x, before)


def test_out_may_lie_beside_an_input() -> None:
    whole = torch.randn(12, 6)
    x, out = whole[:6], whole[6:]
    expected = out + x.T @ x
    torch.testing.assert_close(fg.ops.linear_growth_matrix(x, x, out=out), expected)


@pytest.mark.parametrize("block", [True, False], ids=["forward alone", "no block"])
def test_a_growth_that_nobody_measures_is_told_once(block: bool) -> None:
    model, x, y = small()
    grower = fg.Grower(model, None, sites=fg.find_sites(model, x), when=fg.when.Every(2))

    def steps(count: int) -> None:
        for _ in range(count):
            with grower.observe() if block else contextlib.nullcontext():
                loss = F.mse_loss(model(x), y)
            loss.backward()
            grower.step()

    with pytest.warns(UserWarning, match="no backward pass was seen"):
        steps(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(4)
        with grower.observe():
            F.mse_loss(model(x), y).backward()
        assert grower.step() is not None


def test_nothing_is_armed_for_ever_once_no_site_may_grow() -> None:
    model, x, y = small()
    grower = fg.Grower(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        sites=fg.find_sites(model, x),
        when=fg.when.Every(2),
        where=fg.where.Everywhere(target=18),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        looped(grower, x, y, 8)
    assert [report.step for report in grower.history] == [2]
    assert not grower.armed


def test_names_that_fit_no_site_are_told_at_once() -> None:
    model, x, _ = small()
    for where in (fg.where.Everywhere(target={"zz": 20}), fg.where.NAGN(max_width={"zz": 20})):
        with pytest.raises(fg.GrowthError, match="names 'zz', which fits no site"):
            fg.Grower(model, None, sites=fg.find_sites(model, x), when=fg.when.Every(2), where=where)


def test_a_grower_is_copied_with_its_model() -> None:
    model, x, y = small()
    grower = fg.Grower(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        example_inputs=x,
        when=fg.when.Every(2),
        where=fg.where.Everywhere(units=2),
    )
    twin = copy.deepcopy(grower)
    looped(twin, x, y, 2)
    assert twin.model[0].out_features == 18  # type: ignore[index]
    assert model[0].out_features == 16
    looped(grower, x, y, 2)
    assert torch.equal(model[0].weight, twin.model[0].weight)  # type: ignore[index]


class TiedHead(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 12)
        self.outer = nn.Linear(12, 8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        return self.head(h + self.outer(torch.tanh(self.inner(h))))


@pytest.mark.parametrize("how", [fg.how.Net2Net(), fg.how.GradMax()], ids=["Net2Net", "GradMax"])
def test_tied_sites_are_refused_before_training(how: fg.how.How) -> None:
    model, x = TiedHead(), torch.randint(0, 11, (6, 5))
    with pytest.raises(fg.GrowthError, match=r"is tied.*exclude=\['embedding'\]"):
        fg.Grower(model, None, sites=fg.find_sites(model, x), when=fg.when.Every(2), how=how)
    rest = fg.find_sites(model, x, exclude="embedding")
    fg.Grower(model, None, sites=rest, when=fg.when.Every(2), how=how)
