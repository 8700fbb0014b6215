"""fg.insert_layer: the function stays, the new layer trains, grows, and is saved like any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import assert_close, tolerance
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg
from fastgrow import stages

X = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (6,), generator=torch.Generator().manual_seed(2))


class Written(nn.Module):
    """conv -> norm -> ReLU module -> conv -> ReLU function -> pooling -> linear."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


class Block(nn.Module):
    """As torchvision writes it: one ReLU module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def residual() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(stem, Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def plain() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def loss(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> Tensor:
    return F.cross_entropy(model(x), y)


def train(model: nn.Module, optimizer: Any, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def outputs(model: nn.Module, x: Tensor = X) -> list[Tensor]:
    """In evaluation and in training mode, the model left as it is."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        return [copied.eval()(x), copied.train()(x)]


IDENTITIES: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any], str]] = {
    "linear": (plain, "1", {}, "2.1"),
    "behind a tanh": (plain, "3", {"activation": None}, "4.1"),
    "a learned slope": (plain, "3", {"activation": nn.PReLU(init=1.0)}, "4.1"),
    "the end": (plain, "5", {}, "5.1"),
    "module ReLU": (Written, "conv1", {}, "relu.1"),
    "1 x 1": (Written, "conv1", {"kernel_size": 1}, "relu.1"),
    "functional ReLU": (Written, "conv2", {}, "fc.0"),
    "before": (Written, "conv1", {"before": "conv2", "kernel_size": (1, 3)}, "conv2.0"),
    "shared ReLU": (residual, "1.conv1", {}, "1.conv2.0"),
    "block": (residual, "1", {}, "1.1"),
    "stem": (residual, "0", {"kernel_size": 5}, "0.1"),
    "end of a residual branch": (residual, "1.conv2", {"activation": None}, "1.bn2.1"),
}


@pytest.mark.parametrize("case", IDENTITIES)
def test_an_identity_keeps_the_function_and_trains(case: str) -> None:
    build, after, options, name = IDENTITIES[case]
    model = seeded(build)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, parameters = outputs(model), set(map(id, model.parameters()))
    report = fg.insert_layer(model, after, example_inputs=X, optimizer=optimizer, **options)
    assert report.sites[0].name == name
    assert report.sites[0].old_width == 0
    assert "identity" in str(report)
    assert name in fg.report([report])
    for one, other in zip(outputs(model), before, strict=True):
        assert torch.equal(one, other)
    new = [p for p in model.parameters() if id(p) not in parameters]
    assert new
    assert all(any(p is held for held in optimizer.param_groups[0]["params"]) for p in new)
    weight = model.get_submodule(name).weight.detach().clone()
    train(model, optimizer, 1)
    assert not torch.equal(model.get_submodule(name).weight, weight)
    sites = fg.find_sites(model, X)
    if name in sites:
        before = outputs(model)
        fg.grow(model, {name: 2}, fg.how.ZeroOutgoing(), sites=sites, optimizer=optimizer)
        for one, other in zip(outputs(model), before, strict=True):
            assert_close(one, other, torch.float32, 200)
        train(model, optimizer, 1)
    else:
        assert name in sites.frozen or any(name in site.producers for site in sites)


def test_a_norm_begins_with_the_batch_it_has_seen() -> None:
    model = seeded(Written)
    before = outputs(model)
    report = fg.insert_layer(model, "conv1", example_inputs=X, norm=True)
    assert [type(m).__name__ for m in model.relu] == ["ReLU", "Conv2d", "BatchNorm2d", "ReLU"]
    assert report.parameters == sum(p.numel() for p in model.parameters())
    after = outputs(model)
    assert_close(after[1], before[1], torch.float32, 6 * 64)
    # In evaluation mode other statistics lie before it, and it is the identity all the same.
    assert_close(after[0], before[0], torch.float32, 6 * 64)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_convolutions(dims: int) -> None:
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    model = seeded(lambda: nn.Sequential(conv(2, 3, 3), nn.ReLU(), conv(3, 4, 3)))
    x = torch.randn(2, 2, *[7] * dims)
    before = outputs(model, x)
    fg.insert_layer(model, "0", example_inputs=x)
    fg.insert_layer(model, "1.1", units=2, before="2", closure=lambda: model(x).square().mean())
    for one, other in zip(outputs(model, x), before, strict=True):
        assert torch.equal(one, other)
    assert isinstance(model[1][1], conv)
    assert isinstance(model[2].branch[2], conv)


def growth_matrix(model: nn.Module, branch: nn.Sequential, closure: Callable[[], Tensor]) -> Tensor:
    """M by brute force: dL/dW_in for one entry of W_out after the other, the activation's slope taken from 0+."""
    first, last = branch[0], branch[-1]
    rows = []
    kept = last.weight.detach().clone()
    for unit in torch.eye(last.weight[:, 0].numel(), dtype=last.weight.dtype):
        with torch.no_grad():
            last.weight.zero_()
            last.weight[:, 0] = unit.view_as(last.weight[:, 0])
        (gradient,) = torch.autograd.grad(closure(), [first.weight])
        rows.append(gradient[0].reshape(-1))
    with torch.no_grad():
        last.weight.copy_(kept)
    return torch.stack(rows)


BRANCHES: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any], str]] = {
    "linear": (plain, "1", {}, "3"),
    "tanh": (plain, "3", {}, "5"),
    "stride": (lambda: Written(norm=False), "conv1", {}, "conv2"),
    "gelu": (Written, "conv1", {"activation": nn.GELU()}, "conv2"),
    "behind pooling": (Written, "conv2", {}, "fc"),
    "into a block": (residual, "0", {"before": "1.conv1", "kernel_size": 1}, "1.conv1"),
}


@pytest.mark.parametrize("case", BRANCHES)
def test_units_beside_a_layer_attain_the_largest_gradient(case: str) -> None:
    build, after, options, reader = BRANCHES[case]
    model = seeded(build).double()
    x = X.double()

    def closure() -> Tensor:
        return loss(model, x)

    before = outputs(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    report = fg.insert_layer(model, after, units=3, closure=closure, optimizer=optimizer, **options)
    for one, other in zip(outputs(model, x), before, strict=True):
        assert torch.equal(one, other)
    beside = model.get_submodule(reader)
    assert isinstance(beside, fg.nn.Beside)
    assert report.sites[0].name == f"{reader}.branch.0"
    first, last = beside.branch[0], beside.branch[-1]
    assert not first.weight.any()
    assert first.weight.shape[0] == 3
    columns = last.weight.detach().movedim(1, 0).flatten(1)
    present = beside.layer.weight.detach().movedim(1, 0).flatten(1).norm(dim=1).mean()
    assert_close(columns @ columns.T, (0.5 * present) ** 2 * torch.eye(3).double(), torch.float32, 100)
    values = torch.linalg.svdvals(growth_matrix(model, beside.branch, closure))
    (gradient,) = torch.autograd.grad(closure(), [first.weight])
    optimum = 0.5 * present * values[:3].square().sum().sqrt()
    assert optimum > 1e-6
    assert gradient.norm() >= 0.999 * optimum
    assert gradient.norm() <= optimum * (1 + tolerance(torch.float32, 100))  # norms of weights are taken in float32
    gain = report.sites[0].predicted_gain
    assert gain == pytest.approx(0.5 * float(gradient.square().sum()), rel=2e-3)
    # It grows further as any site does.
    sites = fg.find_sites(model, x)
    before = outputs(model, x)
    fg.grow(model, {report.sites[0].name: 2}, sites=sites, optimizer=optimizer, closure=closure)
    for one, other in zip(outputs(model, x), before, strict=True):
        assert torch.equal(one, other)
    start = float(closure().detach())
    for _ in range(3):
        optimizer.zero_grad()
        closure().backward()
        optimizer.step()
    assert first.weight is not beside.branch[0].weight or first.weight.any()
    assert float(closure().detach()) < start


@pytest.mark.parametrize("how", [fg.how.Random(), fg.how.ZeroOutgoing(), fg.how.ZeroBoth()])
@pytest.mark.parametrize("norm", [False, True])
def test_other_starts(how: Any, norm: bool) -> None:
    model = seeded(Written)
    before = outputs(model)
    fg.insert_layer(model, "conv1", units=4, how=how, norm=norm, example_inputs=X)
    for one, other in zip(outputs(model), before, strict=True):
        assert torch.equal(one, other)
    loss(model).backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.conv2.branch.parameters())


def test_gradmax_behind_a_batch_norm_in_the_branch() -> None:
    model = seeded(Written).double()
    fg.insert_layer(model, "conv1", units=2, norm=True, closure=lambda: loss(model, X.double()))
    loss(model, X.double()).backward()
    assert model.conv2.branch[0].weight.grad.norm() > 0


def test_refusals_change_nothing() -> None:
    def refused(model: nn.Module, match: str, *args: Any, **options: Any) -> None:
        before, modules = {n: p.clone() for n, p in model.state_dict().items()}, dict(model.named_modules())
        generator = torch.get_rng_state()
        with pytest.raises(fg.GrowthError, match=match):
            fg.insert_layer(model, *args, **{"example_inputs": X, **options})
        assert dict(model.named_modules()) == modules
        assert torch.equal(torch.get_rng_state(), generator)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())

    written, blocks = seeded(Written), seeded(residual)
    refused(seeded(plain), "Tanh behind Tanh at '4' changes what it reads.*PReLU", "3")
    refused(written, "no such module; its layers are conv1, conv2, fc", "conv3")
    refused(written, "no such module", "")
    refused(written, "an even kernel has no centre", "conv1", kernel_size=2)
    refused(written, "the new layer is linear", "conv2", kernel_size=3)
    refused(written, "wanted an integer of at least 1", "conv1", units=0)
    refused(written, "say how many with units=", "conv1", how=fg.how.Random())
    refused(written, "give closure=", "conv1", units=2)
    refused(written, "'fc' is no layer that reads it", "conv1", before="fc")
    refused(written, "no layer with weights reads it", "fc", units=2)
    refused(written, "Net2Net starts from units that are there", "conv1", units=2, how=fg.how.Net2Net())
    refused(written, "none of torch.nn's activations", "conv1", activation=nn.Softmax(1))
    refused(written, "one layer", "conv1", units=2, activation=None)
    refused(written, "not zero at zero", "conv1", units=2, activation=nn.Sigmoid(), closure=lambda: loss(written))
    refused(blocks, "'2.conv1'.*before=", "1", units=2)
    with pytest.raises(fg.GrowthError, match="example_inputs"):
        fg.insert_layer(written, "conv1")
    with pytest.raises(fg.GrowthError, match="LBFGS"):
        fg.insert_layer(written, "conv1", example_inputs=X, optimizer=torch.optim.LBFGS(written.parameters()))
    other = torch.optim.SGD(written.fc.parameters(), lr=0.1)
    with pytest.raises(fg.GrowthError, match="belongs to no param group"):
        fg.insert_layer(written, "conv1", example_inputs=X, optimizer=other)
    assert isinstance(written.relu, nn.ReLU)
    assert len(other.param_groups[0]["params"]) == 2
    with pytest.raises(fg.GrowthError, match="EMA|copy that must follow"):
        fg.insert_layer(written, "conv1", example_inputs=X, also=[nn.Linear(2, 2)])
    assert isinstance(written.relu, nn.ReLU)


class Peeking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).to(self.first.weight.dtype))


def test_code_that_reads_the_modules_weights_is_refused_by_name() -> None:
    with pytest.raises(fg.GrowthError, match="'first' the model does not run .*no attribute 'weight'"):
        fg.insert_layer(seeded(Peeking), "first", example_inputs=torch.randn(2, 4))
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 8), layer)
    x = torch.randn(2, 3, 4)
    for mode in (True, False):
        with pytest.raises(fg.GrowthError, match="does not run|fast path"):
            fg.insert_layer(model.train(mode), "1.linear1", example_inputs=x)
    before = outputs(model, x)
    fg.insert_layer(model, "1", example_inputs=x)
    for one, other in zip(outputs(model, x), before, strict=True):
        assert torch.equal(one, other)


def test_param_groups_options_and_flags_follow_the_layer_before() -> None:
    model = seeded(Written).to(memory_format=torch.channels_last).double()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
    x = X.double()
    loss(model, x).backward()
    optimizer.step()
    held = {id(p): state["exp_avg"].clone() for p, state in optimizer.state.items()}
    fg.insert_layer(model, "conv1", units=2, norm=True, optimizer=optimizer, closure=lambda: loss(model, x))
    branch = model.conv2.branch
    new = [
        {id(p) for p in group["params"][-count:]} for group, count in zip(optimizer.param_groups, (2, 2), strict=True)
    ]
    assert new == [{id(branch[0].weight), id(branch[3].weight)}, {id(branch[1].weight), id(branch[1].bias)}]
    assert branch[0].weight.dtype == torch.float64
    assert branch[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(optimizer.state[p]["exp_avg"], held[id(p)]) for p in decayed)
    loss(model, x).backward()
    optimizer.step()
    assert int(optimizer.state[branch[0].weight]["step"]) == 1
    frozen = seeded(Written).requires_grad_(False)
    fg.insert_layer(frozen, "conv1", example_inputs=X, optimizer=torch.optim.SGD([nn.Parameter(X)], lr=0.1))
    assert not frozen.relu[1].weight.requires_grad


def test_copies_follow() -> None:
    model = seeded(Written)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer)
    average.update_parameters(model)
    train(model, optimizer)
    average.update_parameters(model)
    before, mean = outputs(model), outputs(average)
    fg.insert_layer(model, "conv1", optimizer=optimizer, also=[average], example_inputs=X)
    fg.insert_layer(model, "conv1", units=2, optimizer=optimizer, also=[average], closure=lambda: loss(model))
    for one, other in zip((*outputs(model), *outputs(average)), (*before, *mean), strict=True):
        assert_close(one, other, torch.float32, 100)
    assert not {id(p) for p in average.parameters()} & {id(p) for p in model.parameters()}
    train(model, optimizer)
    average.update_parameters(model)


def test_new_weights_are_of_a_stage_of_their_own_that_rate_adaptation_knows() -> None:
    model = seeded(plain)
    optimizer = fg.optim.SGD(model.parameters(), lr=0.1, rate_adaptation=True)
    train(model, optimizer)
    fg.insert_layer(model, "1", example_inputs=X, optimizer=optimizer)
    new = model[2][1]
    assert stages.stages_of(new, "weight")[0].unique().tolist() == [1]
    assert stages.newest_stage(model) == 1
    assert optimizer.stage_rates(new.weight) == {1: 0.1}
    train(model, optimizer)
    fg.grow(model, {"2.1": 2}, fg.how.ZeroOutgoing(), sites=fg.find_sites(model, X), optimizer=optimizer)
    assert set(optimizer.stage_rates(model[2][1].weight)) == {1, 2}
    train(model, optimizer)


def deepened(model: nn.Module, optimizer: Any = None, also: Any = ()) -> None:
    """Growth and insertions in turn, the later places before, inside and around the earlier ones."""
    kept = {"optimizer": optimizer, "also": also}

    def grow(names: dict[str, int]) -> None:
        fg.grow(model, names, sites=fg.find_sites(model, X), closure=lambda: loss(model), **kept)

    grow({"1.conv1": 2})
    fg.insert_layer(model, "2.conv1", example_inputs=X, **kept)
    fg.insert_layer(model, "1.conv1", example_inputs=X, norm=True, **kept)
    grow({"1.conv2.0": 2, "2.conv2.0": 1})
    fg.insert_layer(model, "0", before="1.conv1", units=2, kernel_size=1, closure=lambda: loss(model), **kept)
    fg.insert_layer(model, "1", example_inputs=X, activation=nn.PReLU(init=1.0), **kept)
    grow({"1.0.conv1.branch.0": 2, "1.0.conv2.0": 2})


@pytest.mark.parametrize("kind", [torch.optim.AdamW, fg.optim.Adam])
def test_a_run_resumes_bit_for_bit_from_a_seed(kind: Any, tmp_path: Path) -> None:
    model = seeded(residual)
    optimizer, average = kind(model.parameters(), lr=1e-2), copy.deepcopy(model)
    train(model, optimizer)
    deepened(model, optimizer, [average])
    train(model, optimizer)
    fg.save(tmp_path / "deep.pt", model, optimizer, also=[average])
    other = seeded(residual, 5)
    other_optimizer, other_average = kind(other.parameters(), lr=1e-2), copy.deepcopy(other)
    for _ in range(2):  # from a seed, and into what stands there already
        fg.load(tmp_path / "deep.pt", other, other_optimizer, also=[other_average])
        assert str(other) == str(model)
    again = [(model, optimizer, average), (other, other_optimizer, other_average)]
    for one, using, mean in again:
        train(one, using)
        torch.manual_seed(3)
        fg.grow(
            one, {"1.0.conv2.0": 1}, sites=fg.find_sites(one, X), closure=lambda one=one: loss(one), optimizer=using
        )
        fg.insert_layer(one, "2", example_inputs=X, optimizer=using, also=[mean])
        train(one, using)
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    for name, value in average.state_dict().items():
        assert torch.equal(value, other_average.state_dict()[name])
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], other_optimizer.state[q]["exp_avg"]), name


def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    model = seeded(residual)
    deepened(model)
    fg.save(tmp_path / "deep.pt", model)
    for other in (seeded(Written), seeded(plain)):
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        before = str(other), len(optimizer.param_groups[0]["params"])
        with pytest.raises(fg.GrowthError):
            fg.load(tmp_path / "deep.pt", other, optimizer)
        assert (str(other), len(optimizer.param_groups[0]["params"])) == before
    fg.save(tmp_path / "seed.pt", seeded(residual))
    with pytest.raises(fg.GrowthError, match="another architecture"):
        fg.load(tmp_path / "seed.pt", model)
    content = torch.load(tmp_path / "deep.pt", weights_only=True)
    next(iter(content["structure"]["inserted"].values()))["layers"][0]["kind"] = "Module"
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(fg.GrowthError, match="an inserted layer is a Module"):
        fg.load(tmp_path / "odd.pt", seeded(residual))


def test_finalize_leaves_torch_alone(tmp_path: Path) -> None:
    model = seeded(residual).eval()
    deepened(model)
    names, before = list(model.state_dict()), model(X)
    fg.finalize(model)
    assert list(model.state_dict()) == names
    assert torch.equal(model(X), before)
    assert not any("fastgrow" in type(m).__module__ or "_fastgrow" in str(vars(m).keys()) for m in model.modules())
    program = torch.export.export(model, (X,))
    assert_close(program.module()(X), before, torch.float32, 100)
    assert torch.equal(copy.deepcopy(model)(X), before)
    fg.grow(model, {"1.0.conv1.branch.0": 1}, fg.how.Random(), sites=fg.find_sites(model, X))
    assert_close(model(X), before, torch.float32, 100)


def test_sites_found_before_are_refused() -> None:
    model = seeded(Written)
    sites = fg.find_sites(model, X)
    fg.insert_layer(model, "conv1", example_inputs=X)
    with pytest.raises(fg.GrowthError, match="a layer was inserted at 'relu'"):
        fg.grow(model, {"conv1": 2}, fg.how.Random(), sites=sites)
    with pytest.raises(fg.GrowthError, match="find them again"):
        fg.plan(model, {"conv1": 2}, sites=sites)
    assert "conv1: 4 -> 6" in str(fg.plan(model, {"conv1": 2}, sites=fg.find_sites(model, X)))
    untouched = seeded(Written)
    fg.grow(untouched, {"conv1": 2}, fg.how.Random(), sites=sites)


def test_a_grower_finds_its_sites_anew(tmp_path: Path) -> None:
    def grower_of(model: nn.Module) -> fg.Grower:
        sites = fg.find_sites(model, X, exclude="conv2")
        optimizer = torch.optim.Adam(model.parameters())
        where = fg.where.Everywhere(units=2)
        return fg.Grower(model, optimizer, sites=sites, when=fg.when.Every(2, times=3), where=where)

    def run(grower: fg.Grower, steps: int) -> None:
        for _ in range(steps):
            with grower.observe():
                loss(grower.model).backward()
            grower.optimizers[0].step()
            grower.optimizers[0].zero_grad()
            grower.step()

    grower = grower_of(seeded(Written))
    run(grower, 2)
    report = grower.insert_layer("conv1", X, kernel_size=1)
    assert report.step == 2
    assert [site.name for site in grower.sites] == ["conv1", "relu.1"]
    grower.insert_layer("relu.1", X, before="conv2", units=2, closure=lambda: loss(grower.model))
    assert [site.name for site in grower.sites] == ["conv1", "relu.1", "conv2.branch.0"]
    run(grower, 2)
    assert [len(one.sites) for one in grower.history] == [1, 1, 1, 3]
    fg.save(tmp_path / "run.pt", grower.model, grower=grower)
    other = seeded(Written)
    again = fg.Grower(
        other,
        torch.optim.Adam(other.parameters()),
        example_inputs=X,
        when=fg.when.Every(2, times=3),
        where=fg.where.Everywhere(units=2),
    )
    fg.load(tmp_path / "run.pt", other, grower=again)
    assert [one.method for one in again.history] == [one.method for one in grower.history]
    with pytest.raises(fg.GrowthError, match="set its sites"):
        run(again, 2)
    again.sites = fg.find_sites(other, X, exclude="conv2.layer")
    fg.load(tmp_path / "run.pt", other, grower=again)
    for one in (grower, again):
        run(one, 3)
    assert len(again.history) == 5
    for name, value in grower.model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_a_compiled_model() -> None:
    model = seeded(Written)
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(compiled, optimizer, 1)
    before = outputs(model)
    fg.insert_layer(compiled, "conv1", example_inputs=X, optimizer=optimizer)
    fg.insert_layer(compiled, "_orig_mod.conv1", units=2, optimizer=optimizer, closure=lambda: loss(compiled))
    for one, other in zip(outputs(model), before, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(compiled.eval()(X), model(X))
    train(compiled.train(), optimizer, 2)
    assert model.relu[1].branch[0].weight.any()
    assert torch.equal(compiled.eval()(X), model(X))
