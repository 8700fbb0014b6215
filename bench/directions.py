"""Leading singular triplets of all growth matrices: ours against other ways, and how much each captures."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import fastgrow as fg
from fastgrow.operators import ConvPair, LinearMap, LinearPair
from fastgrow.ops import ConvGeometry, Directions
from fastgrow.solve import solve

from . import recorded
from .capture import factors
from .measure import Variant, compare, peak_bytes
from .models import Case, cases
from .rows import Row, Settings

__all__ = ["Problem", "captured_norm", "run"]


@dataclass
class Problem:
    """Matrices of one growth step, how many directions each gets, and the maps they come from.

    benchmark: the name of its rows; recorded sites are too small for the targets to speak of.
    """

    name: str
    matrices: list[Tensor]
    ranks: list[int]
    maps: Callable[[], list[LinearMap]] | None = None
    benchmark: str = "directions"


def captured_norm(matrix: Tensor, left: Tensor, values: Tensor) -> float:
    """``||Y^T M||_F / sqrt(s_1^2 + ... + s_k^2)``, Y an orthonormal basis of `left`; values: all of M's."""
    basis = torch.linalg.qr(left.double()).Q
    best = values[: left.shape[1]].double().square().sum()
    return float(((basis.mT @ matrix.double()).square().sum() / best).sqrt())


def _of_network(case: Case, settings: Settings) -> Problem:
    """The growth matrices of a network after a few steps of training, kept as matrices and as maps."""
    torch.manual_seed(0)
    model = case.build().to(settings.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        case.loss(model).backward()
        optimizer.step()
    matrices: list[Tensor] = []
    maps: list[Callable[[], LinearMap]] = []
    ranks = []
    for producer, consumer, h, dz in factors(case, model):
        if isinstance(producer, nn.Conv2d) and isinstance(consumer, nn.Conv2d):
            first, second = ConvGeometry.of(producer), ConvGeometry.of(consumer)
            maps.append(partial(ConvPair, dz, h, first, second))
            matrices.append(fg.ops.conv2d_growth_matrix(dz, h, first, second))
            ranks.append(max(1, producer.out_channels // 16))
        elif isinstance(producer, nn.Linear):
            maps.append(partial(LinearPair, dz.flatten(0, -2), h.flatten(0, -2)))
            matrices.append(fg.ops.linear_growth_matrix(dz, h))
            ranks.append(max(1, producer.out_features // 16))
    return Problem(f"gradients, {case.name}", matrices, ranks, lambda: [make() for make in maps])


def _with_spectrum(sides: Sequence[int], power: float, device: torch.device) -> list[Tensor]:
    """Random matrices with singular values i^-power."""
    result = []
    for number, side in enumerate(sides):
        generator = torch.Generator().manual_seed(number)
        left, right = (torch.linalg.qr(torch.randn(side, side, generator=generator).to(device)).Q for _ in range(2))
        values = torch.arange(1, side + 1, device=device) ** -power
        result.append((left * values) @ right.mT)
    return result


def _problems(settings: Settings) -> Iterator[Problem]:
    for case in cases(settings):
        if case.naive and case.name.startswith(("conv", "ResNet", "MLP")):
            problem = _of_network(case, settings)
            if problem.matrices:
                yield problem
    sides = [24, 40] if settings.quick else [576, 1152, 2304]
    ranks = [max(1, side // 144) for side in sides]
    text = ", ".join(map(str, sides))
    yield Problem(f"spectrum 1/i, {text}", _with_spectrum(sides, 1.0, settings.device), ranks)
    side = 32 if settings.quick else 1024
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(side, side, generator=generator).to(settings.device)
    yield Problem(f"flat gaussian, {side}", [flat], [max(1, side // 64)])
    for site in recorded.load():
        kept = site.to(settings.device)
        name = f"{kept.name}, {'x'.join(map(str, kept.h.shape))}"
        yield Problem(
            name, [kept.matrix()], [max(1, kept.width // 8)], lambda kept=kept: [kept.map()], "recorded directions"
        )


def _baselines(problem: Problem) -> dict[str, Callable[[], list[Tensor]]]:
    """The left vectors of every matrix, by other means."""
    both = list(zip(problem.matrices, problem.ranks, strict=True))
    result: dict[str, Callable[[], list[Tensor]]] = {
        "loop of torch.linalg.svd": lambda: [torch.linalg.svd(m, full_matrices=False).U[:, :k] for m, k in both],
        "torch.svd_lowrank": lambda: [torch.svd_lowrank(m, q=min(k + 8, *m.shape), niter=2)[0][:, :k] for m, k in both],
    }
    on_host = all(m.device.type == "cpu" and k < min(m.shape) for m, k in both)
    if on_host and importlib.util.find_spec("scipy") is not None:
        from scipy.sparse.linalg import svds

        result["scipy.sparse.linalg.svds"] = lambda: [torch.from_numpy(svds(m.numpy(), k=k)[0].copy()) for m, k in both]
    return result


def run(settings: Settings) -> Iterator[Row]:
    for problem in _problems(settings):
        yield from _measured(settings, problem)


def _measured(settings: Settings, problem: Problem) -> Iterator[Row]:
    values = [torch.linalg.svdvals(m) for m in problem.matrices]
    baselines = _baselines(problem)
    maps, loop = problem.maps, "loop of torch.linalg.svd"

    def least(lefts: list[Tensor]) -> float | None:
        triples = zip(problem.matrices, lefts, values, strict=True)
        return min((captured_norm(m, left, s) for m, left, s in triples if float(s[0]) > 0), default=None)

    def ours() -> list[Directions]:
        return fg.ops.top_directions(problem.matrices, problem.ranks)

    def free() -> list[Directions]:
        return solve(maps() if maps is not None else problem.matrices, problem.ranks)

    variants = {"ours": _calling(ours)}
    for name, function in baselines.items():
        variants[name] = _calling(function, settings.times(2) if name == loop else None)
    if maps is not None:
        variants["matrix-free"] = _calling(free)
    timings = compare(variants, settings.device, settings.times(settings.rounds))
    peak = peak_bytes(ours, settings.device)
    captured = least([found.left for found in ours()])
    ranks = f"k {min(problem.ranks)}-{max(problem.ranks)}"
    shape = f"{problem.name}, {len(problem.matrices)} matrices, {ranks}"
    for name, function in baselines.items():
        theirs = 1.0 if name == loop else least(function())
        yield settings.row(
            problem.benchmark,
            shape,
            name,
            timings["ours"],
            timings[name],
            peak=peak,
            captured=captured,
            baseline_captured=theirs,
        )
    if maps is not None:
        found = free()
        yield settings.row(
            f"{problem.benchmark}, matrix-free",
            shape,
            loop,
            timings["matrix-free"],
            timings[loop],
            peak=peak_bytes(free, settings.device),
            captured=least([one.left for one in found]),
            estimated=min(one.captured for one in found),
        )


def _calling(function: Callable[[], object], most: int | None = None) -> Variant:
    return Variant(lambda _: function(), most=most)
