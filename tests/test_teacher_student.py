"""The teacher-student example, shortened: its measurements, and the order where it is reliable."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastgrow as fg


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / "teacher_student.py"
    spec = importlib.util.spec_from_file_location("teacher_student", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["teacher_student"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def early(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case grows at step 40 and at step 80: what is asked of a few growths does not need long trainings."""
    for name, case in example.CASES.items():
        monkeypatch.setitem(example.CASES, name, replace(case, first=40, every=40))


@pytest.fixture(autouse=True)
def _threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("protocol", ["paper", "notebook"])
def test_measurements(example: ModuleType, protocol: str, tmp_path: Path) -> None:
    methods = ["gradmax", "gradmax_opt", "gradmax_opt_tuned", "random", "baseline_small", "baseline_big"]
    target = tmp_path / "found.json"
    arguments = ["--case", "small", "--seeds", "1", "--protocol", protocol, "--steps", "405", "--json", str(target)]
    found = example.main([*arguments, "--methods", *methods])
    assert json.loads(target.read_text()) == json.loads(json.dumps(found))
    assert {"case", "seeds", "final_loss", "curves", "grad_norm_after_growth", "growth_ms", "step_ms"} <= found.keys()
    assert list(found["final_loss"]) == methods
    assert all(len(values) == 1 for values in found["final_loss"].values())
    growing = methods[:4]
    assert list(found["growth_ms"]) == growing
    # Width 5 for 200 steps, 6 for 200, 7 for 5, of 7 throughout.
    assert found["flops_vs_big"]["gradmax"] == pytest.approx((5 * 200 + 6 * 200 + 7 * 5) / (405 * 7))
    norms = found["grad_norm_after_growth"]
    for method in growing[1:]:  # one unit from the same checkpoint: nothing has a larger gradient
        for best, other in zip(norms["gradmax"], norms[method], strict=True):
            assert len(best) == 2
            assert all(mine >= theirs * (1 - 1e-5) for mine, theirs in zip(best, other, strict=True))


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("case", ["small", "large"])
def test_seeds_trained_at_once_are_those_trained_alone(example: ModuleType, case: str) -> None:
    """In float64 100 steps carry roundings of 1e-16 no further than 1e-9."""
    arguments = ["--case", case, "--seeds", "3", "--steps", "101"]
    methods = ["gradmax", "baseline_small", "baseline_big"]
    torch.set_default_dtype(torch.float64)
    try:
        together = example.main([*arguments, "--methods", *methods])
        alone = example.main([*arguments, "--alone", "--methods", *methods])
    finally:
        torch.set_default_dtype(torch.float32)
    assert together["stacked"] == dict.fromkeys(methods, True)
    assert alone["stacked"] == dict.fromkeys(methods, False)
    for method in methods:
        assert together["final_loss"][method] == pytest.approx(alone["final_loss"][method], rel=1e-9)
        for mine, theirs in zip(together["curves"][method], alone["curves"][method], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9)
    for mine, theirs in zip(together["relative_norms"]["gradmax"], alone["relative_norms"]["gradmax"], strict=True):
        assert [norm for _, norm in mine] == pytest.approx([norm for _, norm in theirs], rel=1e-9)


@pytest.mark.usefixtures("early")
def test_seeds_train_at_once_where_a_stack_grows_as_each_alone(example: ModuleType) -> None:
    short = ["--case", "small", "--seeds", "2", "--steps", "50", "--methods"]
    found = example.main([*short, "gradmax_opt", "gradmax_inverse", "random", "zero_both", "zero_outgoing", "net2net"])
    assert [method for method, together in found["stacked"].items() if not together] == ["net2net"]
    assert list(found["growth_cost_ms"]) == list(found["growth_ms"]) == list(found["stacked"])
    assert all(torch.tensor(values).isfinite().all() for values in found["final_loss"].values())
    losses = found["final_loss"]["random"]
    assert losses[0] != losses[1]


def test_the_full_schedules_of_the_paper(example: ModuleType) -> None:
    small, large = example.CASES["small"], example.CASES["large"]
    assert small.growths == {200: 1, 400: 1, 600: 1, 800: 1, 1000: 1}
    assert large.growths == {500: 5, 1000: 5, 1500: 5, 2000: 5, 2500: 5}
    for case in (small, large):
        assert case.start + sum(case.growths.values()) == case.hidden
    assert large.flops(large.growths, large.start) == pytest.approx(0.786, abs=1e-3)
    assert small.flops(small.growths, small.start) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.usefixtures("early")
def test_more_methods_run(example: ModuleType) -> None:
    short = ["--case", "small", "--seeds", "1", "--steps", "50", "--methods"]
    found = example.main([*short, "zero_both", "net2net", "tiny", "splitting"])
    assert all(torch.tensor(values).isfinite().all() for values in found["final_loss"].values())


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("case", ["conv", "batchnorm"])
def test_other_students(example: ModuleType, case: str) -> None:
    arguments = ["--case", case, "--seeds", "1", "--steps", "50"]
    found = example.main([*arguments, "--methods", "gradmax", "gradmax_inverse", "random"])
    norms = found["grad_norm_after_growth"]
    assert norms["gradmax"][0][0] >= norms["random"][0][0] > 0
    assert all(torch.tensor(values).isfinite().all() for values in found["final_loss"].values())


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("figure", ["2a", "8"])
def test_figures(example: ModuleType, figure: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--figure", figure, "--seeds", "1", "--steps", "50", "--out", str(tmp_path)]
    found = example.main([*arguments, "--methods", "gradmax", "random"])
    assert found["lines"]
    assert (tmp_path / f"figure_{figure}.png").stat().st_size > 0


def test_unknown_methods_are_named(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(["--methods", "magic"])
    assert "magic" in capsys.readouterr().err


def refused(example: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        example.main(list(arguments))
    return capsys.readouterr().err


@pytest.mark.parametrize("case", ["small", "large", "conv", "batchnorm"])
def test_pairs_are_refused_where_growths_are_odd(
    example: ModuleType, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(example, capsys, "--case", case, "--methods", "gradmax", "variance_transfer")
    assert f"adds units in pairs, and --case {case} grows by {example.CASES[case].units} at a time" in said


def test_pairs_run_where_growths_are_even(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    even = replace(example.CASES["small"], start=4, units=2, first=40, every=40)
    monkeypatch.setitem(example.CASES, "small", even)
    found = example.main(["--seeds", "1", "--steps", "50", "--methods", "variance_transfer", "random"])
    assert found["failed"] == {}
    assert list(found["final_loss"]) == ["variance_transfer", "random"]


@pytest.mark.parametrize(("case", "first"), [("small", 200), ("large", 500)])
def test_trainings_without_a_growth_are_refused(
    example: ModuleType, case: str, first: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps in (10, first):
        said = refused(example, capsys, "--case", case, "--steps", str(steps))
        assert f"--steps {steps}: the first growth" in said
        assert f"wanted at least {first + 1}" in said


@pytest.mark.usefixtures("early")
def test_a_method_that_fails_loses_nothing_of_the_others(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no growth today")

    monkeypatch.setattr(fg.how.Net2Net, "start", fails)
    target = tmp_path / "found.json"
    arguments = ["--seeds", "1", "--steps", "50", "--json", str(target)]
    with pytest.raises(RuntimeError, match="no growth today"):
        example.main([*arguments, "--methods", "gradmax", "net2net", "baseline_small"])
    found = json.loads(target.read_text())
    assert found["failed"] == {"net2net": "RuntimeError: no growth today"}
    assert list(found["final_loss"]) == ["gradmax", "baseline_small"]
    assert list(found["grad_norm_after_growth"]) == ["gradmax"]
