"""Inserted layers in training runs: optimizers, copies, checkpoints, the Grower, compilation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from insert_cases import Written, X, loss, outputs, plain, residual, seeded, train
from tolerances import assert_close
from torch import nn

import fastgrow as fg
from fastgrow import stages


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
