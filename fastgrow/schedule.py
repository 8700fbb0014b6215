"""Schedules of a growing run: widths, epochs and batch sizes by stage, and what the run costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.flop_counter import FlopCounterMode

from .arguments import number, whole
from .errors import GrowthError

__all__ = ["BatchSize", "batch_sizes", "epochs", "flop_matched", "flops", "training_cost", "widths"]


def _rounded(value: float) -> int:
    return math.floor(value + 0.5)


def widths(initial: int, final: int, rate: float = 0.2, stages: int = 9) -> list[int]:
    """The width of a site in each stage (variance transfer, eq. 6).

    ``C_t = C_{t-1} + round_even(rate C_{t-1})``, at least 2 more, at most `final`; the last stage has the
    full width. round_even is the nearest even number, ties upwards, so that units come in pairs; the last
    step is odd where `final - initial` is. ``widths(16, 64) == [16, 20, 24, 28, 34, 40, 48, 58, 64]``.

    Raises `GrowthError` for a `final` below `initial`, numbers that are not positive, and a single stage
    that would have to hold both widths.
    """
    initial = whole("schedule.widths", "initial", initial)
    final = whole("schedule.widths", "final", final)
    rate = number("schedule.widths", "rate", rate, above=0)
    stages = whole("schedule.widths", "stages", stages)
    if final < initial or (stages == 1 and final != initial):
        raise GrowthError(
            f"schedule.widths: from initial={initial} to final={final} in {stages} stages; wanted a final "
            "width of at least the initial one, and two stages or more to reach it"
        )
    curve = [initial]
    for _ in range(stages - 2):
        step = max(2, 2 * _rounded(rate * curve[-1] / 2))
        curve.append(min(final, curve[-1] + step))
    return [*curve, final][:stages]


def epochs(total: int, first: int, rate: float = 0.2, stages: int = 9) -> list[int]:
    """The number of epochs of each stage (variance transfer, eq. 7).

    ``T_t = T_{t-1} + round(rate T_{t-1})``, T_0 = `first`; the last stage has what remains of `total`.
    ``epochs(160, 8) == [8, 10, 12, 14, 17, 20, 24, 29, 26]``. In steps or tokens it works just as well.

    Raises `GrowthError` where nothing remains for the last stage, and for numbers that are not positive
    (`rate` may be 0: equal stages).
    """
    total = whole("schedule.epochs", "total", total)
    first = whole("schedule.epochs", "first", first)
    rate = number("schedule.epochs", "rate", rate, least=0)
    stages = whole("schedule.epochs", "stages", stages)
    lengths: list[int] = []
    for _ in range(stages - 1):
        lengths.append(lengths[-1] + _rounded(rate * lengths[-1]) if lengths else first)
    rest = total - sum(lengths)
    if rest < 1:
        raise GrowthError(
            f"schedule.epochs: the first {stages - 1} of {stages} stages take {sum(lengths)} of "
            f"total={total} epochs; wanted some left for the last: lower first, rate or stages"
        )
    return [*lengths, rest]


def batch_sizes(base: int, rate: float = 0.2, stages: int = 9) -> list[int]:
    """The batch size of each stage, largest first (variance transfer, eq. 8).

    ``B_{t-1} = B_t + round(rate B_t)``, the last stage at `base`, the batch size of the full network; the
    learning rate is not re-scaled. That the last stage is the one with `base`: **likely**.

    Raises `GrowthError` for numbers that are not positive (`rate` may be 0).
    """
    sizes = [whole("schedule.batch_sizes", "base", base)]
    rate = number("schedule.batch_sizes", "rate", rate, least=0)
    for _ in range(whole("schedule.batch_sizes", "stages", stages) - 1):
        sizes.append(sizes[-1] + _rounded(rate * sizes[-1]))
    return sizes[::-1]


class BatchSize:
    """A `DataLoader` whose batch size follows the stages of growth.

    ::

        batches = fg.schedule.BatchSize(loader, fg.schedule.batch_sizes(128))
        for x, y in batches: ...        # stage 0
        batches.stage = 1               # after a growth: from the next iteration on

    Each stage has a `DataLoader` of its own with everything else as in `loader`: data set, sampler (the
    same object, so shuffling goes on where it was), workers, collate function, generator, pinning. `stage`
    counts from 0; past the end of `sizes` the last size stays. Under data parallelism sizes are per rank.

    Raises `GrowthError` for a subclass of `DataLoader` and for a loader with a batch sampler of its own,
    which cannot be built anew, and for sizes that are not positive integers.
    """

    def __init__(self, loader: DataLoader[Any], sizes: Sequence[int]) -> None:
        if type(loader) is not DataLoader:
            raise GrowthError(
                f"schedule.BatchSize: loader is a {type(loader).__name__}; wanted a "
                "torch.utils.data.DataLoader itself, which can be built anew with another batch size"
            )
        if loader.batch_size is None:
            raise GrowthError(
                "schedule.BatchSize: loader has a batch sampler of its own, or none; wanted one made with batch_size="
            )
        self.sizes = [whole("schedule.BatchSize", "sizes", size) for size in sizes]
        if not self.sizes:
            raise GrowthError("schedule.BatchSize: sizes is empty; wanted one batch size a stage")
        self._stage = 0
        self.loader = self._built(loader)

    @property
    def stage(self) -> int:
        return self._stage

    @stage.setter
    def stage(self, stage: int) -> None:
        stage = whole("schedule.BatchSize", "stage", stage, least=0)
        before, self._stage = self.batch_size, stage
        if self.batch_size != before:
            self.loader = self._built(self.loader)

    @property
    def batch_size(self) -> int:
        """Of the present stage."""
        return self.sizes[min(self._stage, len(self.sizes) - 1)]

    def _built(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        return DataLoader(
            loader.dataset,
            batch_size=self.batch_size,
            sampler=None if isinstance(loader.dataset, IterableDataset) else loader.sampler,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            drop_last=loader.drop_last,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
            pin_memory_device=loader.pin_memory_device,
            in_order=loader.in_order,
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)

    def state_dict(self) -> dict[str, int]:
        return {"stage": self._stage}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.stage = state["stage"]


def flops(model: nn.Module, example_inputs: Any, *, backward: bool = True) -> int:
    """FLOPs of one forward pass (and its backward pass), by `torch.utils.flop_counter`.

    example_inputs: a tensor, a tuple (args) or a dict (kwargs), as in `find_sites`; divide by its batch
    size for FLOPs a sample. A multiply-add counts two. Matrix products, convolutions and attention are
    counted, element-wise work is not. Runs on the meta device: nothing is computed, and parameters,
    buffers and gradients stay as they are. Frozen parameters need no weight gradient and are not charged.

    Raises whatever the model raises on meta tensors (a model whose control flow depends on values cannot
    be counted), and `GrowthError` where `backward` is asked of outputs without a gradient.
    """
    args: tuple[Any, ...] = (example_inputs,)
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, tuple):
        args = example_inputs
    elif isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    tensors = {
        name: tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    counter = FlopCounterMode(display=False)
    with torch.set_grad_enabled(backward), counter:
        output = functional_call(model, tensors, _on_meta(args), _on_meta(kwargs))
        if backward:
            outputs = [tensor for tensor in _tensors(output) if tensor.requires_grad]
            if not outputs:
                raise GrowthError("schedule.flops: no output has a gradient; wanted one, or backward=False")
            torch.autograd.backward(outputs, [torch.empty_like(tensor) for tensor in outputs])
    return counter.get_total_flops()


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("meta")
    if isinstance(value, Mapping):
        return {key: _on_meta(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_on_meta(entry) for entry in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _tensors(entry)


def training_cost(
    stage_flops: Sequence[float],
    lengths: Sequence[float],
    *,
    full_flops: float | None = None,
    full_length: float | None = None,
) -> float:
    """What a growing run costs, in per cent of training the full network from the start.

    ``100 sum_t F_t T_t / (F T)``: F_t the FLOPs a sample of stage t (`flops`), T_t its epochs; F is
    `full_flops`, by default the last stage's, T is `full_length`, by default ``sum_t T_t``. The papers' figures beside
    the readings tried: docs/methods.md.

    Raises `GrowthError` for numbers that are not positive and for lists of different lengths.
    """
    costs, times = _stages("schedule.training_cost", stage_flops, lengths)
    last = costs[-1] if full_flops is None else number("schedule.training_cost", "full_flops", full_flops, above=0)
    time = sum(times) if full_length is None else number("schedule.training_cost", "full_length", full_length, above=0)
    return 100 * math.fsum(cost * length for cost, length in zip(costs, times, strict=True)) / (last * time)


def flop_matched(lengths: Sequence[float], stage_flops: Sequence[float], budget: float) -> list[int]:
    """Stage lengths in the same proportions that spend a budget of FLOPs and not more.

    T'_t is near ``T_t budget / sum_t F_t T_t``, in whole epochs (or steps), at least 1 each;
    ``flop_matched([1], [F], budget)`` is how long a static network trains for the same FLOPs. `budget` and
    `stage_flops` are in the same units: FLOPs, and FLOPs an epoch (or a step).

    Raises `GrowthError` where the budget does not pay for one epoch a stage, for numbers that are not
    positive and for lists of different lengths.
    """
    costs, times = (
        [Fraction(value) for value in values]  # exact, so that a budget of whole epochs is spent whole
        for values in _stages("schedule.flop_matched", stage_flops, lengths)
    )
    left = Fraction(number("schedule.flop_matched", "budget", budget, above=0))
    if left < sum(costs):
        raise GrowthError(
            f"schedule.flop_matched: budget={budget:g} was given; wanted at least {float(sum(costs)):g}, "
            "one epoch a stage"
        )
    factor = left / sum(cost * time for cost, time in zip(costs, times, strict=True))
    exact = [factor * time for time in times]
    matched = [max(1, math.floor(length)) for length in exact]
    left -= sum(cost * length for cost, length in zip(costs, matched, strict=True))
    # The minimum of one epoch may overspend: the stages furthest above their share give it back.
    while left < 0:
        stage = max(
            (stage for stage, length in enumerate(matched) if length > 1),
            key=lambda stage: matched[stage] - exact[stage],
        )
        matched[stage] -= 1
        left += costs[stage]
    # What whole numbers left over goes to the stages furthest below theirs, one epoch each.
    for stage in sorted(range(len(matched)), key=lambda stage: matched[stage] - exact[stage]):
        if costs[stage] <= left:
            matched[stage] += 1
            left -= costs[stage]
    return matched


def _stages(owner: str, stage_flops: Sequence[float], lengths: Sequence[float]) -> tuple[list[float], list[float]]:
    costs = [number(owner, "stage_flops", value, above=0) for value in stage_flops]
    times = [number(owner, "lengths", value, above=0) for value in lengths]
    if len(costs) != len(times) or not costs:
        raise GrowthError(
            f"{owner}: stage_flops has {len(costs)} numbers, lengths has {len(times)}; wanted one of each a stage"
        )
    return costs, times
