"""The networks that are grown: written by hand in plain torch, in sizes for two cores and for one GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .naive import Pair
from .rows import Settings

__all__ = [
    "Case",
    "cases",
    "conv_chain",
    "gpu_cases",
    "mlp",
    "mlp_pairs",
    "resnet",
    "resnet50",
    "transformer",
    "vgg",
    "vgg_pairs",
    "wide_resnet",
]


@dataclass(frozen=True)
class Case:
    """A network with a batch. pairs: the sites that every method can grow, in the naive way's terms.

    naive: rounds that the naive way takes part in; 0 where its SVDs would take the whole run. compiled: it takes part
    under torch.compile too.
    """

    name: str
    build: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    pairs: tuple[Pair, ...]
    naive: int = 1
    compiled: bool = False

    def loss(self, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(self.x), self.y)


def vgg(widths: list[int | str], channels: int = 3, classes: int = 10) -> nn.Sequential:
    """VGG without batch norm, for inputs of so many channels; "M" is a 2 x 2 max pool."""
    model, number = nn.Sequential(), 0
    for width in widths:
        if isinstance(width, str):
            model.add_module(f"pool{number}", nn.MaxPool2d(2))
            continue
        number += 1
        model.add_module(f"conv{number}", nn.Conv2d(channels, width, 3, padding=1))
        model.add_module(f"relu{number}", nn.ReLU(inplace=True))
        channels = width
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("head", nn.Linear(channels, classes))
    return model


def vgg_pairs(widths: list[int | str]) -> tuple[Pair, ...]:
    pairs, number, pool = [], 0, 1
    for width in widths:
        if isinstance(width, str):
            pool *= 2
            continue
        number += 1
        if number > 1:
            pairs.append(Pair(f"conv{number - 1}", f"conv{number}", pool=pool))
        pool = 1
    return (*pairs, Pair(f"conv{number}", "head", averaged=True))


class BasicBlock(nn.Module):
    """ResNet's block of two 3 x 3 convolutions."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(out + self.shortcut(x))


class WideBlock(nn.Module):
    """The pre-activation block of wide residual networks."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(before, width, 1, stride, bias=False) if before != width else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class Bottleneck(nn.Module):
    """ResNet's block of 1 x 1, 3 x 3 and 1 x 1 convolutions, four times as wide outside as inside."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, outside, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outside)
        self.relu3 = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(before, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(out)))))
        return self.relu3(out + self.shortcut(x))


def _stages(block: type[BasicBlock] | type[WideBlock], stem: int, widths: list[int], depth: int) -> nn.Module:
    stages, before = [], stem
    for number, width in enumerate(widths):
        for place in range(depth):
            stages.append(block(before, width, 2 if place == 0 and number > 0 else 1))
            before = width
    return nn.Sequential(*stages)


def resnet(widths: list[int], depth: int = 2, classes: int = 10) -> nn.Sequential:
    """ResNet with basic blocks and the 3 x 3 stem for small images; depth 2 is ResNet-18."""
    return nn.Sequential(
        nn.Conv2d(3, widths[0], 3, 1, 1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(inplace=True),
        _stages(BasicBlock, widths[0], widths, depth),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[-1], classes),
    )


def resnet50(depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 10) -> nn.Sequential:
    """ResNet with bottleneck blocks and the 7 x 7 stem of large images; these depths are ResNet-50."""
    blocks, before = [], width
    for number, depth in enumerate(depths):
        inside = width << number
        for place in range(depth):
            blocks.append(Bottleneck(before, inside, 2 if place == 0 and number > 0 else 1))
            before = 4 * inside
    return nn.Sequential(
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        nn.Sequential(*blocks),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(before, classes),
    )


def wide_resnet(widths: list[int], depth: int, classes: int = 10) -> nn.Sequential:
    """WRN: a stem of 16 channels, `depth` pre-activation blocks a stage."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        _stages(WideBlock, 16, widths, depth),
        nn.BatchNorm2d(widths[-1]),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[-1], classes),
    )


def _block_pairs(prefix: str, count: int, norm: str) -> tuple[Pair, ...]:
    """The sites inside residual blocks; the naive way has no answer for the streams between them."""
    names = [f"{prefix}.{i}" for i in range(count)]
    return tuple(Pair(f"{name}.conv1", f"{name}.conv2", norm=f"{name}.{norm}") for name in names)


def _bottleneck_pairs(count: int) -> tuple[Pair, ...]:
    names = [f"4.{i}" for i in range(count)]
    return tuple(Pair(f"{name}.conv{i}", f"{name}.conv{i + 1}", norm=f"{name}.bn{i}") for name in names for i in (1, 2))


def mlp(width: int, depth: int, classes: int = 10) -> nn.Sequential:
    """`depth` linear layers of one width with ReLU, and a head."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


class Transformer(nn.Module):
    """Pre-norm encoder blocks on a sequence of embeddings, averaged, classified."""

    def __init__(self, dim: int, heads: int, depth: int, classes: int = 10) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EncoderBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class EncoderBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape[0], x.shape[1]
        q, k, v = (
            part.view(batch, length, self.heads, self.size).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(mixed.reshape(batch, length, self.heads * self.size))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


def transformer(dim: int, heads: int, depth: int) -> Transformer:
    return Transformer(dim, heads, depth)


def conv_chain(width: int, layers: int = 3, channels: int = 3) -> nn.Sequential:
    """A few 3 x 3 convolutions of one width, averaged, and a head: nothing between them but ReLU."""
    return vgg([width] * layers, channels)


def _batch(settings: Settings, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(settings.device)
    y = torch.randint(0, 10, shape[:1], generator=generator).to(settings.device)
    return x, y


def cases(settings: Settings) -> list[Case]:
    """The networks of the growth suite, sized for the device."""
    if settings.quick:
        return [
            Case(
                "ResNet-like 4-8",
                lambda: resnet([4, 8], 1),
                *_batch(settings, 4, 3, 8, 8),
                _block_pairs("3", 2, "bn1"),
            ),
            Case("MLP 16", lambda: mlp(16, 2), *_batch(settings, 8, 16), mlp_pairs(2)),
        ]
    return gpu_cases(settings) if settings.cuda else _cpu_cases(settings)


def mlp_pairs(depth: int) -> tuple[Pair, ...]:
    return tuple(Pair(str(2 * i), str(2 * i + 2)) for i in range(depth))


def _transformer_pairs(depth: int) -> tuple[Pair, ...]:
    return tuple(Pair(f"blocks.{i}.fc1", f"blocks.{i}.fc2") for i in range(depth))


def _cpu_cases(settings: Settings) -> list[Case]:
    widths: list[int | str] = [64, "M", 128, "M", 256, 256, "M", 256, 256]
    return [
        Case(
            "conv 3x256, 16x16, b32",
            lambda: conv_chain(256),
            *_batch(settings, 32, 3, 16, 16),
            vgg_pairs([256] * 3),
            compiled=True,
        ),
        Case(
            "VGG-11-like 64-256, b32",
            lambda: vgg(widths),
            *_batch(settings, 32, 3, 32, 32),
            vgg_pairs(widths),
        ),
        Case(
            "ResNet-18-like 64-256, b16",
            lambda: resnet([64, 128, 256, 256]),
            *_batch(settings, 16, 3, 32, 32),
            _block_pairs("3", 8, "bn1"),
        ),
        Case(
            "ResNet-50, 64x64, b8",
            resnet50,
            *_batch(settings, 8, 3, 64, 64),
            _bottleneck_pairs(16),
            naive=0,
        ),
        Case(
            "WRN-10-4, b16",
            lambda: wide_resnet([64, 128, 256], 1),
            *_batch(settings, 16, 3, 32, 32),
            _block_pairs("1", 3, "bn2"),
        ),
        Case("MLP 2048, b512", lambda: mlp(2048, 3), *_batch(settings, 512, 2048), mlp_pairs(3), compiled=True),
        Case(
            "ViT-B block x2, b8x64",
            lambda: transformer(768, 12, 2),
            *_batch(settings, 8, 64, 768),
            _transformer_pairs(2),
        ),
    ]


def gpu_cases(settings: Settings) -> list[Case]:
    """The networks of the growth suite in the sizes of one large GPU."""
    widths: list[int | str] = [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512]
    return [
        Case(
            "conv 3x256, 16x16, b128",
            lambda: conv_chain(256),
            *_batch(settings, 128, 3, 16, 16),
            vgg_pairs([256] * 3),
            compiled=True,
        ),
        Case("VGG-11, b128", lambda: vgg(widths), *_batch(settings, 128, 3, 32, 32), vgg_pairs(widths)),
        Case(
            "ResNet-18, b128",
            lambda: resnet([64, 128, 256, 512]),
            *_batch(settings, 128, 3, 32, 32),
            _block_pairs("3", 8, "bn1"),
        ),
        Case(
            "ResNet-50, 224x224, b64",
            resnet50,
            *_batch(settings, 64, 3, 224, 224),
            _bottleneck_pairs(16),
            naive=0,
        ),
        Case(
            "WRN-28-10, b128",
            lambda: wide_resnet([160, 320, 640], 4),
            *_batch(settings, 128, 3, 32, 32),
            _block_pairs("1", 12, "bn2"),
            naive=0,
        ),
        Case("MLP 2048, b512", lambda: mlp(2048, 3), *_batch(settings, 512, 2048), mlp_pairs(3), compiled=True),
        Case(
            "ViT-B, b64x197",
            lambda: transformer(768, 12, 12),
            *_batch(settings, 64, 197, 768),
            _transformer_pairs(12),
        ),
    ]
