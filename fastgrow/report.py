"""The growth history as a table and as a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import GrowthError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_widths", "report"]

_COLUMNS = (
    "growth",
    "step",
    "method",
    "site",
    "old width",
    "new width",
    "captured",
    "predicted gain",
    "measured gain",
    "ms",
    "parameters",
)
_TABLES = (".txt", ".md", ".csv")
_PLOTS = (".png", ".pdf", ".svg")


class _SiteGrowth(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def old_width(self) -> int: ...
    @property
    def new_width(self) -> int: ...
    @property
    def captured(self) -> float | None: ...
    @property
    def predicted_gain(self) -> float | None: ...
    @property
    def measured_gain(self) -> float | None: ...


class _Growth(Protocol):
    @property
    def sites(self) -> Sequence[_SiteGrowth]: ...
    @property
    def step(self) -> int | None: ...
    @property
    def method(self) -> str: ...
    @property
    def seconds(self) -> float: ...
    @property
    def parameters(self) -> int: ...


def report(history: Sequence[_Growth], path: str | Path | None = None) -> str:
    """The growth history as a text table, one row for each site that grew; also written to `path`.

    history: ``grower.history``, or a list of the reports of `fastgrow.grow`.
    path: its suffix says what is written: a table (.txt, .md for Markdown, .csv) or a plot of widths,
    gains and costs (.png, .pdf, .svg; needs matplotlib). Missing folders are made.

    Columns: captured is the captured norm of the site's directions; predicted gain is lr times the
    squared gradient norm that the new units attain, measured gain the decrease of the loss at the next
    step, both in units of the loss; ms is the time of the whole growth, parameters the network's after it.

    Raises:
        GrowthError: a suffix that is none of these, or a plot without matplotlib.
    """
    if not isinstance(history, Sequence):
        raise GrowthError(
            f"report: history is a {type(history).__name__}; wanted grower.history, or a list of the reports of grow"
        )
    if path is None:
        return _text(history)
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _TABLES + _PLOTS:
        raise GrowthError(
            f"report: {str(path)!r} has suffix {path.suffix!r}; wanted a table ({', '.join(_TABLES)}) "
            f"or a plot ({', '.join(_PLOTS)})"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix in _PLOTS:
        _plot(history, path)
    else:
        write = {".txt": _text, ".md": _markdown, ".csv": _csv}[suffix]
        path.write_text(write(history), encoding="utf-8", newline="")
    return _text(history)


def draw_widths(axes: Axes, history: Sequence[_Growth], last_step: int | None = None) -> None:
    """Draws the width of every site that grew over the training steps; `last_step` extends the lines."""
    names = list(dict.fromkeys(site.name for growth in history for site in growth.sites))
    shades = _shades(len(names))
    for name, shade in zip(names, shades, strict=True):
        steps: list[int] = [0]
        widths: list[int] = []
        for number, growth in enumerate(history, start=1):
            for site in growth.sites:
                if site.name == name:
                    widths = widths or [site.old_width]
                    steps.append(_position(growth, number))
                    widths.append(site.new_width)
        if last_step is not None:
            steps.append(last_step)
            widths.append(widths[-1])
        axes.step(steps, widths, where="post", color=shade, label=name, marker=".", markersize=6)
    axes.set(xlabel=_position_label(history), ylabel="width (channels)", title="Widths")
    axes.set_ylim(bottom=0)
    if names:
        axes.legend(fontsize="small", ncols=1 + len(names) // 12)


def _position(growth: _Growth, number: int) -> int:
    return number if growth.step is None else growth.step


def _position_label(history: Sequence[_Growth]) -> str:
    return "growth" if any(growth.step is None for growth in history) else "training step"


def _shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * i / max(1, count - 1)) for i in range(count)]


def _rows(history: Iterable[_Growth]) -> Iterable[tuple[Any, ...]]:
    for number, growth in enumerate(history, start=1):
        for site in growth.sites:
            yield (
                number,
                growth.step,
                growth.method,
                site.name,
                site.old_width,
                site.new_width,
                site.captured,
                site.predicted_gain,
                site.measured_gain,
                1e3 * growth.seconds,
                growth.parameters,
            )


def _cell(value: Any, none: str) -> str:
    if value is None:
        return none
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(history: Iterable[_Growth]) -> str:
    rows = [_COLUMNS, *(tuple(_cell(value, "-") for value in row) for row in _rows(history))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    names = (_COLUMNS.index("method"), _COLUMNS.index("site"))
    lines = [
        "  ".join(
            cell.ljust(width) if i in names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _markdown(history: Iterable[_Growth]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    names = ("method", "site")
    rule = line(":---" if column in names else "---:" for column in _COLUMNS)
    rows = (line(_cell(value, "-") for value in row) for row in _rows(history))
    return "\n".join([line(_COLUMNS), rule, *rows]) + "\n"


def _csv(history: Iterable[_Growth]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(column.replace(" ", "_") for column in _COLUMNS)
    # Full precision: this table is read by programs.
    writer.writerows(["" if value is None else value for value in row] for row in _rows(history))
    return buffer.getvalue()


def _plot(history: Sequence[_Growth], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GrowthError(
            f"report: plotting to {path} needs matplotlib, which is not installed: pip install matplotlib, "
            "or ask for a table (.txt, .md, .csv)"
        ) from error
    figure = Figure(figsize=(13, 4), layout="constrained")
    widths, gains, costs = figure.subplots(1, 3)
    draw_widths(widths, history)
    label = _position_label(history)
    places = [_position(growth, number) for number, growth in enumerate(history, start=1)]
    for what, marker in (("predicted_gain", "o"), ("measured_gain", "x")):
        points = [
            (place, sum(values))
            for place, growth in zip(places, history, strict=True)
            if (values := [v for site in growth.sites if (v := getattr(site, what)) is not None])
        ]
        if points:
            gains.plot(*zip(*points, strict=True), marker=marker, label=what.replace("_", " "))
    gains.set(xlabel=label, ylabel="decrease of the loss", title="Gain of a growth, all sites")
    if gains.lines:
        gains.legend(fontsize="small")
    costs.bar([str(place) for place in places], [1e3 * growth.seconds for growth in history], color="#4c72b0")
    costs.set(xlabel=label, ylabel="ms", title="Cost of a growth")
    figure.savefig(path, dpi=120)
