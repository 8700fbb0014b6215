"""Growth on a GPU that is pretended: as on a CPU, with no tensors of two devices in one call, and few waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from how_cases import BRANCHED, CASES, Case
from pretend_gpu import OnGpu, a_gpu, bare, moved, waits_so_far
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: nothing is to be pretended")

_ROUNDED = {"rtol": 1e-6, "atol": 1e-8}  # kernels add in another order than ATen, and directions divide by gaps


def _values(model: nn.Module) -> dict[str, Tensor]:
    assert len({p.device for p in model.parameters()}) == 1
    return {name: bare(value).detach().clone() for name, value in model.state_dict().items()}


def _alike(train: Callable[[nn.Module, Tensor], Any], build: Callable[[], tuple[nn.Module, Tensor]]) -> list[str]:
    """Trains the same model on the CPU and on the GPU, compares all that is left, and answers the host's waits."""
    model, x = build()
    torch.manual_seed(0)
    train(model, x)
    expected = _values(model)
    model, x = build()
    torch.manual_seed(0)
    with a_gpu() as waits:
        train(moved(model), OnGpu(x))
        found = _values(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **_ROUNDED, msg=lambda text, name=name: f"{name}: {text}")
    return waits


def _step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_what_is_pretended() -> None:
    with a_gpu() as waits:
        x, y = torch.ones(3, device="cuda"), torch.ones(3)
        assert x.is_cuda
        assert x.device == torch.device("cuda", 0)
        assert not y.is_cuda
        assert torch.zeros_like(x).is_cuda
        assert x[1:].is_cuda
        assert y.to(x.device).is_cuda
        with pytest.raises(RuntimeError, match="tensors on cuda:0 and cpu"):
            x + y
        with pytest.raises(RuntimeError, match="tensors on cuda:0 and cpu"):
            torch.cat([x, y])
        x.add_(1.0)
        assert not waits
        assert x.sum().item() == 6
        assert x.cpu().tolist() == [2.0] * 3
        assert bool((x > 1).all())
        assert [wait.split()[0] for wait in waits] == ["_local_scalar_dense", "to", "_local_scalar_dense"]


HOWS: dict[str, Callable[[], fg.how.How]] = {
    "GradMax": lambda: fg.how.GradMax(norm="sigma"),
    "pairs": lambda: fg.how.GradMax(bias=True, relu="pairs"),
    "GradMaxOpt": lambda: fg.how.GradMaxOpt(steps=3),
    "TINY": fg.how.TINY,
    "Firefly": lambda: fg.how.Firefly(steps=2),
    "Splitting": lambda: fg.how.Splitting(rounds=2),
    "VarianceTransfer": fg.how.VarianceTransfer,
    "Sparkling": fg.how.Sparkling,
    "Random": fg.how.Random,
}
PLAIN_ONLY = ("pairs", "GradMaxOpt", "TINY", "Splitting")  # not for gates and heads


@pytest.mark.parametrize(
    ("case", "how"),
    [(CASES[1], how) for how in HOWS]
    + [(BRANCHED[0], how) for how in ("GradMax", "pairs", "TINY")]
    + [(BRANCHED[1], how) for how in HOWS if how not in PLAIN_ONLY],
    ids=lambda value: str(value),
)
def test_every_method_grows_as_on_a_cpu(case: Case, how: str) -> None:
    sites = fg.find_sites(*case.build())

    def train(model: nn.Module, x: Tensor) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        _step(model, x, optimizer)
        units = {site.name: 2 * site.multiple for site in sites}
        closure = lambda: model(x).square().mean()  # noqa: E731
        fg.grow(model, units, HOWS[how](), sites=sites, optimizer=optimizer, closure=closure)
        state = [v for entries in optimizer.state.values() for v in entries.values() if isinstance(v, Tensor)]
        assert {entry.device for entry in state} <= {x.device}
        _step(model, x, optimizer)

    _alike(train, case.build)


@pytest.mark.parametrize("growth", ["exact", "sketch"])
def test_a_loop_grows_as_on_a_cpu(growth: str, tmp_path: Path) -> None:
    """NAGN, the fused optimizer and checkpoints; sketches of several steps. The host waits for growth alone."""
    case = CASES[1]
    sites = fg.find_sites(*case.build())

    def train(model: nn.Module, x: Tensor) -> None:
        optimizer = fg.optim.Adam(model.parameters(), lr=1e-2, rate_adaptation=True)
        options: dict[str, Any] = {"growth": "sketch", "batches": 2} if growth == "sketch" else {}
        where = fg.where.Everywhere(units=2) if growth == "sketch" else fg.where.NAGN(threshold=0.0)
        grower = fg.Grower(model, optimizer, sites=sites, when=fg.when.Every(3), where=where, **options)
        for _ in range(7):
            grown, waited = len(grower.history), waits_so_far()
            with grower.observe():
                model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            grower.step()
            assert waits_so_far() == waited or len(grower.history) > grown
        assert len(grower.history) == 2
        fg.save(tmp_path / "grown", model, optimizer, grower)

    _alike(train, case.build)


@pytest.mark.parametrize("how", ["GradMax", "Random"])
def test_the_host_waits_as_often_for_many_sites_as_for_few(how: str) -> None:
    def waits(depth: int) -> int:
        torch.manual_seed(1)
        layers = [layer for _ in range(depth) for layer in (nn.Linear(80, 80), nn.ReLU())]
        model, x = nn.Sequential(nn.Linear(16, 80), nn.ReLU(), *layers, nn.Linear(80, 4)), torch.randn(200, 16)
        sites = fg.find_sites(model, x)
        with a_gpu() as seen:
            data = OnGpu(x)
            model = moved(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            closure = lambda: F.mse_loss(model(data), data[:, :4])  # noqa: E731
            fg.grow(model, {s.name: 4 for s in sites}, HOWS[how](), sites=sites, optimizer=optimizer, closure=closure)
            return len(seen)

    assert waits(2) == waits(6) <= 12
