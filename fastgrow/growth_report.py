"""What one growth did, site by site."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["GrowthReport", "SiteGrowth"]


@dataclass
class SiteGrowth:
    """What happened at one site.

    captured: the solver's estimate of the captured norm. predicted_gain: learning rate times the attained squared
    gradient, the first-order decrease of the loss at the new units' first step. That gradient is of the weights that
    learn first, the producers' (of how.GradMaxOpt(form="incoming") the consumers'), and so is the rate: that of their
    parameter group, of several the lowest. None where no optimizer trains them or the method attains none that it knows
    (with measure_gain: that of the gradient found, each tensor at its own group's rate).
    measured_gain: the decrease seen when the new units of this site alone take that step, on the batch of the
    closure (`fastgrow.gain.GainMeter`); None unless measure_gain was asked for.
    """

    name: str
    old_width: int
    new_width: int
    captured: float | None = None
    predicted_gain: float | None = None
    measured_gain: float | None = None
    random_units: int = 0


@dataclass
class GrowthReport:
    """What one growth did.

    swapped: activation and attention modules replaced by their `fastgrow.nn` twins. seconds: of observing, solving
    and widening. parameters: of the network after growth. step: the Grower's step. evidence: what the
    policy saw and computed, for plots. With measure_gain (`fastgrow.gain.GainMeter` has the formulas), else None:
    measured_gain: the decrease of the loss when the new units of all sites take their first step together;
    loss_change: the loss right after growth less the loss before it, on the same batch.
    """

    sites: list[SiteGrowth]
    method: str
    seconds: float
    parameters: int
    swapped: list[str] = field(default_factory=list)
    step: int | None = None
    evidence: dict[str, Any] = field(default_factory=dict)
    measured_gain: float | None = None
    loss_change: float | None = None

    @property
    def predicted_gain(self) -> float | None:
        """The sum of the sites' predicted gains; None where one of them has none."""
        gains = [site.predicted_gain for site in self.sites if site.predicted_gain is not None]
        return sum(gains) if gains and len(gains) == len(self.sites) else None

    def __str__(self) -> str:
        grown = ", ".join(f"{site.name} {site.old_width} -> {site.new_width}" for site in self.sites)
        return f"{self.method}: {grown or 'nothing'} ({self.parameters} parameters, {1000 * self.seconds:.1f} ms)"
