"""Streaming sketches: sums of thin products over many batches, nothing of a batch kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from nets import Gated, Plain, image_batch
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastgrow as fg
from fastgrow.operators import DenseMap
from fastgrow.sketch import Sketch, sketched_directions

FINE = torch.tensor(True)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def captured(matrix: Tensor, left: Tensor) -> float:
    best = torch.linalg.svdvals(matrix)[: left.shape[1]].norm()
    return float((torch.linalg.qr(left).Q.T @ matrix).norm() / best)


# -- the sketch itself ----------------------------------------------------------------------------------


def test_the_sums_are_the_products_of_the_weighted_sum() -> None:
    matrices, weights = [random(90, 70, seed=i) for i in range(3)], [2.0, 0.5, 3.0]
    sketch = Sketch(2)
    for matrix, weight in zip(matrices, weights, strict=True):
        sketch.add(sketch.parts(DenseMap(matrix)), weight, 1, FINE)
    total = sum(w * m for w, m in zip(weights, matrices, strict=True))
    assert not sketch.exact
    assert_close(sketch.sums[0], total @ sketch.omega, torch.float64, 3 * 70)
    assert_close(sketch.sums[1], total.T @ sketch.psi, torch.float64, 3 * 90)


@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_a_matrix_of_low_rank_is_found_exactly(scale: float) -> None:
    matrix = random(200, 12) @ random(12, 150, seed=1) * scale
    sketch = Sketch(4)
    sketch.add(sketch.parts(DenseMap(matrix)), 2.0, 1, FINE)
    (found,) = sketched_directions([sketch], [0.5], ["a"])
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    assert_close(found.values, values[:4], torch.float64, 200)
    assert (left[:, :4].T @ found.left).abs().diagonal().min() > 1 - 1e-9
    assert_close(matrix @ found.right, found.left * found.values, torch.float64, 200)
    assert found.captured == pytest.approx(1.0, abs=1e-9)
    largest = found.left.gather(0, found.left.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_a_first_batch_of_low_rank_leaves_omega_room_for_the_others() -> None:
    sketch = Sketch(3)
    first, rest = random(160, 2) @ random(2, 140, seed=1), random(160, 5, seed=2) @ random(5, 140, seed=3)
    for matrix in (first, rest):
        sketch.add(sketch.parts(DenseMap(matrix)), 1.0, 1, FINE)
    (found,) = sketched_directions([sketch], [1.0], ["a"])
    assert captured(first + rest, found.left) > 1 - 1e-6


def test_the_estimate_does_not_claim_more_than_there_is() -> None:
    size = 240
    left, right = (torch.linalg.qr(random(size, size, seed=i)).Q for i in (1, 2))
    for power in (0.0, 0.25, 0.5, 1.0, 2.0):
        matrix = (left * torch.arange(1, size + 1, dtype=torch.float64) ** -power) @ right.T
        noisy = matrix + random(size, size, seed=3) * matrix.norm() / size
        sketch = Sketch(4)
        sketch.add(sketch.parts(DenseMap(noisy)), 1.0, 1, FINE)
        for seed in range(4, 9):  # batches that scatter around the mean
            sketch.add(
                sketch.parts(DenseMap(matrix + 0.1 * random(size, size, seed=seed) * matrix.norm() / size)), 1, 1, FINE
            )
        total = sketch_total = noisy + 5 * matrix
        sketch_total = total + sum(0.1 * random(size, size, seed=s) * matrix.norm() / size for s in range(4, 9))
        (found,) = sketched_directions([sketch], [1.0], ["a"])
        truth = captured(sketch_total, found.left)
        assert found.captured < truth + 0.01, power
        if power >= 0.5:
            assert truth > 0.9, power


def test_a_matrix_no_larger_than_its_sketch_is_added_up_itself() -> None:
    matrix = random(30, 200)
    sketch = Sketch(4)
    sketch.add(sketch.parts(DenseMap(matrix)), 1.0, 1, FINE)
    sketch.add(sketch.parts(DenseMap(matrix)), 1.0, 1, ~FINE)
    assert sketch.exact
    torch.testing.assert_close(sketch.sums[0], matrix)
    (found,) = sketched_directions([sketch], [1.0], ["a"])
    assert captured(matrix, found.left) > 1 - 1e-12


# -- inside training ------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Two plain sites, one with a batch norm, one behind a pooling that is replayed, one conv -> flatten -> linear."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.c0, self.c1 = nn.Conv2d(12, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm, self.c2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        self.fc1, self.fc2, self.fc3 = nn.Linear(width * 4, 96), nn.Linear(96, 128), nn.Linear(128, 64)
        self.relu, self.pool, self.out = nn.ReLU(), nn.AvgPool2d(2), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.c1(self.pool(self.relu(self.c0(x)))))
        x = self.relu(self.c2(self.relu(self.norm(x)))).flatten(1)
        return self.out(self.relu(self.fc3(self.relu(self.fc2(self.relu(self.fc1(x)))))))


def wide_batches(count: int, samples: int = 16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = [samples + 3 * (i % 2) for i in range(count)]
    return [
        (
            torch.randn(n, 12, 4, 4, generator=generator, dtype=torch.float64),
            torch.randint(5, (n,), generator=generator),
        )
        for n in sizes
    ]


def train(
    growth: object, count: int, reduction: str = "mean", lr: float = 0.02, rank: object = 1
) -> tuple[fg.Observation, list[Tensor]]:
    torch.manual_seed(0)
    model = Wide().double()
    batches = wide_batches(count)
    sites = fg.find_sites(model, batches[0][0])
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with fg.observe(model, sites, growth=growth, rank=rank, loss_reduction=reduction) as seen:  # type: ignore[arg-type]
        for x, y in batches:
            F.cross_entropy(model(x), y, reduction=reduction).backward()
            optimizer.step()
            optimizer.zero_grad()
    return seen, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sketched_steps_find_what_exact_ones_find(reduction: str) -> None:
    """The optimizer steps in between; the block holds the loop."""
    lr = 0.02 if reduction == "mean" else 0.001
    seen, weights = train("sketch", 9, reduction, lr)
    exact, same = train(True, 9, reduction, lr, rank=24)
    for a, b in zip(weights, same, strict=True):
        assert torch.equal(a, b)
    assert seen.samples == exact.samples == sum(len(x) for x, _ in wide_batches(9))
    assert seen.nagn == pytest.approx(exact.nagn, rel=1e-12)
    sketched, reached = 0, []
    for name, truth in exact.directions(24).items():
        found = seen.directions(1)[name]
        matrix = truth.left * truth.values @ truth.right.T
        assert found.left.shape[0] == matrix.shape[0]
        reached.append(captured(matrix, found.left))
        assert found.captured < reached[-1] + 0.06, name
        assert float(found.values[0]) == pytest.approx(float(truth.values[0]), rel=0.1), name
        sketched += found.captured < 1 - 1e-6
    assert sketched >= 3
    # the images are noise, and so is most of the first site's matrix
    assert reached[0] > 0.85
    assert min(reached[1:]) > 0.99


def test_blocks_around_each_step_add_up_like_one() -> None:
    torch.manual_seed(0)
    model, batches = Wide().double(), wide_batches(4)
    sites = fg.find_sites(model, batches[0][0])
    with fg.observe(model, sites, growth="sketch", rank=2) as whole:
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()
    watching = fg.observe(model, sites, growth="sketch", rank=2)
    for number, (x, y) in enumerate(batches):
        with watching.block(last=number == 3) as seen:
            F.cross_entropy(model(x), y).backward()
        assert seen.has_directions == (number == 3)
    for name, found in whole.directions(2).items():
        torch.testing.assert_close(seen.directions(2)[name].left, found.left)


def test_nothing_of_a_batch_is_kept() -> None:
    model, batches = Wide().double(), wide_batches(3)
    sites = fg.find_sites(model, batches[0][0])
    kept: list[weakref.ref[Tensor]] = []
    counts: list[int] = []
    watching = [True]

    def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad or not watching:
            return
        kept.append(weakref.ref(args[0]))
        output.register_hook(lambda g: kept.append(weakref.ref(g)))

    handles = [getattr(model, name).register_forward_hook(watch) for name in ("c1", "fc2")]
    with fg.observe(model, sites, growth="sketch", rank=1):
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()
            gc.collect()
            assert len(kept) >= 4
            assert all(reference() is None for reference in kept)
            with torch.no_grad():
                model(x)
            watching.clear()
            model(x)  # a forward pass alone
            watching.append(True)
            counts.append(sum(type(o) is Tensor for o in gc.get_objects()))
    for handle in handles:
        handle.remove()
    assert counts[2] - counts[1] <= 2  # a batch's readings


def test_two_forward_passes_before_one_backward() -> None:
    torch.manual_seed(0)
    model, ((x, y), (u, v)) = Wide().double().eval(), wide_batches(2)
    sites = fg.find_sites(model, x)
    results = []
    for joint in (True, False):
        with fg.observe(model, sites, growth="sketch", rank=1) as seen:
            if joint:
                (F.cross_entropy(model(x), y) + F.cross_entropy(model(u), v)).backward()
            else:
                F.cross_entropy(model(u), v).backward()
                F.cross_entropy(model(x), y).backward()
        results.append(seen)
    assert results[0].nagn == pytest.approx(results[1].nagn)
    for name, found in results[0].directions(1).items():
        # Two estimates may differ in which entry is the largest, which is made positive.
        overlap = abs(float((found.left * results[1].directions(1)[name].left).sum()))
        assert overlap > 0.9, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations(reentrant: bool) -> None:
    class Checkpointed(Wide):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(lambda x: self.relu(self.c1(self.pool(self.relu(self.c0(x))))), x, use_reentrant=reentrant)
            x = checkpoint(lambda x: self.relu(self.c2(self.relu(self.norm(x)))).flatten(1), x, use_reentrant=reentrant)
            return self.out(self.relu(self.fc3(self.relu(self.fc2(self.relu(self.fc1(x)))))))

    plain, wrapped = Wide().double().eval(), Checkpointed().double().eval()
    wrapped.load_state_dict(plain.state_dict())
    batches = wide_batches(2)
    sites = fg.find_sites(plain, batches[0][0])
    results = []
    for model in (plain, wrapped):
        with fg.observe(model, sites, growth="sketch", rank=1) as seen:
            for x, y in batches:
                F.cross_entropy(model(x.requires_grad_()), y).backward()
        results.append(seen)
    for name, found in results[0].directions(1).items():
        torch.testing.assert_close(found.left, results[1].directions(1)[name].left)


def test_under_autocast() -> None:
    torch.manual_seed(0)
    model = Wide()
    batches = [(x.float(), y) for x, y in wide_batches(3)]
    sites = fg.find_sites(model, batches[0][0])
    results = []
    for enabled in (True, False):
        with (
            fg.observe(model, sites, growth="sketch", rank=1) as seen,
            torch.autocast("cpu", torch.bfloat16, enabled=enabled),
        ):
            for x, y in batches:
                F.cross_entropy(model(x).float(), y).backward()
        results.append(seen)
    for name, found in results[0].directions(1).items():
        assert found.left.dtype == torch.float32
        assert found.values[0].item() == pytest.approx(results[1].directions(1)[name].values[0].item(), rel=0.2), name
    alike = [(f.left * results[1].directions(1)[n].left).sum().item() for n, f in results[0].directions(1).items()]
    assert min(map(abs, alike[2:])) > 0.9  # of the first two sites the leading values lie close together


class Scaler:
    """A GradScaler whose scale moves between steps."""

    def __init__(self) -> None:
        self.value = 8.0

    def get_scale(self) -> float:
        return self.value


def test_a_scale_that_moves_and_batches_that_overflow() -> None:
    torch.manual_seed(0)
    model, batches = Wide().double().eval(), wide_batches(4)
    sites = fg.find_sites(model, batches[0][0])
    with fg.observe(model, sites, growth="sketch", rank=1) as plain:
        for x, y in batches[:3]:
            F.cross_entropy(model(x), y).backward()
    scaler = Scaler()
    with fg.observe(model, sites, growth="sketch", rank=1, loss_scale=scaler) as seen:
        for x, y in batches[:2]:
            (scaler.value * F.cross_entropy(model(x), y)).backward()
            scaler.value *= 4
        (float("inf") * F.cross_entropy(model(batches[3][0]), batches[3][1])).backward()
        scaler.value /= 2
        (scaler.value * F.cross_entropy(model(batches[2][0]), batches[2][1])).backward()
    assert (seen.dropped, seen.samples) == (1, plain.samples)
    assert seen.nagn == pytest.approx(plain.nagn, rel=1e-12)
    for name, found in plain.directions(1).items():
        torch.testing.assert_close(seen.directions(1)[name].left, found.left)
        torch.testing.assert_close(seen.directions(1)[name].values, found.values)
    first = fg.observe(model, sites, growth="sketch", rank=1, loss_scale=scaler)
    with first as late:  # the batch that would choose Omega overflows
        for x, y, factor in ((*batches[3], float("inf")), *((*batch, scaler.value) for batch in batches[:3])):
            (factor * F.cross_entropy(model(x), y)).backward()
    for name, found in plain.directions(1).items():
        torch.testing.assert_close(late.directions(1)[name].left, found.left)


def test_a_gradient_that_is_not_finite_is_an_error_without_a_scaler() -> None:
    model, ((x, y),) = Wide().double(), wide_batches(1)
    sites = fg.find_sites(model, x)
    with (
        pytest.raises(fg.GrowthError, match="layer 'out'.*not finite"),
        fg.observe(model, sites, nagn=True, growth="sketch", rank=1),
    ):
        (F.cross_entropy(model(x), y) * float("nan")).backward()


def test_norms_alone_are_read_when_somebody_looks() -> None:
    model, ((x, y),) = Wide().double(), wide_batches(1)
    sites = fg.find_sites(model, x)
    with fg.observe(model, sites, growth=False) as seen:
        (F.cross_entropy(model(x), y) * float("nan")).backward()
    with pytest.raises(fg.GrowthError, match="layer 'out'.*not finite"):
        _ = seen.nagn


def test_what_cannot_be_sketched_is_refused_by_name() -> None:
    x = torch.randn(2, 4, 3)
    model = Gated()
    sites = fg.find_sites(model, x)
    with pytest.raises(fg.GrowthError, match="site 'qkv'.*growth=True"):
        fg.observe(model, sites, growth="sketch")
    fg.observe(model, sites, growth="sketch", rank={"embed": 2})
    with pytest.raises(fg.GrowthError, match="'sketch'"):
        fg.observe(model, sites, growth="sketchy")
    plain = Plain()
    image = image_batch(dtype=torch.float32)[0]
    sites = fg.find_sites(plain, image)
    with pytest.raises(fg.GrowthError, match="signed pairs"):
        fg.observe(plain, sites, growth="sketch", signed={"conv1": 1e-4})
    for how in (fg.how.TINY(), fg.how.GradMax(relu="pairs")):
        with pytest.raises(fg.GrowthError, match="TINY reads|signed pairs"):
            fg.Grower(
                plain,
                torch.optim.SGD(plain.parameters(), lr=0.1),
                sites=sites,
                when=fg.when.Every(3),
                where=fg.where.Everywhere(units=2),
                how=how,
                growth="sketch",
            )


@pytest.mark.parametrize("nagn", [True, False])
def test_a_second_backward_pass_is_refused(nagn: bool) -> None:
    model, ((x, y),) = Wide().double(), wide_batches(1)
    sites = fg.find_sites(model, x)
    with fg.observe(model, sites, nagn=nagn, growth="sketch", rank=1):
        loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        with pytest.raises(fg.GrowthError, match="second backward"):
            loss.backward()


def test_a_batch_that_reaches_a_site_in_part_is_refused() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.a(x))
            return self.b(h), self.c(h)

    model, x = TwoHeads(), torch.randn(5, 64)
    sites = fg.find_sites(model, x)
    with (
        pytest.raises(fg.GrowthError, match="layer 'c': no gradient was seen"),
        fg.observe(model, sites, growth="sketch", rank=1),
    ):
        model(x)[0].square().mean().backward()


# -- the Grower -------------------------------------------------------------------------------------------


def looped(steps: int, metrics: Callable[[int], float | None] = lambda step: None, **options: object) -> fg.Grower:
    torch.manual_seed(0)
    model = Wide()
    batches = [(x.float(), y) for x, y in wide_batches(steps)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options.setdefault("where", fg.where.Everywhere(units=1))
    grower = fg.Grower(model, optimizer, example_inputs=batches[0][0], **options)  # type: ignore[arg-type]
    for number, (x, y) in enumerate(batches, 1):
        with grower.observe():
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step()
        if (value := metrics(number)) is not None:
            grower.step(metric=value)
    return grower


@pytest.mark.parametrize("growth", ["exact", "sketch"])
def test_the_grower_measures_the_steps_before_a_growth(growth: str) -> None:
    class Counting(fg.where.Everywhere):
        reads = frozenset({"nagn"})

    grower = looped(14, when=fg.when.Every(8, start=5, times=2), batches=6, growth=growth, where=Counting(units=1))
    assert [report.step for report in grower.history] == [5, 13]
    assert not grower.armed
    for report in grower.history:
        assert all(site.captured is not None and site.captured > 0.4 for site in report.sites)


def test_a_window_holds_as_many_steps_as_there_are() -> None:
    samples: list[int] = []
    original = fg.Grower._evidence

    class Watching(fg.Grower):
        def _evidence(self, seen: fg.Observation | None):  # type: ignore[no-untyped-def]
            samples.append(0 if seen is None else seen.samples)
            return original(self, seen)

    torch.manual_seed(0)
    model, (x, y) = Wide(), wide_batches(1)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    grower = Watching(
        model,
        optimizer,
        example_inputs=x.float(),
        when=fg.when.Milestones([3, 10]),
        where=fg.where.Everywhere(units=1),
        batches=5,
        growth="sketch",
    )
    for _ in range(10):
        with grower.observe():
            F.cross_entropy(model(x.float()), y).backward()
        grower.step()
    assert [report.step for report in grower.history] == [3, 10]
    assert samples == [3 * len(x), 5 * len(x)]


def test_a_metric_arms_and_growth_comes_when_the_steps_are_measured() -> None:
    grower = looped(
        8,
        lambda step: 0.5 if step in (1, 2) else None,
        when=fg.when.Plateau(window=1, min_gain=3e-3, stop_gain=0.0),
        batches=4,
        growth="sketch",
    )
    assert [report.step for report in grower.history] == [6]


def test_methods_that_measure_nothing_do_not_grow_early() -> None:
    grower = looped(6, when=fg.when.Milestones([4]), batches=3, how=fg.how.ZeroOutgoing())
    assert [report.step for report in grower.history] == [4]


def test_state_goes_on_in_the_middle_of_a_window() -> None:
    grower = looped(3, when=fg.when.Milestones([5]), batches=4, growth="sketch")
    model, (x, y) = Wide(), wide_batches(1)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    other = fg.Grower(
        model,
        optimizer,
        example_inputs=x.float(),
        when=fg.when.Milestones([5]),
        where=fg.where.Everywhere(units=1),
        batches=4,
        growth="sketch",
    )
    other.load_state_dict(grower.state_dict())
    for _ in range(2):
        with other.observe():
            F.cross_entropy(model(x.float()), y).backward()
        other.step()
    assert [report.step for report in other.history] == [5]
