"""The demo: its network, its training loop, and a shortened run from end to end."""

from __future__ import annotations

import copy
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from test_data import idx_bytes

import fastgrow as fg
from fastgrow.data import load_digits
from fastgrow.demo.__main__ import compare, main
from fastgrow.demo.models import conv_net, seed_widths, widths_of
from fastgrow.demo.training import Run, Settings, flop_counter, step_flops, train

QUICK = Settings(epochs=2, batch=32, growths=2)


def test_the_network_has_the_widths_it_was_asked_for() -> None:
    for size in (8, 28, 32):
        widths = seed_widths(size)
        model = conv_net(widths, channels=3, classes=7)
        assert widths_of(model) == [list(stage) for stage in widths]
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_growth_steps_rise_and_leave_half_of_the_training() -> None:
    assert Settings(growths=5).growth_steps(800) == [80, 160, 240, 320, 400]
    assert Settings(growths=4).growth_steps(1) == [1]
    assert Settings(growths=3).growth_steps(4) == [1, 2]


def test_flops_of_a_step_are_those_counted_by_hand() -> None:
    model = conv_net(((2, 3),), channels=1, classes=5)
    n, positions = 4, 36
    first, second, head = n * positions * 2 * 1 * 9, n * positions * 3 * 2 * 9, n * 3 * 5
    # forward, weight gradient and, behind the first layer, input gradient
    by_hand = 2 * (2 * first + 3 * second + 3 * head)
    before = copy.deepcopy(model.state_dict())
    assert step_flops(model, torch.randn(n, 1, 6, 6), torch.zeros(n, dtype=torch.int64)) == by_hand
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dense_decompositions_are_counted() -> None:
    with flop_counter() as counter:
        torch.linalg.svd(torch.randn(3, 10, 4), full_matrices=False)
        torch.linalg.qr(torch.randn(10, 4))
        torch.linalg.eigh(torch.eye(4))
        torch.linalg.cholesky(torch.eye(6))
        torch.linalg.solve_triangular(torch.eye(4), torch.ones(4, 5), upper=True)
    by_hand = 3 * (6 * 10 * 16 + 20 * 64) + (4 * 10 * 16 - 4 * 64 // 3) + 9 * 64 + 6**3 // 3 + 4 * 5 * 4
    assert counter.get_total_flops() == by_hand


def run_once(grows: bool, seed: int = 0) -> tuple[Run, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    data = load_digits().head(96, 60)
    model = conv_net(((4, 2, 4),), 1, 10)
    run = train("net", model, data, Settings(epochs=2, batch=32, growths=2, seed=seed), grows=grows)
    return run, model.state_dict()


def test_a_static_run_counts_its_work_and_repeats_itself() -> None:
    run, state = run_once(grows=False)
    x = load_digits().head(32, 1)
    per_step = step_flops(conv_net(((4, 2, 4),), 1, 10), x.train_images, x.train_labels)
    assert run.flops_after_epoch == [3 * per_step, 6 * per_step]
    assert run.widths == [[4, 2, 4]]
    assert run.growths == []
    assert run.parameters == sum(value.numel() for value in conv_net(((4, 2, 4),), 1, 10).parameters())
    again, same_state = run_once(grows=False)
    assert again.accuracy == run.accuracy
    assert all(torch.equal(state[name], same_state[name]) for name in state)
    other, _ = run_once(grows=False, seed=1)
    assert (other.accuracy, other.flops) != (run.accuracy, 0)


def test_a_growing_run_repeats_itself_and_counts_its_growth() -> None:
    run, state = run_once(grows=True)
    again, same_state = run_once(grows=True)
    assert run.growths
    assert run.widths != [[4, 2, 4]]
    assert run.widths == again.widths
    assert run.flops == again.flops
    assert run.accuracy == again.accuracy
    assert all(torch.equal(state[name], same_state[name]) for name in state)
    for growth in run.growths:
        assert growth.flops > 0
        assert growth.report.step in (1, 2, 3)
        assert {site.name for site in growth.report.sites} <= set(growth.report.evidence["nagn_after_norm"])


def test_too_few_images_for_a_batch_are_refused() -> None:
    with pytest.raises(fg.GrowthError, match="20 training images"):
        train("net", conv_net(((2,),), 1, 10), load_digits().head(20, 5), QUICK, grows=False)


def test_three_networks_side_by_side_with_a_progress_bar() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=110, highlight=False)
    data = load_digits().head(96, 60)
    small, grown, big = compare(data, QUICK, console)
    assert small.growths == big.growths == []
    assert big.widths == grown.widths != small.widths
    assert big.parameters == grown.parameters > small.parameters
    assert small.flops < grown.flops
    assert len(small.accuracy) == len(grown.accuracy) == len(big.accuracy) == QUICK.epochs
    assert "epochs" in screen.getvalue()


def test_the_command_writes_what_it_says_and_says_the_same_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--seed", "3", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "fastgrow.demo", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert main(arguments) == 0
    # milliseconds, steps and seconds are measurements
    first, second = (
        re.sub(r"[\d.]+ (?=ms|training steps|s,)|[\d.]+ │$", "", output, flags=re.M)
        for output in (done.stdout, capsys.readouterr().out)
    )
    assert first == second
    assert re.search(r"NAGN singles out: conv\d \d+ -> \d+", first)
    for word in ("small", "grown", "big", "accuracy", "parameters", "training GFLOPs", "seconds"):
        assert word in first
    for name in ("nagn.png", "widths.png", "accuracy.png", "growth.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
        assert name in first
    assert (tmp_path / "out" / "growth.md").read_text().count("\n") > 2


def test_data_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for half, count in (("train", 128), ("t10k", 10)):
        images, labels = rng.integers(0, 256, (count, 28, 28)), rng.integers(0, 4, count)
        (tmp_path / f"{half}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (tmp_path / f"{half}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    assert main(["--data", str(tmp_path), "--epochs", "1", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "128 training and 10 test images, 1 x 28 x 28; 1 epochs" in out
    assert (tmp_path / "out" / "widths.png").exists()


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path)]) == 1
    assert "holds no data set" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--epochs", "0"])
