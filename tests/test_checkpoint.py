"""fg.save and fg.load: a grown run continues bit for bit; a bad file changes nothing."""

from __future__ import annotations

import copy
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg
from fastgrow import optim, stages
from fastgrow.checkpoint import load, save, structure_of

X = torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (8,), generator=torch.Generator().manual_seed(2))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Flatten(2), nn.Linear(64, 16), layer, nn.Flatten(), nn.Linear(32, 3))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x[:, 0, :, :2].flatten(1))))))


def optimizers() -> dict[str, Callable[[Any], Any]]:
    return {
        "adam": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        "ages": lambda parameters: optim.Adam(parameters, lr=1e-2, rate_adaptation=True),
        "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    }


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def train(model: nn.Module, optimizer: Any, scheduler: Any = None, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def grown(model: nn.Module, optimizer: Any = None, units: int = 2) -> fg.Sites:
    """Two growths of every site, so that stages and index maps are more than one deep."""
    sites = fg.find_sites(model, X)
    for _ in range(2):
        wanted = {site.name: -(-units // site.multiple) * site.multiple for site in sites}
        fg.grow(model, wanted, sites=sites, optimizer=optimizer, closure=lambda: F.cross_entropy(model(X), Y))
        if optimizer is not None:
            train(model, optimizer, steps=2)
    return sites


def assert_equal_state(one: Any, two: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert_equal_state(value, two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for pair in zip(one, two, strict=True):
            assert_equal_state(*pair)
    else:
        assert one == two


def snapshot(model: nn.Module, optimizer: Any = None) -> Any:
    return copy.deepcopy(
        (
            model.state_dict(),
            structure_of(model),
            None if optimizer is None else optimizer.state_dict(),
            [type(module).__name__ for module in model.modules()],
            [module.__dict__.get("out_channels") for module in model.modules()],
        )
    )


@pytest.mark.parametrize("name", optimizers())
def test_a_resumed_run_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    make = optimizers()[name]
    model = seeded(convolutional)
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    train(model, optimizer, scheduler)
    grown(model, optimizer)
    train(model, optimizer, scheduler)
    save(tmp_path / "run.pt", model, optimizer)
    kept = copy.deepcopy(scheduler.state_dict())

    fresh = seeded(convolutional, seed=9)
    fresh_optimizer = make(fresh.parameters())
    fresh_scheduler = torch.optim.lr_scheduler.StepLR(fresh_optimizer, 3, 0.5)
    assert load(tmp_path / "run.pt", fresh, fresh_optimizer) is fresh
    fresh_scheduler.load_state_dict(kept)
    assert_equal_state(snapshot(model, optimizer), snapshot(fresh, fresh_optimizer))
    assert [p for group in fresh_optimizer.param_groups for p in group["params"]] == list(fresh.parameters())
    train(model, optimizer, scheduler)
    train(fresh, fresh_optimizer, fresh_scheduler)
    assert_equal_state(snapshot(model, optimizer), snapshot(fresh, fresh_optimizer))


def test_growth_goes_on_after_loading(tmp_path: Path) -> None:
    model = seeded(convolutional)
    grown(model)
    save(tmp_path / "grown.pt", model)
    fresh = load(tmp_path / "grown.pt", seeded(convolutional, seed=9))
    assert stages.newest_stage(fresh) == stages.newest_stage(model) == 2
    for one in (model, fresh):
        torch.manual_seed(3)
        grown(one)
    assert_equal_state(snapshot(model), snapshot(fresh))


@pytest.mark.parametrize(
    ("build", "how"), [(attention, fg.how.Net2Net()), (Tied, fg.how.Random())], ids=["attention", "tied"]
)
def test_other_architectures(build: Callable[[], nn.Module], how: fg.how.How, tmp_path: Path) -> None:
    model = seeded(build)
    sites = fg.find_sites(model, X)
    fg.grow(model, {site.name: 2 * site.multiple for site in sites}, how, sites=sites)
    save(tmp_path / "grown.pt", model)
    fresh = load(tmp_path / "grown.pt", seeded(build, seed=9))
    assert_equal_state(snapshot(model), snapshot(fresh))
    with torch.no_grad():
        assert torch.equal(model.eval()(X), fresh.eval()(X))
    if build is Tied:
        assert fresh.first.weight is fresh.second.weight


def test_the_grower_goes_on_where_it_stood(tmp_path: Path) -> None:
    def made(seed: int) -> tuple[nn.Module, Any, fg.Grower, nn.Module]:
        model = seeded(convolutional, seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        grower = fg.Grower(
            model,
            optimizer,
            example_inputs=X,
            when=fg.when.Every(4),
            where=fg.where.RoundRobin(2),
            also=[average],
        )
        return model, optimizer, grower, average

    def steps(run: tuple[nn.Module, Any, fg.Grower, nn.Module], count: int) -> None:
        model, optimizer, grower, average = run
        for _ in range(count):
            with grower.observe():
                F.cross_entropy(model(X), Y).backward()
            optimizer.step()
            optimizer.zero_grad()
            grower.step()
            average.update_parameters(model)

    run = made(0)
    steps(run, 7)
    save(tmp_path / "run.pt", run[0], grower=run[2])
    resumed = made(9)
    load(tmp_path / "run.pt", resumed[0], grower=resumed[2])
    assert resumed[2].history == run[2].history
    steps(run, 6)
    steps(resumed, 6)
    assert len(resumed[2].history) == 3
    for one, two in zip(run[2].history, resumed[2].history, strict=True):
        assert one.sites == two.sites
    assert_equal_state(snapshot(run[0], run[1]), snapshot(resumed[0], resumed[1]))
    assert_equal_state(run[3].state_dict(), resumed[3].state_dict())


def test_through_compile_and_moved_tensors(tmp_path: Path) -> None:
    model = seeded(convolutional).to(memory_format=torch.channels_last)
    model[0] = torch.compile(model[0], backend="eager")
    grown(model)
    save(tmp_path / "grown.pt", torch.compile(model, backend="eager"))
    fresh = torch.compile(seeded(convolutional, seed=9), backend="eager")
    load(tmp_path / "grown.pt", fresh)
    for one, two in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, two)
    assert fresh.get_submodule("_orig_mod.0").out_channels == 8
    double = load(tmp_path / "grown.pt", seeded(convolutional).double())
    assert next(double.parameters()).dtype == torch.float64


def test_a_model_of_the_saved_widths_is_only_filled(tmp_path: Path) -> None:
    model = seeded(convolutional)
    save(tmp_path / "seed.pt", model)
    grown(model)
    save(tmp_path / "grown.pt", model)
    again = copy.deepcopy(model)
    weights = list(again.parameters())
    with torch.no_grad():
        weights[0].zero_()
    load(tmp_path / "grown.pt", again)
    assert all(one is two for one, two in zip(again.parameters(), weights, strict=True))
    assert_equal_state(snapshot(model), snapshot(again))
    before = snapshot(again)
    with pytest.raises(fg.GrowthError, match=r"seed\.pt holds another architecture: '0\.weight'"):
        load(tmp_path / "seed.pt", again)
    assert_equal_state(before, snapshot(again))


def test_random_state_only_where_asked(tmp_path: Path) -> None:
    model = seeded(convolutional)
    save(tmp_path / "without.pt", model)
    save(tmp_path / "with.pt", model, rng=True)
    wanted = torch.rand(3)
    load(tmp_path / "without.pt", model)
    load(tmp_path / "with.pt", model, rng=True)
    assert torch.equal(torch.rand(3), wanted)
    with pytest.raises(fg.GrowthError, match=r"without\.pt holds no random state"):
        load(tmp_path / "without.pt", model, rng=True)


def test_buffers_that_state_dict_leaves_out(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
            self.register_buffer("gain", torch.arange(1.0, 5.0), persistent=False)
            self.register_buffer("cache", torch.zeros(2), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * self.gain)

    x = torch.randn(3, 4)
    model = seeded(Scaled)
    sites = fg.find_sites(model, x)
    fg.grow(model, {"a": 2}, fg.how.Random(), sites=sites)
    model.cache = torch.ones(7)
    save(tmp_path / "grown.pt", model)
    fresh = load(tmp_path / "grown.pt", seeded(Scaled, seed=9))
    assert torch.equal(fresh.gain, model.gain)
    assert fresh.gain.shape == (6,)
    assert fresh.cache.shape == (2,)


# -- what bad input gets -------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Path:
    model = seeded(convolutional)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, steps=1)
    grown(model, optimizer)
    save(tmp_path / "grown.pt", model, optimizer)
    return tmp_path / "grown.pt"


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(path, weights_only=True)
    replacement = change(content)
    torch.save(content if replacement is None else replacement, path)


class Alien:
    pass


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "can't be read"),
    "empty": (lambda path: os.truncate(path, 0), "can't be read"),
    "text": (lambda path: path.write_text("no checkpoint"), "can't be read"),
    "pickle": (lambda path: torch.save(Alien(), path), "can't be read"),
    "foreign": (
        lambda path: torch.save(convolutional().state_dict(), path),
        "no checkpoint of fastgrow.save: it holds a dict with '0.weight'",
    ),
    "future": (lambda path: rewritten(path, lambda content: content.update(version=99)), "version 99"),
    "section": (lambda path: rewritten(path, lambda content: content.pop("tensors") and None), "'tensors'"),
    "tensor": (
        lambda path: rewritten(path, lambda content: content["tensors"].update({"0.weight": torch.ones(2)})),
        r"'0\.weight' is \(2,\) in the file",
    ),
    "missing": (
        lambda path: rewritten(path, lambda content: content["structure"]["shapes"].pop("0.weight") and None),
        "has beside them '0.weight'",
    ),
    "stages": (
        lambda path: rewritten(
            path, lambda content: content["structure"]["stages"]["0.weight"][0].update(stage=torch.ones(2))
        ),
        "stages of '0.weight'",
    ),
    "optimizer": (
        lambda path: rewritten(
            path, lambda content: content["optimizers"][0]["state"]["param_groups"][0]["params"].pop() and None
        ),
        "does not fit",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_file_changes_nothing(damage: str, written: Path) -> None:
    change, message = DAMAGE[damage]
    change(written)
    model = seeded(convolutional, seed=9)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, steps=1)
    before, held = snapshot(model, optimizer), list(model.parameters())
    with pytest.raises(fg.GrowthError, match=message) as raised:
        load(written, model, optimizer)
    assert str(written) in str(raised.value)
    assert_equal_state(before, snapshot(model, optimizer))
    assert all(one is two for one, two in zip(model.parameters(), held, strict=True))
    train(model, optimizer, steps=1)


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another width": (
        lambda: nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), *convolutional()[1:]),
        r"'0\.weight' has shape \(8, 2, 3, 3\), grown from 4 in dimension 0; the model's has \(5, 2, 3, 3\)",
    ),
    "another kernel": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 5, padding=2), *convolutional()[1:]),
        r"not grown in dimension 2",
    ),
    "another depth": (lambda: nn.Sequential(*convolutional(), nn.Linear(3, 3)), "has beside them '8.bias'"),
    "another activation": (
        lambda: nn.Sequential(*convolutional()[:2], nn.GELU(), *convolutional()[3:]),
        "'2' is a fastgrow.nn.ReLU, the model has a GELU",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_architecture_is_named(other: str, written: Path) -> None:
    build, message = OTHERS[other]
    model = build()
    before = snapshot(model)
    with pytest.raises(fg.GrowthError, match=message):
        load(written, model)
    assert_equal_state(before, snapshot(model))


def test_what_was_not_saved_is_not_loaded(written: Path, tmp_path: Path) -> None:
    model = seeded(convolutional)
    with pytest.raises(fg.GrowthError, match="holds the state of AdamW; SGD was given"):
        load(written, model, torch.optim.SGD(model.parameters()))
    grower = fg.Grower(model, torch.optim.AdamW(model.parameters()), example_inputs=X, when=fg.when.Every(2))
    with pytest.raises(fg.GrowthError, match="saved without a Grower"):
        load(written, model, grower=grower)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pt", model)


def test_no_half_file_and_no_pickled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(convolutional)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = tmp_path / "run.pt"
    save(path, model, optimizer)
    first = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
    optimizer.param_groups[0]["odd"] = Alien()
    with pytest.raises(fg.GrowthError, match=r"\['odd'\] is a Alien"):
        save(path, model, optimizer)
    del optimizer.param_groups[0]["odd"]

    def failing(content: Any, stream: io.BufferedWriter) -> None:
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="disk full"):
        save(path, model, optimizer)
    assert path.read_bytes() == first
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.pt"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_numpy_numbers_and_views_are_written_as_they_are_read(tmp_path: Path) -> None:
    import numpy

    model = nn.Linear(3, 2)
    big = torch.zeros(1000, 3)
    model.weight = nn.Parameter(big[:2])
    optimizer = torch.optim.SGD(model.parameters(), lr=numpy.float64(0.1))
    save(tmp_path / "run.pt", model, optimizer)
    assert (tmp_path / "run.pt").stat().st_size < 10_000
    load(tmp_path / "run.pt", model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1
