"""``python -m bench methods``: cells on equal budgets, refusals in the library's words, the page from the JSON."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastgrow as fg
from bench import methods_page
from bench.__main__ import main
from bench.cells import BASELINES, Cell, Run, line, read
from bench.methods import HOWS, NETWORKS, WHERES, Bench, Plan, write
from bench.plots import gains_of
from fastgrow.data import load_digits

pytest.importorskip("sklearn")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan(load_digits().head(192, 100), 1, 2, batch=32, growths=2)


@pytest.fixture(scope="module", params=list(NETWORKS))
def bench(plan: Plan, request: pytest.FixtureRequest) -> tuple[Bench, Cell, Cell]:
    """One network's cells, and its two baselines."""
    found = Bench(request.param, plan, quick=True)
    small, big = (found.baseline(name) for name in BASELINES)
    return found, small, big


def test_every_method_and_policy_has_its_place() -> None:
    assert {type(build()).__name__ for build in HOWS.values()} == set(fg.how.__all__) - {"How", "Newborns", "Start"}
    policies = {name for name in fg.where.__all__ if isinstance(getattr(fg.where, name), type)}
    assert set(WHERES) == {name for name in policies if issubclass(getattr(fg.where, name), fg.where.Where)} - {"Where"}
    for network in NETWORKS.values():
        assert all(width % 2 == 0 for width in (*network.seed, *network.big))


@pytest.mark.parametrize("where", list(WHERES))
def test_cells_keep_to_the_budget_and_count_the_growth(bench: tuple[Bench, Cell, Cell], where: str) -> None:
    benched, small, big = bench
    cell = benched.cell("GradMax", where)
    assert cell.refused is None
    (run,) = cell.runs
    assert small.mean("parameters") <= run.parameters <= big.mean("parameters") == benched.cap
    assert len(run.gains) == 2 or where in ("NAGN", "NORTH")
    assert small.mean("flops") + run.growth_flops <= run.flops
    assert run.growth_flops > 0
    assert 0 < run.growth_seconds < run.seconds
    assert len(run.curve) == 2
    assert run.curve[-1] == (run.flops, run.accuracy)
    for gain in run.gains:
        assert gain["predicted"] > 0
        assert gain["measured"] is not None
        assert gain["captured"] > 0.99
        assert abs(gain["loss_change"]) < 1e-5


def test_seeds_and_order_are_those_of_every_other_cell(plan: Plan) -> None:
    """A method that grows nothing trains as the small baseline does, whatever else the growth drew."""
    bench = Bench("mlp", plan, quick=True)
    bench.cap = sum(p.numel() for p in bench._model(NETWORKS["mlp"].seed, 0).parameters())
    still = bench.cell("ZeroOutgoing", "Everywhere")
    assert still.runs[0].gains == []
    assert still.mean("loss") == bench.baseline("small").mean("loss")


def test_what_does_not_fit_is_told_in_the_librarys_words(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(fg.how.Random):
        def start(self, newborns: fg.how.Newborns) -> fg.how.Start:
            raise fg.GrowthError(f"site {newborns.site.name!r}: never")

    monkeypatch.setitem(HOWS, "Random", Refusing)
    cell = Bench("mlp", plan, quick=True).cell("Random", "RoundRobin")
    assert cell.runs == []
    assert "never" in (cell.refused or "")
    assert "refused: site" in line(cell)


def test_command_line_json_plots_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    target, page = tmp_path / "methods-cpu.json", tmp_path / "docs" / "methods.md"
    chosen = ["--methods", "GradMax", "VarianceTransfer", "Firefly", "--where", "Everywhere", "--networks", "mlp"]
    arguments = ["methods", "--quick", *chosen, "--json", str(target), "--plots", str(tmp_path / "plots")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count(" GFLOPs (growth ") == 5
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"accuracy.svg", "work.svg", "gains.png"}
    conditions, cells = read(target)
    assert [(cell.how, cell.where) for cell in cells] == [
        ("small", ""),
        ("big", ""),
        ("GradMax", "Everywhere"),
        ("VarianceTransfer", "Everywhere"),
        ("Firefly", "Everywhere"),
    ]
    assert conditions["torch"] == torch.__version__
    page.parent.mkdir()
    page.write_text("# Mine\n\n" + methods_page._START + "\nold\n" + methods_page._END + "\n\n## Words of my own\n")
    report = ["report", "--out", str(tmp_path), "--docs", str(page.with_name("performance.md"))]
    assert main(report) == 0
    text = page.read_text()
    assert main(report) == 0
    assert page.read_text() == text
    assert text.startswith("# Mine\n")
    assert text.endswith("## Words of my own\n")
    assert "old" not in text
    assert "| VarianceTransfer | " in text
    assert (page.parent / "methods" / "gains.png").stat().st_size > 0
    page.write_text("no marks")
    with pytest.raises(fg.GrowthError, match="lacks the marks"):
        main(report)


def _cell(how: str, pairs: list[tuple[float | None, float | None]]) -> Cell:
    gains = [{"predicted": p, "measured": m, "captured": None} for p, m in pairs]
    return Cell("mlp", how, "Everywhere", [Run(0, accuracy=0.5, gains=gains), Run(1, accuracy=0.7)])


def test_page_counts_predictions(tmp_path: Path) -> None:
    cells = [
        _cell("GradMax", [(1.0, 0.5), (2.0, 1.5), (4.0, -1.0), (None, 1.0)]),
        Cell("mlp", "TINY", "Everywhere", refused="site '1': no room"),
    ]
    assert gains_of(cells, "GradMax") == [(1.0, 0.5), (2.0, 1.5), (4.0, -1.0)]
    assert methods_page._rank_correlation([(1.0, 0.5), (2.0, 1.5), (4.0, -1.0)]) == pytest.approx(-0.5)
    plan = Plan(load_digits(), 2, None)
    write(tmp_path / "cells.json", plan, cells)
    conditions, again = read(tmp_path / "cells.json")
    text = methods_page.render(conditions, again, [])
    assert "| GradMax | 60.0 ± 14.1 |" in text
    assert "| TINY | refused |" in text
    assert "- mlp, TINY, Everywhere: site '1': no room" in text
    assert "| mlp, GradMax | 3 | 2 | 0.5 | 0.50 | -0.50 | 67 % | – |" in text


def test_bad_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["methods", "--seeds", "0"])
    assert "--seeds 0" in capsys.readouterr().err
