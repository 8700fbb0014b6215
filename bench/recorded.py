"""(h, dz) of real layers in real training, saved: growth matrices that any solver can be run on.

``python -m bench.recorded`` trains small networks on scikit-learn's digits and writes the files; they are in the
repository, so that solvers are compared on the same numbers everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastgrow as fg
from fastgrow.data import load_digits
from fastgrow.operators import ConvPair, LinearMap, LinearPair
from fastgrow.ops import ConvGeometry

from .capture import factors
from .models import Case, EncoderBlock, Transformer, mlp, mlp_pairs, vgg, vgg_pairs

__all__ = ["FOLDER", "Recorded", "load", "record"]

FOLDER = Path(__file__).parent / "recorded"
_SAMPLES = 32
_STEPS = {"early": 5, "late": 400}


@dataclass(frozen=True)
class Recorded:
    """One site's two tensors, of a mean loss. kernels: producer's and consumer's, padded to keep the map; 0: linear."""

    name: str
    h: Tensor  # (N, I, H, W) or (..., I)
    dz: Tensor  # (N, O, H, W) or (..., O)
    kernels: tuple[int, int]
    width: int  # of the site, when it was recorded

    @property
    def geometries(self) -> tuple[ConvGeometry, ConvGeometry]:
        first, second = (ConvGeometry(k, 1, k // 2) for k in self.kernels)
        return first, second

    def to(self, device: torch.device) -> Recorded:
        return replace(self, h=self.h.to(device), dz=self.dz.to(device))

    def matrix(self) -> Tensor:
        """M, (O k2 k2, I k1 k1)."""
        if self.kernels[0]:
            return fg.ops.conv2d_growth_matrix(self.dz, self.h, *self.geometries)
        return fg.ops.linear_growth_matrix(self.dz, self.h)

    def map(self) -> LinearMap:
        """The same without its entries: products with it and with its transpose."""
        if self.kernels[0]:
            return ConvPair(self.dz, self.h, *self.geometries)
        return LinearPair(self.dz.flatten(0, -2), self.h.flatten(0, -2))


def load(folder: Path = FOLDER) -> list[Recorded]:
    """Every recorded site, in alphabetical order."""
    found = []
    for path in sorted(folder.glob("*.pt")):
        entry = torch.load(path, weights_only=True)
        found.append(Recorded(path.stem, entry["h"], entry["dz"], tuple(entry["kernels"]), entry["width"]))
    return found


def _cases() -> Iterator[Case]:
    data = load_digits()
    x, y = data.train_images, data.train_labels
    rows = x[:, 0]  # a digit as eight tokens of eight pixels
    yield Case("conv", partial(vgg, [32, 32, 32], 1), x, y, vgg_pairs([32, 32, 32])[1:2])
    yield Case("linear", partial(mlp, 64, 3), x.flatten(1), y, mlp_pairs(3)[1:2])
    yield Case("attention", partial(_Tokens, 48, 4, 2), rows, y, ())


class _Tokens(Transformer):
    """A small transformer whose tokens are the rows of an image."""

    def __init__(self, dim: int, heads: int, depth: int) -> None:
        super().__init__(dim, heads, depth)
        self.embed = nn.Linear(8, dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.embed(x))


def record(folder: Path = FOLDER, steps: dict[str, int] | None = None) -> list[Path]:
    """Train, and write a file for each network and time; returns where they lie."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for case in _cases():
        torch.manual_seed(0)
        model = case.build()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        done = 0
        for when, until in (steps or _STEPS).items():
            for step in range(done, until):
                chosen = torch.randperm(len(case.x), generator=torch.Generator().manual_seed(step))[:64]
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(case.x[chosen]), case.y[chosen]).backward()
                optimizer.step()
            done = until
            shown = Case(case.name, case.build, case.x[:_SAMPLES], case.y[:_SAMPLES], case.pairs)
            entry = _attention(shown, model) if isinstance(model, _Tokens) else _chain(shown, model)
            paths.append(folder / f"{case.name}-{when}.pt")
            torch.save(entry, paths[-1])
    return paths


def _chain(case: Case, model: nn.Module) -> dict[str, Any]:
    ((producer, consumer, h, dz),) = factors(case, model)
    kernels = [m.kernel_size[0] if isinstance(m, nn.Conv2d) else 0 for m in (producer, consumer)]
    width = producer.get_parameter("weight").shape[0]
    return {"h": h.clone(), "dz": dz.clone(), "kernels": kernels, "width": width}


def _attention(case: Case, model: _Tokens) -> dict[str, Any]:
    """Values and output projection of a new head that attends as the last block's first head does: h is A x."""
    block = model.blocks[-1]
    assert isinstance(block, EncoderBlock)
    seen: dict[str, Tensor] = {}
    handles = [
        block.qkv.register_forward_hook(lambda m, args, out: seen.update(x=args[0].detach(), qkv=out.detach())),
        block.out.register_forward_hook(lambda m, args, out: out.register_hook(lambda g: seen.update(dz=g)) and None),
    ]
    case.loss(model).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    query, key, _ = (part[..., : block.size] for part in seen["qkv"].chunk(3, -1))
    weights = torch.softmax(query @ key.mT / block.size**0.5, -1)
    return {"h": weights @ seen["x"], "dz": seen["dz"].clone(), "kernels": [0, 0], "width": block.heads * block.size}


if __name__ == "__main__":
    for written in record():
        print(written)
