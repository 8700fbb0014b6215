"""Without a GPU the Triton kernels run in the interpreter; it must be chosen before Triton is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
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
