"""Whatever autocast or default device is set around them, growing is on its tensors' devices, in their precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Branching, Gated, Residual
from torch import Tensor, nn

import fastgrow as fg

HALVES = [torch.bfloat16, torch.float16]


def under(dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def nets() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 48, 3, padding=1), nn.ReLU())
    depthwise = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=24), nn.ReLU())
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    linear = nn.Sequential(nn.Linear(100, 150), nn.ReLU(), nn.Linear(150, 150), nn.ReLU(), nn.Linear(150, 10))
    images = torch.randn(4, 3, 10, 10)
    return {
        "conv": (nn.Sequential(*conv, nn.Conv2d(48, 40, 3), nn.ReLU(), *head, nn.Linear(40, 10)), images),
        "depthwise": (nn.Sequential(*depthwise, nn.Conv2d(24, 16, 3), nn.ReLU(), *head, nn.Linear(16, 10)), images),
        "linear": (linear, torch.randn(64, 100)),
    }


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["conv", "depthwise", "linear"])
def test_a_block_that_ends_under_autocast_solves_as_one_that_does_not(name: str, dtype: torch.dtype) -> None:
    model, x = nets()[name]
    y = torch.arange(len(x)) % 10
    sites = fg.find_sites(model, x)

    def seen(around: torch.dtype | None, inside: torch.dtype | None) -> fg.Observation:
        with under(around), fg.observe(model, sites, rank=4) as observed:
            with under(inside):
                loss = F.cross_entropy(model(x).float(), y)
            with torch.autocast("cpu", enabled=False):
                loss.backward()
        return observed

    outside, around = seen(None, dtype), seen(dtype, None)
    assert outside.nagn == around.nagn
    for name_of, found in outside.all_directions().items():
        other = around.all_directions()[name_of]
        assert other.left.dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True))


@pytest.mark.parametrize(
    "how", [fg.how.GradMax(), fg.how.TINY(), fg.how.Firefly(), fg.how.Random()], ids=lambda how: how.name
)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_growth_under_autocast_is_one_whose_closure_is(how: fg.how.How, dtype: torch.dtype) -> None:
    model, x = nets()["linear"]
    y = torch.arange(len(x)) % 10
    sites = fg.find_sites(model, x)

    def grown(around: torch.dtype | None, inside: torch.dtype | None) -> nn.Module:
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)

        def closure() -> Tensor:
            with under(inside):
                return F.cross_entropy(own(x).float(), y)

        torch.manual_seed(1)
        with under(around):
            fg.grow(own, {"0": 3, "2": 2}, sites=sites, optimizer=optimizer, how=how, closure=closure)
        return own

    wanted, found = grown(None, dtype), grown(dtype, None)
    for (name, value), (_, other) in zip(wanted.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_functional_ops_are_not_cast(dtype: torch.dtype) -> None:
    grad, data = torch.randn(500, 64) * 1000, torch.randn(500, 96) * 1000
    matrix = torch.randn(300, 250) * torch.logspace(0, -2, 250)
    geometry = fg.ops.ConvGeometry(3, padding=1)
    maps = torch.randn(2, 4, 6, 6), torch.randn(2, 3, 6, 6)

    def results() -> list[Tensor]:
        directions = [fg.ops.top_directions([matrix], 8, method)[0] for method in ("auto", "gram", "subspace", "svd")]
        return [
            fg.ops.linear_growth_matrix(grad, data),
            fg.ops.conv2d_growth_matrix(*maps, geometry, geometry),
            fg.ops.sum_of_squares(grad),
            *(tensor for found in directions for tensor in found),
        ]

    plain = results()
    with under(dtype):
        cast = results()
    for one, other in zip(plain, cast, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype == torch.float32


def test_a_gain_is_measured_with_the_weights_that_are_there() -> None:
    """Autocast keeps the casts of weights, which a growth and the steps that measure it change in place."""
    model, x = nets()["linear"]
    y = torch.arange(len(x)) % 10
    sites = fg.find_sites(model, x)

    def measured(around: torch.dtype | None, inside: torch.dtype | None) -> float | None:
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.5)

        def closure() -> Tensor:
            with under(inside):
                return F.cross_entropy(own(x).float(), y)

        with under(around):
            report = fg.grow(own, {"0": 3}, sites=sites, optimizer=optimizer, closure=closure, measure_gain=True)
        return report.sites[0].measured_gain

    wanted, found = measured(None, torch.bfloat16), measured(torch.bfloat16, None)
    assert wanted is not None
    assert found == pytest.approx(wanted, rel=0.05)


@pytest.fixture
def default_device() -> Iterator[Callable[[str | None], None]]:
    """Sets one; "meta" refuses to meet tensors of the CPU, as a GPU does."""
    yield torch.set_default_device
    torch.set_default_device(None)


METHODS = [
    fg.how.GradMax(),
    fg.how.TINY(),
    fg.how.GradMaxOpt(steps=2),
    fg.how.Random(),
    fg.how.Firefly(steps=2),
    fg.how.Net2Net(),
    fg.how.VarianceTransfer(),
    fg.how.Sparkling(),
]


@pytest.mark.parametrize(
    ("kind", "how"),
    [*((Residual, how) for how in METHODS), (Branching, METHODS[0]), (Gated, METHODS[0])],
    ids=lambda value: value.name if isinstance(value, fg.how.How) else value.__name__,
)
def test_a_default_device_is_the_models_alone(
    kind: type[nn.Module], how: fg.how.How, default_device: Callable[[str | None], None]
) -> None:
    torch.manual_seed(0)
    model = kind()
    x = torch.randn(6, 5, 3) if kind is Gated else torch.randn(6, 2, 8, 8)
    y = torch.arange(6) % 3
    sites = fg.find_sites(model, x)

    def grown(device: str | None) -> dict[str, Tensor] | str:
        own, seen = copy.deepcopy(model), []

        def closure() -> Tensor:
            seen.append(torch.zeros(()).device.type)
            with torch.device("cpu"):
                return F.cross_entropy(own(x), y)

        with torch.device("cpu"):
            optimizer = fg.optim.Adam(own.parameters(), lr=0.01, rate_adaptation=True)
        torch.manual_seed(1)
        default_device(device)
        try:
            fg.grow(
                own, {s.name: 2 * s.multiple for s in sites}, how, sites=sites, optimizer=optimizer, closure=closure
            )
            closure().backward()
            optimizer.step()
        except fg.GrowthError as error:
            return str(error)
        finally:
            default_device(None)
        assert set(seen) <= {device or "cpu"}
        return own.state_dict()

    wanted, found = grown(None), grown("meta")
    assert type(wanted) is type(found)
    if isinstance(wanted, str):
        assert wanted == found
    else:
        assert all(torch.equal(value, found[name]) for name, value in wanted.items())  # type: ignore[index]


@pytest.mark.parametrize("make", [fg.optim.SGD, fg.optim.Adam, fg.optim.AvaGrad, torch.optim.AdamW])
def test_a_loop_under_a_default_device_is_the_loop_without(
    make: Any, default_device: Callable[[str | None], None], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x, y, seed = torch.randn(6, 2, 8, 8), torch.arange(6) % 3, Residual()

    def trained(device: str | None) -> dict[str, Tensor]:
        default_device(device)
        with torch.device("cpu"):
            own, again = copy.deepcopy(seed), copy.deepcopy(seed)
            optimizers = [make(model.parameters(), lr=0.01) for model in (own, again)]
        growers = [
            fg.Grower(m, o, sites=fg.find_sites(m, x), when=fg.when.Every(2), where=fg.where.NAGN(max_new=2))
            for m, o in zip((own, again), optimizers, strict=True)
        ]

        def steps(model: nn.Module, optimizer: Any, grower: fg.Grower, count: int) -> None:
            for _ in range(count):
                with grower.observe(), torch.device("cpu"):
                    F.cross_entropy(model(x), y).backward()
                with torch.device("cpu") if make is torch.optim.AdamW else nullcontext():
                    optimizer.step()
                optimizer.zero_grad()
                grower.step()

        steps(own, optimizers[0], growers[0], 5)
        fg.save(tmp_path / "run.pt", own, optimizers[0], growers[0])
        fg.load(tmp_path / "run.pt", again, optimizers[1], growers[1])
        steps(again, optimizers[1], growers[1], 2)
        assert growers[1].history
        default_device(None)
        return again.state_dict()

    wanted, found = trained(None), trained("meta")
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
