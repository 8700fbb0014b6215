"""The pictures of ``python -m bench methods``: accuracy, accuracy over work, prediction against measurement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cells import BASELINES, Cell

__all__ = ["draw", "gains_of"]

_MARKERS = "osD^v*"


def draw(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """accuracy.svg, work.svg and gains.png into `folder`; the same cells give the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    networks = list(dict.fromkeys(cell.network for cell in cells))
    paths = []
    with rc_context({"svg.hashsalt": "fastgrow", "svg.fonttype": "none", "font.size": 8}):
        for name, height, one in (("accuracy.svg", 4.2, _accuracy), ("work.svg", 3.6, _work)):
            figure = Figure(figsize=(4.2 * len(networks), height), layout="constrained")
            for axes, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
                one(axes, [cell for cell in cells if cell.network == network])
                axes.set_title(network)
            paths.append(_save(figure, folder / name))
        paths.append(_save(_gains(cells), folder / "gains.png"))
    return paths


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=90, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    return path


def _grown(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.runs and cell.how not in BASELINES]


def _wheres(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.where for cell in cells if cell.where))


def _accuracy(axes: Axes, cells: Sequence[Cell]) -> None:
    """A line for each method, a marker for each policy, the spread over seeds beside it."""
    hows = list(dict.fromkeys(cell.how for cell in cells if cell.how not in BASELINES))
    wheres = _wheres(cells)
    for cell in cells:
        if cell.how in BASELINES:
            axes.axvline(100 * cell.mean("accuracy"), color="0.6", linestyle="--" if cell.how == "small" else "-")
    for place, where in enumerate(wheres):
        own = [cell for cell in _grown(cells) if cell.where == where]
        axes.errorbar(
            [100 * cell.mean("accuracy") for cell in own],
            [hows.index(cell.how) + 0.12 * (place - (len(wheres) - 1) / 2) for cell in own],
            xerr=[100 * cell.spread("accuracy") for cell in own],
            fmt=_MARKERS[place % len(_MARKERS)],
            markersize=3.5,
            elinewidth=0.6,
            label=where,
        )
    axes.set_yticks(range(len(hows)), hows)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, %; grey: small (dashed) and big baseline")
    axes.legend(fontsize=6)


def _work(axes: Axes, cells: Sequence[Cell]) -> None:
    """Accuracy over FLOPs, one colour for each method."""
    hows = list(dict.fromkeys(cell.how for cell in _grown(cells)))
    wheres = _wheres(cells)
    for cell in _grown(cells):
        axes.plot(
            cell.mean("flops") / 1e9,
            100 * cell.mean("accuracy"),
            marker=_MARKERS[wheres.index(cell.where) % len(_MARKERS)],
            color=colormaps["tab20"](hows.index(cell.how)),
            markersize=4,
            linestyle="none",
            label=cell.how if cell.where == wheres[0] else None,
        )
    for cell in cells:
        if cell.how in BASELINES:
            axes.plot(cell.mean("flops") / 1e9, 100 * cell.mean("accuracy"), "kP", markersize=6)
            axes.annotate(cell.how, (cell.mean("flops") / 1e9, 100 * cell.mean("accuracy")), fontsize=7)
    axes.set(xlabel="training GFLOPs, growth included", ylabel="test accuracy, %", xscale="log")
    axes.legend(fontsize=5, ncols=2)


def gains_of(cells: Sequence[Cell], how: str) -> list[tuple[float, float]]:
    """(predicted, measured) decreases of the loss of every growth of a method, all sites together."""
    pairs: list[tuple[float, float]] = []
    for cell in cells:
        for run in cell.runs if cell.how == how else ():
            found: list[Any] = [(gain["predicted"], gain["measured"]) for gain in run.gains]
            pairs += [pair for pair in found if None not in pair]
    return pairs


def _gains(cells: Sequence[Cell]) -> Figure:
    """A panel for each method, double logarithmic; growths whose step raised the loss lie on the bottom edge."""
    hows = list(dict.fromkeys(cell.how for cell in _grown(cells)))
    networks = list(dict.fromkeys(cell.network for cell in cells))
    columns = min(5, max(1, len(hows)))
    rows = -(-len(hows) // columns) or 1
    figure = Figure(figsize=(2.1 * columns, 2.1 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    low, high = 1e-7, 1e4
    for axes in panels:
        axes.set_visible(False)
    for axes, how in zip(panels, hows, strict=False):
        axes.set_visible(True)
        for colour, network in enumerate(networks):
            pairs = gains_of([cell for cell in cells if cell.network == network], how)
            axes.plot(
                [min(max(predicted, low), high) for predicted, _ in pairs],
                [min(max(measured, low), high) for _, measured in pairs],
                linestyle="none",
                marker=".",
                markersize=3,
                color=colormaps["tab10"](colour),
                label=network,
            )
        axes.plot([low, high], [low, high], color="0.7", linewidth=0.7, zorder=0)
        axes.set(xscale="log", yscale="log", title=how, xlim=(low, high), ylim=(low, high))
        axes.set_ylim(bottom=low / 2)
    figure.supxlabel("predicted decrease of the loss")
    figure.supylabel("measured")
    if hows:
        panels[0].legend(fontsize=6)
    return figure
