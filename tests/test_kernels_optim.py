"""The optimizers' kernels: in the interpreter against float64 references, and compiled for real GPUs."""

from __future__ import annotations

import pytest
import torch
from optim_reference import stage_map
from tolerances import tolerance
from torch import Tensor, nn

import fastgrow.optim as fo
from fastgrow import GrowthError

pytest.importorskip("triton")

from fastgrow.kernels import block_update

SHAPES: dict[str, tuple[tuple[int, ...], dict[int, list[int]]]] = {
    "one": ((1, 1), {0: [0]}),
    "row": ((1, 130), {1: [0] * 100 + [1] * 30}),
    "conv": ((17, 33, 3, 3), {0: [0] * 11 + [1] * 6, 1: [0] * 30 + [1, 2, 2]}),
    "scattered": ((37, 5), {0: [0, 1, 2] * 12 + [0], 1: [1, 0, 0, 0, 3]}),
    "three dimensions": ((3, 4, 6), {0: [0, 0, 1], 1: [0, 0, 0, 2], 2: [0] * 5 + [1]}),
    "no seed": ((4, 3), {0: [2, 2, 3, 3]}),
}


def table_of(tensors: list[Tensor], stages: list[dict[int, Tensor]]) -> tuple[block_update.BlockTable, list[int]]:
    maps = [stage_map(tuple(t.shape), s) for t, s in zip(tensors, stages, strict=True)]
    blocks, counts, all_stages = [], [], []
    for tensor, stage in zip(tensors, maps, strict=True):
        distinct, rank = torch.unique(stage, return_inverse=True)
        # columns carry everything: one row of all elements
        blocks.append((torch.zeros(1, dtype=torch.int64), rank.reshape(-1)))
        counts.append(torch.bincount(rank.reshape(-1)).tolist())
        all_stages += distinct.tolist()
        assert tensor.is_contiguous()
    table = block_update.BlockTable(tensors, blocks, counts)
    table.bind([tensors])
    return table, all_stages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_block_norms(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    stages = [{d: torch.tensor(v) for d, v in given.items()} for _, given in SHAPES.values()]
    tensors = [torch.randn(shape).to(device, dtype) for shape, _ in SHAPES.values()]
    table, _ = table_of(tensors, stages)
    expected = []
    for tensor, given in zip(tensors, stages, strict=True):
        stage = stage_map(tuple(tensor.shape), given)
        wide = tensor.double().cpu()
        expected += [wide[stage == k].square().sum() for k in stage.unique()]
    out = torch.full((table.total,), float("nan"), dtype=table.acc, device=device)
    table.norms(out)
    wanted = torch.stack(expected)
    assert ((out.double().cpu() - wanted).abs() <= tolerance(table.acc, 2048) * wanted).all()
    again = torch.full_like(out, float("nan"))
    table.norms(again)
    assert torch.equal(out, again)


def test_ratios_and_waiting_blocks(device: torch.device) -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 1.0], [30.0, 40.0]], device=device)
    table, _ = table_of([weight, weight], [{0: torch.arange(4)}] * 2)
    out, ratio = (torch.full((8,), float("nan"), device=device) for _ in range(2))
    adapt = torch.tensor([1, 0], dtype=torch.int32, device=device)
    waiting = torch.tensor([0.0, 2.0, 1.0, 1.0] * 2, device=device)
    table.norms(out, ratio, waiting, adapt)
    # block 1 is found zero and waits, block 2 waits still, block 3 has passed the seed and follows the rule
    torch.testing.assert_close(ratio.cpu(), torch.tensor([1.0, 1.0, 1.0, 10.0, 1.0, 1.0, 1.0, 1.0]))
    assert waiting.tolist() == [0.0, 1.0, 1.0, 0.0] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["SGD", "Adam", "AvaGrad"])
def test_kernel_and_aten_agree(method: str, dtype: torch.dtype, device: torch.device) -> None:
    """Values off 16-byte boundaries, channels last and gradients laid out otherwise included."""
    options = dict(lr=0.1, rate_adaptation=True, weight_decay=0.01)
    options |= dict(momentum=0.9) if method == "SGD" else dict(betas=(0.8, 0.9), eps=0.1)
    sides: list[list[nn.Parameter]] = []
    for _ in range(2):
        torch.manual_seed(0)
        shifted = torch.randn(12 * 16 + 1).to(device, dtype)[1:].view(12, 16)
        last = torch.randn(9, 6, 3, 3).to(device, dtype).contiguous(memory_format=torch.channels_last)
        sides.append([nn.Parameter(shifted), nn.Parameter(last)])
    stages = [
        {0: torch.tensor([0] * 8 + [1] * 4), 1: torch.tensor([0] * 12 + [2] * 4)},
        {0: torch.tensor([0] * 5 + [1] * 4), 1: torch.tensor([0, 0, 0, 1, 1, 1])},
    ]
    optimizers = []
    for held, backend in zip(sides, ("triton", "torch"), strict=True):
        optimizer = getattr(fo, method)(held, backend=backend, **options)
        for parameter, given in zip(held, stages, strict=True):
            optimizer.grown(parameter, given)
        optimizers.append(optimizer)
    version = sides[0][0]._version
    for _ in range(3):
        for one, two in zip(*sides, strict=True):
            one.grad = torch.randn(one.shape).to(device, dtype)
            two.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert sides[0][0]._version > version
    for one, two in zip(*sides, strict=True):
        # ATen rounds each intermediate to the dtype, the kernel only what it stores
        assert (one - two).abs().max() <= tolerance(dtype, 30) * two.abs().max()


def test_an_explicit_kernel_is_never_replaced() -> None:
    parameter = nn.Parameter(torch.randn(4, 6)[:, ::2])
    optimizer = fo.SGD([parameter], lr=0.1, rate_adaptation=True, backend="triton")
    optimizer.grown(parameter, {0: torch.tensor([0, 0, 0, 1])})
    parameter.grad = torch.randn(4, 3)
    with pytest.raises(GrowthError, match="not dense"):
        optimizer.step()
