"""Schedules: the papers' exact numbers, loaders that follow, and costs counted in FLOPs."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from fastgrow import schedule
from fastgrow.errors import GrowthError


def test_the_papers_numbers() -> None:
    assert schedule.widths(16, 64) == [16, 20, 24, 28, 34, 40, 48, 58, 64]
    assert schedule.epochs(160, 8) == [8, 10, 12, 14, 17, 20, 24, 29, 26]
    assert schedule.widths(64, 512, rate=1.0, stages=4) == [64, 128, 256, 512]
    # 128 + 26, 154 + 31, 185 + 37, ... backwards from the full network.
    assert schedule.batch_sizes(128, 0.2, 4) == [222, 185, 154, 128]


def test_narrow_widths_grow_by_two_at_least_and_never_pass_the_end() -> None:
    assert schedule.widths(4, 16) == [4, 6, 8, 10, 12, 14, 16, 16, 16]
    assert schedule.widths(5, 5, stages=1) == [5]
    assert schedule.widths(6, 6, stages=3) == [6, 6, 6]
    assert schedule.widths(10, 13, stages=3) == [10, 12, 13]
    assert schedule.widths(25, 60, rate=0.2, stages=3) == [25, 31, 60]  # 5 lies between 4 and 6: upwards


@given(st.integers(1, 300), st.integers(0, 300), st.floats(0.01, 2), st.integers(2, 12))
def test_widths_rise_to_the_end(initial: int, more: int, rate: float, stages: int) -> None:
    curve = schedule.widths(initial, initial + more, rate, stages)
    assert len(curve) == stages
    assert curve[0] == initial
    assert curve[-1] == initial + more
    assert curve == sorted(curve)
    steps = [after - before for before, after in pairwise(curve[:-1])]
    assert all(step % 2 == 0 or after == initial + more for step, after in zip(steps, curve[1:], strict=False))


@given(st.integers(1, 20), st.floats(0, 0.5), st.integers(1, 8))
def test_epochs_add_up(first: int, rate: float, stages: int) -> None:
    lengths = schedule.epochs(5000, first, rate, stages)
    assert len(lengths) == stages
    assert sum(lengths) == 5000
    assert lengths[:-1] == sorted(lengths[:-1])


def data(count: int = 20) -> TensorDataset:
    return TensorDataset(torch.arange(count))


def values(loader: Any) -> list[list[int]]:
    return [batch[0].tolist() for batch in loader]


def test_the_loader_follows() -> None:
    loader = DataLoader(data(), batch_size=3, drop_last=True)
    batches = schedule.BatchSize(loader, [8, 4])
    assert values(batches) == [list(range(8)), list(range(8, 16))]
    assert (len(batches), batches.batch_size, batches.stage) == (2, 8, 0)
    batches.stage = 1
    assert [len(batch) for batch in values(batches)] == [4] * 5
    assert len(batches) == 5
    batches.stage = 7  # past the end the last size stays
    assert (batches.batch_size, batches.stage) == (4, 7)
    assert values(loader)[0] == [0, 1, 2]  # the user's own is as it was


def doubled(batch: list[tuple[Tensor, ...]]) -> list[Tensor]:
    return [2 * torch.stack([entry[0] for entry in batch])]


def started(worker: int) -> None:
    pass


def test_everything_else_of_the_loader_is_kept() -> None:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(
        data(),
        batch_size=5,
        shuffle=True,
        num_workers=1,
        collate_fn=doubled,
        worker_init_fn=started,
        timeout=7,
        generator=generator,
        prefetch_factor=3,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    built = schedule.BatchSize(loader, [10]).loader
    assert built.batch_size == 10
    for attribute in (
        "dataset",
        "sampler",
        "num_workers",
        "collate_fn",
        "pin_memory",
        "drop_last",
        "timeout",
        "worker_init_fn",
        "generator",
        "prefetch_factor",
        "persistent_workers",
        "in_order",
        "multiprocessing_context",
    ):
        assert getattr(built, attribute) == getattr(loader, attribute), attribute


def test_shuffling_goes_on_where_it_was() -> None:
    def order(sizes: list[int]) -> list[list[int]]:
        loader = DataLoader(data(), shuffle=True, generator=torch.Generator().manual_seed(1), batch_size=1)
        batches = schedule.BatchSize(loader, sizes)
        epochs = []
        for stage in range(2):
            batches.stage = stage
            epochs.append([value for batch in values(batches) for value in batch])
        return epochs

    first, second = order([7, 4])
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert order([20, 4])[0] == first


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(6))


def test_iterable_data_sets_and_resuming() -> None:
    batches = schedule.BatchSize(DataLoader(Stream(), batch_size=1), [4, 3])
    assert [batch.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5]]
    batches.stage = 1
    resumed = schedule.BatchSize(DataLoader(Stream(), batch_size=1), [4, 3])
    resumed.load_state_dict(batches.state_dict())
    assert [batch.tolist() for batch in resumed] == [[0, 1, 2], [3, 4, 5]]


def network(width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(), nn.Flatten(),
        nn.Linear(width * 64, 10),
    )  # fmt: skip


def test_flops_by_hand_and_without_a_trace() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    forward = 2 * 2 * 64 * 27 * 8 + 2 * 2 * 512 * 10
    x = torch.zeros(2, 3, 8, 8)
    assert schedule.flops(model, x, backward=False) == forward
    # The first layer's input needs no gradient: one backward product there, two at the linear layer.
    assert schedule.flops(model, (x,)) == forward + 2 * 2 * 64 * 27 * 8 + 2 * (2 * 2 * 512 * 10)
    assert schedule.flops(model, {"input": x}) == schedule.flops(model, x)
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    assert schedule.flops(model, x) == forward + 2 * 2 * 512 * 10
    assert all(parameter.grad is None and not parameter.is_meta for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_training_cost_by_hand() -> None:
    assert schedule.training_cost([1, 2, 4], [4, 2, 1]) == pytest.approx(100 * 12 / 28)
    assert schedule.training_cost([5], [3]) == pytest.approx(100)
    assert schedule.training_cost([1, 2], [4, 2], full_flops=8, full_length=10) == pytest.approx(10)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.shortcut(x)


IMAGE = torch.empty(1, 3, 32, 32, device="meta")


def resnet20(one: int, two: int, three: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, one, 3, padding=1, bias=False)]
    inputs = one
    for outputs, stride in ((one, 1), (two, 2), (three, 2)):
        layers += [Block(inputs, outputs, stride), Block(outputs, outputs, 1), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(three, 10))


def test_cost_of_growing_a_resnet20_in_the_readings_tried() -> None:
    """The paper's figure is 54.9 %; its text does not say which curve narrow layers follow."""
    wide = schedule.widths(16, 64)
    curves = {
        "each layer, two units at least": [schedule.widths(full // 4, full) for full in (16, 32, 64)],
        "all in proportion to the widest": [[width * full // 64 for width in wide] for full in (16, 32, 64)],
    }
    cost, equal = {}, {}
    for name, curve in curves.items():
        stages = [schedule.flops(resnet20(*widths), IMAGE, backward=False) for widths in zip(*curve, strict=True)]
        cost[name] = schedule.training_cost(stages, schedule.epochs(160, 8))
        equal[name] = schedule.training_cost(stages, [1] * 9)
    assert cost["each layer, two units at least"] == pytest.approx(58.3, abs=0.1)
    assert cost["all in proportion to the widest"] == pytest.approx(50.8, abs=0.1)
    assert equal["all in proportion to the widest"] == pytest.approx(39.3, abs=0.1)


def test_cost_of_growing_a_resnet18_is_the_papers() -> None:
    """The paper: 52.6 % on CIFAR-100; each layer grows along a curve of its own."""

    def resnet18(*widths: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1, bias=False)]
        inputs = widths[0]
        for place, outputs in enumerate(widths):
            layers += [Block(inputs, outputs, 1 if place == 0 else 2), Block(outputs, outputs, 1)]
            inputs = outputs
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 100))

    curves = [schedule.widths(full // 4, full) for full in (64, 128, 256, 512)]
    stages = [schedule.flops(resnet18(*widths), IMAGE, backward=False) for widths in zip(*curves, strict=True)]
    assert schedule.training_cost(stages, schedule.epochs(160, 8)) == pytest.approx(52.6, abs=2)


def test_flop_matched_lengths() -> None:
    # A growing run of cost 12 in units where the full network costs 4 an epoch: three epochs.
    assert schedule.flop_matched([1], [4], 12) == [3]
    assert schedule.flop_matched([1], [4], 15.9) == [3]
    assert schedule.flop_matched([4, 2, 1], [1, 2, 4], 24) == [8, 4, 2]


@given(st.lists(st.tuples(st.floats(0.1, 50), st.floats(0.1, 10)), min_size=1, max_size=8), st.floats(1.001, 100))
def test_flop_matched_spends_the_budget_and_no_more(stages: list[tuple[float, float]], factor: float) -> None:
    lengths, costs = zip(*stages, strict=True)
    budget = factor * sum(costs)
    matched = schedule.flop_matched(lengths, costs, budget)
    spent = sum(length * Fraction(cost) for length, cost in zip(matched, costs, strict=True))
    assert all(length >= 1 for length in matched)
    assert spent <= budget
    assert budget - spent < sum(costs)


@pytest.mark.parametrize(
    ("build", "seen"),
    [
        (lambda: schedule.widths(16, 8), "final=8"),
        (lambda: schedule.widths(8, 16, stages=1), "1 stages"),
        (lambda: schedule.widths(8, 16, rate=0), "rate=0"),
        (lambda: schedule.widths(8.5, 16), "initial=8.5"),
        (lambda: schedule.epochs(100, 8), "total=100"),
        (lambda: schedule.epochs(100, 8, rate=-1), "rate=-1"),
        (lambda: schedule.batch_sizes(0), "base=0"),
        (lambda: schedule.batch_sizes(8, stages=0), "stages=0"),
        (lambda: schedule.BatchSize(DataLoader(data()), []), "empty"),
        (lambda: schedule.BatchSize(DataLoader(data()), [4, 0]), "sizes=0"),
        (lambda: schedule.BatchSize(DataLoader(data(), batch_size=None), [4]), "batch_size="),
        (
            lambda: schedule.BatchSize(DataLoader(data(), batch_sampler=[[0], [1, 2]]), [4]),
            "batch sampler",
        ),
        (
            lambda: schedule.BatchSize(
                DataLoader(data(), batch_sampler=BatchSampler(RandomSampler(data()), 2, False)), [4]
            ),
            "batch sampler",
        ),
        (lambda: schedule.BatchSize(type("Own", (DataLoader,), {})(data()), [4]), "Own"),
        (lambda: schedule.flops(nn.Linear(2, 2).requires_grad_(False), torch.ones(1, 2)), "gradient"),
        (lambda: schedule.training_cost([1, 2], [1]), "2 numbers"),
        (lambda: schedule.training_cost([], []), "0 numbers"),
        (lambda: schedule.training_cost([0], [1]), "stage_flops=0"),
        (lambda: schedule.flop_matched([1, 1], [2, 3], 4), "at least 5"),
    ],
)
def test_bad_arguments_are_named(build: Callable[[], Any], seen: str) -> None:
    with pytest.raises(GrowthError, match=seen):
        build()
