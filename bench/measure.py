"""Timing side by side: variants take turns within one run, warm-up apart, inputs rotated beyond the cache."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "Timing",
    "Variant",
    "cache_bytes",
    "compare",
    "compare_ops",
    "copies_beyond_cache",
    "paired_ratio",
    "peak_bytes",
]

_TARGET_MS = {"cpu": 5.0, "cuda": 2.0}  # one sample of a fast op lasts at least this long
_MOST_COPIES = 64
_MEASURED = "what peak_bytes measures"


@dataclass
class Timing:
    """Milliseconds of one variant, one value a round, in the order of the rounds."""

    samples: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        """Linear interpolation between order statistics."""
        ordered = sorted(self.samples)
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    @property
    def p20(self) -> float:
        return self.quantile(0.2)

    @property
    def p50(self) -> float:
        return self.quantile(0.5)

    @property
    def p80(self) -> float:
        return self.quantile(0.8)

    def minus(self, other: Timing) -> Timing:
        """Differences round by round, over the rounds that both took part in."""
        return Timing([a - b for a, b in zip(self.samples, other.samples, strict=False)])


@dataclass
class Variant:
    """Something to time. prepare(round) is not timed; run gets what it returned.

    calls: how often `run` does the work itself (the time is divided by it). most: rounds it takes part in at
    most, for what is too slow to repeat.
    """

    run: Callable[[Any], object]
    prepare: Callable[[int], Any] = lambda number: number
    calls: int = 1
    most: int | None = None


def _timed(variant: Variant, state: Any, device: torch.device, events: bool) -> float:
    """Milliseconds of one run; on a GPU the queue is empty before it, and when the clock stops."""
    if device.type != "cuda":
        started = time.perf_counter()
        variant.run(state)
        return (time.perf_counter() - started) * 1000
    torch.cuda.synchronize(device)
    if not events:
        started = time.perf_counter()
        variant.run(state)
        torch.cuda.synchronize(device)
        return (time.perf_counter() - started) * 1000
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    variant.run(state)
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last)


def compare(
    variants: Mapping[str, Variant],
    device: torch.device,
    rounds: int,
    warmup: int = 1,
    *,
    events: bool = False,
) -> dict[str, Timing]:
    """Time variants in turns, A B C, C B A, ..., so that drift of the machine meets all of them alike.

    events: CUDA events, for short kernels; otherwise the wall clock between synchronisations, for steps
    that the host takes part in. Variants with `most` are warmed up by nothing: they are long.
    """
    for number in range(warmup):
        for variant in variants.values():
            if variant.most is None:
                _timed(variant, variant.prepare(-1 - number), device, events)
    timings = {name: Timing() for name in variants}
    for number in range(rounds):
        order = list(variants) if number % 2 == 0 else list(variants)[::-1]
        for name in order:
            variant = variants[name]
            if variant.most is None or number < variant.most:
                state = variant.prepare(number)
                timings[name].samples.append(_timed(variant, state, device, events) / variant.calls)
    return timings


def compare_ops(
    functions: Mapping[str, Callable[..., object]],
    inputs: Sequence[tuple[Any, ...]],
    device: torch.device,
    rounds: int,
) -> dict[str, Timing]:
    """Time functions of the same arguments: every call takes the next of `inputs`, all functions alike."""

    def looped(function: Callable[..., object], calls: int) -> Variant:
        def run(start: int) -> None:
            for i in range(calls):
                function(*inputs[(start + i) % len(inputs)])

        return Variant(run, lambda number: number * calls, calls)

    variants = {}
    for name, function in functions.items():
        once = looped(function, 1)
        _timed(once, 0, device, False)  # compilation and first allocations
        spent = min(_timed(once, i, device, False) for i in (1, 2))
        calls = max(1, min(1000, math.ceil(_TARGET_MS[device.type] / max(spent, 1e-4))))
        variants[name] = looped(function, calls)
    return compare(variants, device, rounds, events=True)


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; 64 MiB where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * units.get(text[-1:], 1))
    return max(sizes) or 64 << 20


def copies_beyond_cache(make: Callable[[int], tuple[Any, ...]], device: torch.device) -> list[tuple[Any, ...]]:
    """make(0), make(1), ...: at least two, together more than twice the last-level cache."""
    inputs = [make(0)]
    size = sum(t.numel() * t.element_size() for t in inputs[0] if isinstance(t, torch.Tensor))
    wanted = math.ceil(2 * cache_bytes(device) / max(size, 1))
    inputs += [make(i) for i in range(1, max(2, min(_MOST_COPIES, wanted)))]
    return inputs


def paired_ratio(ours: Timing, baseline: Timing) -> tuple[float, float, float]:
    """Median of ours / baseline over paired rounds, and its 95 % confidence interval.

    The interval is that of the sign test: order statistics x_(j), x_(n+1-j) with the largest j for which
    2 P(Bin(n, 1/2) < j) <= 0.05; no distribution is assumed. With fewer than six pairs it is (-inf, inf).
    """
    ratios = sorted(a / b for a, b in zip(ours.samples, baseline.samples, strict=True))
    count, tail, j = len(ratios), 0.0, 0
    while 2 * (tail + math.comb(count, j) / 2**count) <= 0.05:
        tail += math.comb(count, j) / 2**count
        j += 1
    median = statistics.median(ratios)
    return (median, ratios[j - 1], ratios[count - j]) if j else (median, -math.inf, math.inf)


def peak_bytes(
    function: Callable[..., object], device: torch.device, prepare: Callable[[], object] | None = None
) -> int:
    """Most memory that tensors take during one call, beyond what was allocated before it.

    prepare: makes what the function is called with. CPU: from the profiler's record of every allocation, which tells
    that memory was let go of only where it saw it taken: so what goes during the call must come from `prepare`. What
    oneDNN keeps for itself is not in it.
    """
    if device.type == "cuda":
        given = [] if prepare is None else [prepare()]
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function(*given)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as recorded:
        given = [] if prepare is None else [prepare()]
        with torch.profiler.record_function(_MEASURED):
            function(*given)
    results: Any = recorded.profiler
    events = sorted(results.kineto_results.events(), key=lambda event: event.start_ns())
    level = peak = 0
    for event in events:
        if event.name() == _MEASURED:
            level = peak = 0
        elif event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak
