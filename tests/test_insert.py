"""fg.insert_layer: the function stays, the new layer trains, grows, and is saved like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from insert_cases import Written, X, loss, outputs, plain, residual, seeded, train
from tolerances import assert_close, tolerance
from torch import Tensor, nn

import fastgrow as fg

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
