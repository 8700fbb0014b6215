"""What must be chosen before torch and Triton are imported: how threads wait, and, without a GPU, the interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Two workers on two cores, and tests of two threads: one that spins takes the core that the other waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton kernels run: interpreted on the CPU, or on the GPU (`pytest -m gpu`)."""
    gpu = torch.cuda.is_available()
    if request.param == "cuda" and not gpu:
        pytest.skip("no GPU")
    if request.param == "interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off: a GPU is there")
    return torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors on every core wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
