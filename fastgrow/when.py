"""When to grow: policies that the Grower asks before every step and feeds with what it measures.

A policy answers through one of three questions, and says no to the others: `coming`, where growth can be
foreseen; `metric`, where it depends on a validation metric; `gain`, where it depends on what growth would
bring. Its state is plain numbers and lists, so that it fits a checkpoint loaded with ``weights_only=True``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from .arguments import choice, number, whole
from .errors import GrowthError

__all__ = ["Every", "Gain", "Milestones", "Plateau", "Stages", "When"]


class When:
    """A policy that never grows; the others answer one of its questions."""

    reads: frozenset[str] = frozenset()
    """What the Grower must observe for this policy: ``{"directions"}`` for `Gain`."""

    def coming(self, step: int) -> bool:
        """Shall growth come on this step? Asked once before each training step, which count from 1.

        Growth on step s comes after the s-th update, so that step s + 1 trains the larger network.
        """
        return False

    def measures(self, step: int) -> bool:
        """Must `reads` be observed on this step?"""
        return bool(self.reads)

    def metric(self, value: float) -> bool:
        """Takes one value of the metric given to ``grower.step(metric=...)``; True arms a growth."""
        return False

    def gain(self, gains: Mapping[str, float]) -> bool:
        """Takes what growth would bring at each site (see `Gain`); True arms a growth."""
        return False

    def grew(self, step: int) -> None:
        """Told after each growth."""

    @property
    def exhausted(self) -> bool:
        """True once no question will ever be answered with yes again."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, beside the same constructor arguments."""
        return {"policy": type(self).__name__}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state saved by a policy of the same class; any other raises `GrowthError`."""
        wanted = self.state_dict()
        if state.get("policy") != wanted["policy"] or state.keys() != wanted.keys():
            raise GrowthError(
                f"when.{wanted['policy']}: the state is that of {state.get('policy')!r} with keys "
                f"{sorted(state)}; wanted {wanted['policy']!r} with keys {sorted(wanted)}; build the policy "
                "that the checkpoint was saved with"
            )


class _Foreseen(When):
    """Growth on steps that are known ahead; remembers how far it was asked."""

    def __init__(self) -> None:
        self._asked = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "step": self._asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._asked = int(state["step"])


class Every(_Foreseen):
    """Growth on steps ``start``, ``start + steps``, ``start + 2 steps``, ...: at most `times` of them.

    start: the first of these steps; by default `steps`.
    Raises `GrowthError` for anything but positive integers.
    """

    def __init__(self, steps: int, start: int | None = None, times: int | None = None) -> None:
        super().__init__()
        self.steps = whole("when.Every", "steps", steps)
        self.start = self.steps if start is None else whole("when.Every", "start", start)
        self.times = None if times is None else whole("when.Every", "times", times)

    def coming(self, step: int) -> bool:
        self._asked = step
        turn, rest = divmod(step - self.start, self.steps)
        return turn >= 0 and rest == 0 and (self.times is None or turn < self.times)

    @property
    def exhausted(self) -> bool:
        return self.times is not None and self._asked >= self.start + (self.times - 1) * self.steps


class Milestones(_Foreseen):
    """Growth on exactly these steps: positive integers, in rising order."""

    def __init__(self, steps: Iterable[int]) -> None:
        super().__init__()
        name = f"when.{type(self).__name__}"
        if not isinstance(steps, Iterable):
            raise GrowthError(f"{name}: steps={steps!r} was given; wanted a list of steps")
        self.steps = tuple(whole(name, "steps", step) for step in steps)
        if any(later <= earlier for earlier, later in zip(self.steps, self.steps[1:], strict=False)):
            raise GrowthError(f"{name}: steps={list(self.steps)} was given; wanted rising steps")

    def coming(self, step: int) -> bool:
        self._asked = step
        return step in self.steps

    @property
    def exhausted(self) -> bool:
        return not self.steps or self._asked >= self.steps[-1]


class Stages(Milestones):
    """Growth at the end of every stage but the last (variance transfer, Algorithm 1).

    schedule: the length of each stage, in epochs or in steps: `fastgrow.schedule.epochs`.
    steps_per_epoch: steps in one unit of `schedule`; one number a stage where the batch size follows the
    stages (`fastgrow.schedule.batch_sizes`).

    ``Stages([8, 10, 12])`` grows on steps 8 and 18. Raises `GrowthError` for a length that is not a
    positive integer, and for as many numbers of steps as there are not stages.
    """

    def __init__(self, schedule: Iterable[int], steps_per_epoch: int | Sequence[int] = 1) -> None:
        if not isinstance(schedule, Iterable):
            raise GrowthError(f"when.Stages: schedule={schedule!r} was given; wanted a list of stages' lengths")
        lengths = [whole("when.Stages", "schedule", length) for length in schedule]
        given = list(steps_per_epoch) if isinstance(steps_per_epoch, Sequence) else [steps_per_epoch] * len(lengths)
        steps = [whole("when.Stages", "steps_per_epoch", value) for value in given]
        if len(steps) != len(lengths):
            raise GrowthError(
                f"when.Stages: steps_per_epoch has {len(steps)} numbers for {len(lengths)} stages; "
                "wanted one number, or one a stage"
            )
        ends, end = [], 0
        for length, unit in zip(lengths, steps, strict=True):
            end += length * unit
            ends.append(end)
        super().__init__(ends[:-1])


class Plateau(When):
    """Growth when the validation metric has flattened out (NAGN, section 4).

    With A_curr and A_prev the means of the last `window` values and of the `window` before them, a trigger
    occurs when ``(A_curr - A_prev) / |A_prev| < min_gain``; the windows are disjoint, so the first trigger
    needs 2 `window` values. If A_curr has improved by less than `stop_gain` since the previous trigger,
    that trigger does not grow, nor does anything after it.

    mode: "max" for an accuracy, "min" for a loss (the gain is then A_prev - A_curr).
    stop_relative: the paper does not say whether `stop_gain` is a difference of accuracies (the default)
    or relative to the earlier one (True). **Open**.
    After a trigger the windows start afresh: what was measured before a growth says nothing about the
    grown network. **Open**: the paper says only when the first trigger may come.

    Raises `GrowthError` for a `window` below 1, thresholds that are not finite, and a metric that is not
    finite.
    """

    def __init__(
        self,
        window: int = 3,
        min_gain: float = 3e-3,
        stop_gain: float = 5e-2,
        *,
        mode: Literal["max", "min"] = "max",
        stop_relative: bool = False,
    ) -> None:
        self.window = whole("when.Plateau", "window", window)
        self.min_gain = number("when.Plateau", "min_gain", min_gain)
        self.stop_gain = number("when.Plateau", "stop_gain", stop_gain)
        self.sign = 1.0 if choice("when.Plateau", "mode", mode, ("max", "min")) == "max" else -1.0
        self.stop_relative = stop_relative
        self._values: list[float] = []
        self._at_trigger: float | None = None
        self._stopped = False

    def _improvement(self, now: float, before: float, relative: bool) -> float:
        difference = self.sign * (now - before)
        if not relative or difference == 0:
            return difference
        # A start from exactly zero is an unbounded relative gain, in the direction of the difference.
        return difference / abs(before) if before else math.copysign(math.inf, difference)

    def metric(self, value: float) -> bool:
        value = number("when.Plateau", "metric", value)
        if self._stopped:
            return False
        self._values = [*self._values, value][-2 * self.window :]
        if len(self._values) < 2 * self.window:
            return False
        previous = math.fsum(self._values[: self.window]) / self.window
        current = math.fsum(self._values[self.window :]) / self.window
        if self._improvement(current, previous, relative=True) >= self.min_gain:
            return False
        if self._at_trigger is not None:
            gained = self._improvement(current, self._at_trigger, self.stop_relative)
            self._stopped = gained < self.stop_gain
        self._at_trigger = current
        self._values = []
        return not self._stopped

    @property
    def exhausted(self) -> bool:
        return self._stopped

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "values": list(self._values),
            "at_trigger": self._at_trigger,
            "stopped": self._stopped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._values = [float(value) for value in state["values"]]
        self._at_trigger = None if state["at_trigger"] is None else float(state["at_trigger"])
        self._stopped = bool(state["stopped"])


class Gain(When):
    """Growth when it would gain enough, judged by singular values.

    `gains` gives for each site the squared gradient norm that its new units would attain, ``sum_i s_i^2``
    (GradMax, eq. 11), divided by the squared norm of the gradient of the parameters there are: both
    predict the decrease of the loss per unit of learning rate, so the ratio has no unit and does not move
    with the loss's scale. Singular values behind batch norms in training mode are taken to evaluation mode
    (`where.Evidence.norm_factor`): their gamma/sqrt(eps) is no gain. Growth is armed when the sum over sites is at
    least `threshold`.

    every: measure on every so many steps; 1 observes the directions on each.
    Raises `GrowthError` for a negative `threshold`, `every` below 1, and a gain that is negative or not
    finite (naming the site).
    """

    reads = frozenset({"directions"})

    def __init__(self, threshold: float, *, every: int = 1) -> None:
        self.threshold = number("when.Gain", "threshold", threshold, least=0)
        self.every = whole("when.Gain", "every", every)

    def measures(self, step: int) -> bool:
        return step % self.every == 0

    def gain(self, gains: Mapping[str, float]) -> bool:
        checked = [number("when.Gain", f"gain of site {name!r}", gains[name], least=0) for name in gains]
        return bool(checked) and math.fsum(checked) >= self.threshold
