"""Two processes over gloo on this machine, and what each of them found."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

WORLD = 2

# Imported once, by a process from which the ranks of every test are forked; a rank of its own would take seconds.
_IMPORTED = ["fastgrow", "torch.export._trace", "torch.distributed.fsdp", "torch.fx.experimental.symbolic_shapes"]


@contextmanager
def joined(rank: int, folder: str) -> Iterator[Path]:
    """In a spawned process: a member of the group for the length of the block; the folder is shared."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(os.path.join(folder, "store"), WORLD),
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=120),
    )
    try:
        yield Path(folder)
    finally:
        dist.destroy_process_group()


def found_by(worker: Callable[[int, str], None]) -> Iterator[list[Any]]:
    """For a fixture to yield from: what worker(rank, folder) saved as rank0.pt and rank1.pt."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch.distributed has no gloo here")
    start = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    if start == "forkserver":
        multiprocessing.set_forkserver_preload(_IMPORTED)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(worker, (folder,), nprocs=WORLD, start_method=start)
        yield [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


def assert_same_bits(ranks: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> None:
    one, two = ranks
    assert one.keys() == two.keys()
    for scenario, tensors in one.items():
        for name, value in tensors.items():
            assert torch.equal(value, two[scenario][name]), (scenario, name)


def assert_within(relative: float, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Every tensor found is the expected one, up to so much of its largest entry (of 1 where that is smaller)."""
    for name, value in found.items():
        assert value.shape == expected[name].shape, name
        error = float((value - expected[name]).abs().max())
        assert error <= relative * max(1.0, float(expected[name].abs().max())), name
