"""FLOPs are a sample's, whatever the batch of the example inputs: in plans, budgets and caps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from stack_cases import HIDDEN, INS, MEMBERS, OUTS
from stack_cases import net as stacked
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))


class Attending(nn.Module):
    def __init__(self, fused: bool, batch_first: bool) -> None:
        super().__init__()
        self.qkv, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 12), nn.Linear(12, 8)
        self.fused, self.batch_first = fused, batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.fused:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            mixed = (query @ key.transpose(-1, -2) / 2).softmax(-1) @ value
        return self.down(F.gelu(self.up(mixed.transpose(1, 2).flatten(2))))


MLP = 2.0 * (4 * 5 + 5 * 2)
CONV = 2.0 * (64 * 2 * 5 * 9 + 16 * 5 * 6 * 9 + 96 * 3)
ATTENDING = 2.0 * 7 * (8 * 24 + 8 * 12 + 12 * 8)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], float]] = {
    "mlp": (mlp, lambda n: torch.randn(n, 4), MLP),
    "mlp_without_batch": (mlp, lambda n: torch.randn(4), MLP),
    "conv": (conv, lambda n: torch.randn(n, 2, 8, 8), CONV),
    "conv_without_batch": (
        lambda: nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 1)),
        lambda n: torch.randn(2, 8, 8),
        2.0 * 64 * (2 * 5 * 9 + 5 * 6),
    ),
    "attention": (lambda: Attending(True, True), lambda n: torch.randn(n, 7, 8), ATTENDING),
    "attention_sequence_first": (lambda: Attending(True, False), lambda n: torch.randn(7, n, 8), ATTENDING),
    "attention_by_hand": (lambda: Attending(False, False), lambda n: torch.randn(7, n, 8), ATTENDING),
    "encoder_sequence_first": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0),
        lambda n: torch.randn(7, n, 8),
        ATTENDING + 2 * 7 * 8 * 8,
    ),
    "stack": (
        lambda: stacked("bmm").float(),
        lambda n: torch.randn(MEMBERS, n, INS),
        2.0 * MEMBERS * HIDDEN * (INS + OUTS),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_plans_do_not_depend_on_the_batch(name: str, batch: int) -> None:
    build, inputs, flops = CASES[name]
    model = build()
    sites = fg.find_sites(model, inputs(batch))
    assert fg.plan(model, {}, sites=sites).flops == (flops, flops)


@pytest.mark.parametrize("batch", [2, 16])
@pytest.mark.parametrize("by_hand", [False, True], ids=["found", "by_hand"])
def test_budgets_and_caps_buy_the_same_at_any_batch(batch: int, by_hand: bool) -> None:
    torch.manual_seed(0)
    model = mlp()
    x = torch.randn(batch, 4)
    sites = fg.name_sites(model, x, [["0", "1", "2"]]) if by_hand else fg.find_sites(model, x)
    unit = 2 * (4 + 2)
    for limits, added in (({"budget": {"flops": 3 * unit}}, 3), ({"max_flops": MLP + 2 * unit}, 2)):
        grown = mlp()
        grower = fg.Grower(
            grown, torch.optim.SGD(grown.parameters(), lr=0.0), sites=sites, when=fg.when.Every(1),
            where=fg.where.Everywhere(units=4, **limits), how=fg.how.ZeroOutgoing(),
        )  # fmt: skip
        with grower.observe():
            grown(x).sum().backward()
        grower.step()
        assert grown[0].out_features == 5 + added
