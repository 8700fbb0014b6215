from __future__ import annotations

import pytest
import torch
from fastgrow.kernels import reference
from tolerances import assert_close
from torch import Tensor

from fastgrow import ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def strided_cases(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    base = torch.randn(3, 5, 7, 9).to(device, dtype)
    return {
        "empty": base[:0],
        "scalar": base[0, 0, 0, 0],
        "one": base[0, 0, 0, :1],
        "contiguous": base,
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.permute(3, 1, 0, 2),
        "offset by one": base.view(-1)[1:],
        "slice": base[:, 1:, ::2, 1:5],
        "every third": base.view(-1)[::3],
        "expanded": base[:, :, :1].expand(3, 5, 4, 9),
        "negative-free gaps in five dims": torch.randn(4, 4, 4, 4, 4).to(device, dtype)[::2, ::2, ::2, ::2, ::2],
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(strided_cases(torch.float32, torch.device("cpu"))))
def test_any_rank_and_strides(case: str, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    x = strided_cases(dtype, device)[case]
    for backend in ("triton", "torch"):
        got = ops.sum_of_squares(x, backend=backend)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert (got.shape, got.dtype) == ((), wide)
        assert_close(got, reference.sum_of_squares(x.double()), wide, x.numel())


def test_more_blocks_than_one_program(device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(3 * 4096 + 17, device=device) + 1
    assert_close(
        ops.sum_of_squares(x, backend="triton"),
        reference.sum_of_squares(x.double()),
        torch.float32,
        x.numel(),
    )


def test_many_tensors_are_each_as_if_alone(device: torch.device) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(n, device=device) for n in (1, 5, 9000, 0)]
    tensors += [torch.randn(40, device=device).half(), torch.randn(6, 6, device=device)[:, ::2]]
    together = ops.sums_of_squares(tensors, backend="triton")
    assert together.dtype == torch.float32
    for x, value in zip(tensors, together, strict=True):
        assert torch.equal(ops.sum_of_squares(x, backend="triton"), value)
    assert torch.equal(ops.sums_of_squares(tensors, backend="triton"), together)
    assert ops.sums_of_squares([tensors[0], tensors[1].double()], backend="triton").dtype == torch.float64


def test_non_finite_values_show(device: torch.device) -> None:
    x = torch.ones(5000, device=device)
    x[4321] = float("nan")
    assert ops.sum_of_squares(x, backend="triton").isnan()
    x[4321] = float("inf")
    assert ops.sum_of_squares(x, backend="triton").isinf()


def test_opcheck(device: torch.device) -> None:
    from fastgrow.kernels import sum_of_squares  # noqa: F401

    tensors = [torch.randn(5, 3, device=device), torch.randn(70, device=device)[::2]]
    torch.library.opcheck(torch.ops.fastgrow.sums_of_squares.default, (tensors,))


def test_blocks_depend_on_size_alone() -> None:
    from fastgrow.kernels.sum_of_squares import BLOCK, SLOTS, blocks_for

    assert [blocks_for(n) for n in (0, 1, BLOCK, BLOCK + 1)] == [1, 1, 1, 2]
    assert blocks_for(10**10) == SLOTS
