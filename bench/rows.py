"""One measurement is one row: printed as a line of a table, written as JSON."""

from __future__ import annotations

import datetime
import json
import math
import os
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .measure import Timing

__all__ = ["Row", "Settings", "read_rows", "table", "write_rows"]

ROOT = Path(__file__).parent.parent


@dataclass
class Row:
    """ours against a baseline.

    ratio: baseline / ours: how many times less ours takes, in the unit that is compared (time; memory where
    both times are None). p20, p50, p80 are ours in ms, baseline_p20 ... the baseline's. peak_mb: memory that
    ours takes in MB (1e6 bytes) beyond what was there before; for "peak memory" all that it holds.
    group: which line of the targets it counts for, where a benchmark has several. more: what else was seen.
    """

    benchmark: str
    shape: str
    baseline: str
    ours_ms: float | None = None
    baseline_ms: float | None = None
    ratio: float | None = None
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    baseline_p20: float | None = None
    baseline_p50: float | None = None
    baseline_p80: float | None = None
    peak_mb: float | None = None
    baseline_peak_mb: float | None = None
    group: str = ""
    more: dict[str, Any] = field(default_factory=dict)
    device: str = ""
    kind: str = ""  # "cpu" or "cuda"
    torch: str = ""
    triton: str | None = None
    commit: str = ""
    date: str = ""


@dataclass
class Settings:
    """How a suite is run; `row` fills in what every row carries."""

    device: torch.device
    quick: bool = False
    rounds: int = 7

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def times(self, full: int) -> int:
        """Rounds for something that is worth `full` rounds."""
        return 2 if self.quick else full

    def row(
        self,
        benchmark: str,
        shape: str,
        baseline: str,
        ours: Timing | None = None,
        other: Timing | float | None = None,
        *,
        peak: float | None = None,
        baseline_peak: float | None = None,
        group: str = "",
        **more: Any,
    ) -> Row:
        """A row of two timings (or a timing against milliseconds), or of two peaks (bytes)."""
        row = Row(benchmark, shape, baseline, group=group, more=more)
        if ours is not None and ours.samples:
            row.ours_ms = row.p50 = ours.p50
            row.p20, row.p80 = ours.p20, ours.p80
        if isinstance(other, Timing) and other.samples:
            row.baseline_ms = row.baseline_p50 = other.p50
            row.baseline_p20, row.baseline_p80 = other.p20, other.p80
        elif isinstance(other, float):
            row.baseline_ms = other
        row.peak_mb = None if peak is None else peak / 1e6
        row.baseline_peak_mb = None if baseline_peak is None else baseline_peak / 1e6
        if row.ours_ms is not None and row.baseline_ms is not None:
            # A cost is a difference of two timings: where noise leaves nothing of it, there is no ratio.
            positive = min(row.ours_ms, row.baseline_ms) > 0
            row.ratio = row.baseline_ms / row.ours_ms if positive else None
        elif row.ours_ms is None and row.peak_mb and row.baseline_peak_mb:
            row.ratio = row.baseline_peak_mb / row.peak_mb
        row.kind = self.device.type
        return row

    def complete(self, row: Row) -> Row:
        """Device, versions, commit and date."""
        row.device = _device_name(self.device)
        row.torch = torch.__version__
        row.triton = _triton_version()
        row.commit = _commit()
        row.date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")
        row.more.setdefault("threads", torch.get_num_threads())
        if not self.cuda:
            row.more.setdefault("load", round(os.getloadavg()[0], 1))
        return row


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ] or ["CPU"]
    return f"{os.cpu_count()} cores {names[0]}"


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _commit() -> str:
    """The commit measured, with a + where the tree differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--", "fastgrow", "kernels")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


def table(rows: Iterable[Row], header: bool = True) -> str:
    """Rows as text: times in ms as p20/p50/p80, memory in MB."""
    lines = [f"{'benchmark':<26} {'shape':<52} {'ours ms':>20} {'baseline':<34} {'ms':>20} {'ratio':>7} {'MB':>7}"]
    for row in rows:
        ours, baseline = (
            "/".join(map(_number, three)) if three[0] is not None else _number(single)
            for three, single in (
                ((row.p20, row.p50, row.p80), row.ours_ms),
                ((row.baseline_p20, row.baseline_p50, row.baseline_p80), row.baseline_ms),
            )
        )
        lines.append(
            f"{row.benchmark:<26} {row.shape:<52} {ours:>20} {row.baseline:<34} {baseline:>20} "
            f"{_number(row.ratio):>7} {_number(row.peak_mb):>7}"
        )
    return "\n".join(lines if header else lines[1:])


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: what is not finite becomes null."""
    return {
        key: _finite(value)
        if isinstance(value, dict)
        else None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in values.items()
    }


def write_rows(folder: Path, suite: str, kind: str, rows: Iterable[Row]) -> Path:
    """All rows of a suite on a device: one file, written anew."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{suite}.json"
    path.write_text(json.dumps([_finite(asdict(row)) for row in rows], indent=1, allow_nan=False) + "\n")
    return path


def read_rows(folder: Path) -> list[Row]:
    """Every row of every suite's file in a folder, files in alphabetical order."""
    paths = [path for kind in ("cpu", "cuda") for path in sorted(folder.glob(f"{kind}-*.json"))]
    return [Row(**entry) for path in paths for entry in json.loads(path.read_text())]
