"""What ``python -m bench methods`` measures: a cell for each combination, a run for each of its seeds."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["BASELINES", "Cell", "Run", "line", "read"]

BASELINES = ("small", "big")


@dataclass
class Run:
    """One training.

    seconds (CPU time of one thread), flops: of training and growth; growth_seconds, growth_flops: the growths' own
    part of them, with their own passes, without the measuring of gains. gains: for each growth its step, the sites'
    [predicted, measured] decreases of the loss, those of all together, what growing changed of the loss, the
    smallest captured norm. curve: (FLOPs, test accuracy) after each epoch.
    """

    seed: int
    accuracy: float = 0.0
    loss: float = 0.0
    seconds: float = 0.0
    growth_seconds: float = 0.0
    flops: float = 0.0
    growth_flops: float = 0.0
    parameters: int = 0
    widths: list[int] = field(default_factory=list)
    gains: list[dict[str, Any]] = field(default_factory=list)
    curve: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Cell:
    """All seeds of one combination; refused: the library's own words where it does not fit."""

    network: str
    how: str
    where: str
    runs: list[Run] = field(default_factory=list)
    refused: str | None = None

    def mean(self, what: str) -> float:
        return statistics.fmean(getattr(run, what) for run in self.runs)

    def spread(self, what: str) -> float:
        """Standard deviation over the seeds."""
        values = [getattr(run, what) for run in self.runs]
        if not all(map(math.isfinite, values)):  # a training that diverged
            return math.nan
        return statistics.stdev(values) if len(values) > 1 else 0.0


def line(cell: Cell) -> str:
    """One cell as a line of the table that is printed."""
    head = f"{cell.network:<9} {cell.how:<20} {cell.where:<15}"
    if cell.refused is not None:
        return f"{head} refused: {cell.refused}"
    return (
        f"{head} accuracy {100 * cell.mean('accuracy'):5.1f} +- {100 * cell.spread('accuracy'):4.1f} %  "
        f"loss {cell.mean('loss'):.3g} +- {cell.spread('loss'):.1g}  "
        f"{cell.mean('seconds'):6.2f} s (growth {cell.mean('growth_seconds'):5.2f})  "
        f"{cell.mean('flops') / 1e9:6.3f} GFLOPs (growth {cell.mean('growth_flops') / 1e9:6.3f})  "
        f"{cell.mean('parameters'):.0f} parameters"
    )


def read(path: Path) -> tuple[dict[str, Any], list[Cell]]:
    """Conditions and cells of a file that `bench.methods` wrote."""
    found = json.loads(path.read_text())
    cells = [Cell(**{**entry, "runs": [Run(**each) for each in entry["runs"]]}) for entry in found["cells"]]
    return found["conditions"], cells
