"""Krylov rounds in tf32, emulated: what multiplies is rounded to 11 bits, what is returned is float32's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gloo import found_by, joined
from test_solve import KINDS, check, maps, matrix_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrow import solve as solver
from fastgrow.distributed import Replicas
from fastgrow.operators import ConvPair, DenseMap, LinearMap, LinearPair, ScaledMap, StackedPair, SumMap, base
from fastgrow.ops import ConvGeometry
from fastgrow.solve import Directions, Method, solve, top_directions

_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward")


def tf32(x: Any) -> Any:
    """Float32 tensors to the nearest number of 10 stored mantissa bits."""
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        return x
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class _TensorCores(TorchDispatchMode):
    """Every product rounds its operands."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _PRODUCTS:
            _TensorCores.seen += 1
            args = tuple(tf32(arg) for arg in args)
        return func(*args, **(kwargs or {}))


@contextmanager
def _rounded(self: LinearMap) -> Iterator[None]:
    with _TensorCores():
        yield


def _emulate(patch: pytest.MonkeyPatch) -> None:
    _TensorCores.seen = 0
    patch.setattr(LinearMap, "may_round", property(lambda self: self.dtype == torch.float32))
    patch.setattr(LinearMap, "rounded", _rounded)


@pytest.fixture(autouse=True)
def rounds(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Every float32 map is on a GPU whose rounds are in tf32."""
    _emulate(monkeypatch)


def exactly(given: LinearMap, found: Directions) -> tuple[Directions, Tensor]:
    """Both in the units of the unit map: `check` squares what it reads."""
    scale = 2.0 ** float(given.exponent)
    return Directions(found.left, found.values / scale, found.right, found.captured), given.dense().double() / scale


def test_the_emulation_rounds() -> None:
    values = torch.tensor([1 + 2.0**-10, 1 + 2.0**-12, 3.0, -1 - 3 * 2.0**-11])
    assert torch.equal(tf32(values), torch.tensor([1 + 2.0**-10, 1.0, 3.0, -1 - 2.0**-9]))
    given = DenseMap(matrix_of("gaussian", 60, 50).float())
    columns = torch.randn(50, 4)
    exact = given.unit_matmat(columns)
    with given.rounded():
        error = (given.unit_matmat(columns) - exact).norm() / exact.norm()
    assert 2.0**-14 < error < 2.0**-10


@pytest.mark.parametrize("method", ["auto", "subspace"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_spectrum_is_captured(kind: str, method: Method) -> None:
    cases = [((220, 220), 14), ((300, 180), 5), ((170, 400), 20), ((640, 512), 60), ((512, 640), 4)]
    for seed, (shape, k) in enumerate(cases):
        matrix = matrix_of(kind, *shape, seed=seed).float()
        check(top_directions([matrix], k, method)[0], matrix, k)
    assert method == "auto" or _TensorCores.seen


def _others() -> dict[str, LinearMap]:
    torch.manual_seed(4)
    images, out = torch.randn(8, 32, 9, 9).relu(), torch.randn(8, 40, 9, 9) * 1e3
    same = ConvGeometry(3, padding=1)
    shares = [ScaledMap(ConvPair(out[i : i + 4], images[i : i + 4], same, same, bias=True), 0.5) for i in (0, 4)]
    return {
        "convs, two batches": SumMap(shares),
        "centred": ConvPair(out, images, same, same, centred=True),
        "stacked": StackedPair(torch.randn(3, 400, 70), torch.randn(3, 400, 90).cumsum(2), bias=True),
        **maps(),
    }


@pytest.mark.parametrize("k", [3, 24])
@pytest.mark.parametrize("name", sorted(_others()))
def test_maps_of_every_kind(name: str, k: int) -> None:
    given = _others()[name]
    for method in ("auto", "subspace"):
        found = solve([given], k, method=method)[0]
        check(*exactly(given, found), k)


def test_a_run_is_its_own_and_repeats() -> None:
    chosen = list(_others().values())
    together = solve(chosen, 6, method="subspace")
    for given, one in zip(chosen, together, strict=True):
        alone = solve([given], 6, method="subspace")[0]
        assert all(torch.equal(a, b) for a, b in zip(alone, one, strict=True))
        assert alone.captured == one.captured


def test_float64_is_never_rounded() -> None:
    matrix = matrix_of("power", 200, 150)
    check(top_directions([matrix], 6, "subspace")[0], matrix, 6)
    assert not _TensorCores.seen


def test_what_rounding_hides_is_found_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors a thousand times larger than their product: rounded, M is noise; the certificate is taken back."""
    torch.manual_seed(0)
    size = 400
    shared, apart = torch.randn(size, 1), torch.randn(size, size)
    apart -= shared @ (shared.mT @ apart) / shared.square().sum()
    grad = apart * (1 / torch.arange(1, size + 1)).sqrt()
    data = torch.randn(size, size) + 3e3 * shared @ torch.randn(1, size)
    matrix = grad.double().mT @ data.double()
    best = torch.linalg.svdvals(matrix)[:8].square().sum().sqrt()

    def solved() -> tuple[float, float]:
        found = solve([LinearPair(grad, data)], 8, method="subspace")[0]
        return float((found.left.double().mT @ matrix).norm() / best), found.captured

    true, claimed = solved()
    assert true >= 0.999
    assert 0.999 <= claimed <= true + 0.002
    monkeypatch.setattr(solver._Krylov, "confirm", lambda self: None)
    true, claimed = solved()
    assert true < 0.99 <= claimed


def _halves() -> list[LinearMap]:
    torch.manual_seed(0)
    grad, data = torch.randn(900, 400), torch.randn(900, 450).cumsum(1)
    return [LinearPair(grad[i::2], data[i::2]) for i in range(2)]


def _ranks_worker(rank: int, folder: str) -> None:
    with joined(rank, folder) as shared, pytest.MonkeyPatch.context() as patch:
        _emulate(patch)
        replicas = Replicas(torch.distributed.group.WORLD, torch.device("cpu"))
        (found,) = replicas.solve([_halves()[rank]], 5, names=["site"])
        told = {"left": found.left, "values": found.values, "right": found.right}
        torch.save({**told, "captured": found.captured, "seen": _TensorCores.seen}, shared / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[dict[str, Any]]]:
    yield from found_by(_ranks_worker)


def test_every_rank_rounds_when_rank_0_does(ranks: list[dict[str, Any]]) -> None:
    one, two = ranks
    assert one["seen"] == two["seen"] > 0
    assert all(torch.equal(one[name], two[name]) for name in ("left", "values", "right"))
    found = Directions(one["left"], one["values"], one["right"], one["captured"])
    check(found, SumMap(_halves()).dense(), 5)


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU rounds are in tf32 from compute capability 8 on, unless the module's constant says no."""
    monkeypatch.undo()
    given = DenseMap(torch.randn(4, 4))
    assert not given.may_round
    given.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert given.may_round
    with given.rounded():
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    monkeypatch.setattr(base, "TF32_ROUNDS", False)
    assert not given.may_round
    monkeypatch.setattr(base, "TF32_ROUNDS", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not given.may_round
