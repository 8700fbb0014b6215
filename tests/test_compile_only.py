"""Every kernel compiles for GPUs that are not here, within its budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SHARED = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024, "gfx942": 64 * 1024}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_only.py")
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("arch", SHARED)
def test_budgets(arch: str, rows: list[dict[str, Any]]) -> None:
    mine = [row for row in rows if row["arch"] == arch]
    assert mine
    for row in mine:
        assert row["stack"] == 0, row
        assert row["local"] == 0, row
        assert row["shared"] <= SHARED[arch], row


@pytest.mark.parametrize("arch", SHARED)
def test_the_gemm_runs_on_tensor_cores(arch: str, rows: list[dict[str, Any]]) -> None:
    gemms = [row for row in rows if row["arch"] == arch and row["tensor_cores"]]
    assert gemms
    for row in gemms:
        assert row["instructions"]["MMA"] > 0, row
        if arch != "gfx942" and row["name"].startswith("conv large"):
            assert row["instructions"]["copies"] > 0, row  # software-pipelined asynchronous copies
