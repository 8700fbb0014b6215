"""Networks for the tests, and the oracle they are judged by: brute-force probing of new units."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastgrow as fg
from fastgrow.how import How, Newborns, Start
from fastgrow.layout import new_positions
from fastgrow.sites import Site, Sites, tensors_of


class Plain(nn.Module):
    """conv -> conv -> flatten -> linear -> linear, hand-written, with strides and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 5, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2))
        self.fc1 = nn.Linear(5 * 4 * 3, 7)
        self.fc2 = nn.Linear(7, 3)
        self.relu = nn.ReLU(inplace=True)
        self.gelu = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        x = torch.tanh(self.conv2(x)).flatten(1)
        return self.fc2(self.gelu(self.fc1(x)))


class Residual(nn.Module):
    """Two residual blocks on one stream, batch norm, a projection shortcut, pooling, ReLU modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(4)
        self.a1 = nn.Conv2d(4, 3, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(3)
        self.a2 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.down = nn.Conv2d(4, 6, 1, stride=2)
        self.b1 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn0(self.stem(x)))
        x = self.relu(x + self.bn2(self.a2(self.relu(self.bn1(self.a1(x))))))
        x = self.relu(self.down(x) + self.b1(x))
        return self.head(self.pool(x).flatten(1))


class Branching(nn.Module):
    """cat, chunk, depthwise, grouped and transposed convolutions, GroupNorm, average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(2, 4, 3, padding=1)
        self.right = nn.Conv2d(2, 3, 1)
        self.depthwise = nn.Conv2d(7, 7, 3, padding=1, groups=7)
        self.point = nn.Conv2d(7, 8, 1)
        self.norm = nn.GroupNorm(4, 8)
        self.grouped = nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.after = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.out = nn.Conv2d(4, 3, 3, padding=1)
        self.silu = nn.SiLU()
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = self.pool(self.silu(self.depthwise(x)))
        x = self.silu(self.norm(self.point(x)))
        x = torch.tanh(self.grouped(x))
        x = torch.tanh(self.up(torch.tanh(self.after(x))))
        return self.out(x).mean((2, 3))


class Gated(nn.Module):
    """A gated MLP whose gate and up projection share a weight, and attention written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.qkv = nn.Linear(8, 3 * 8)
        self.proj = nn.Linear(8, 8)
        self.gate_up = nn.Linear(8, 2 * 5)
        self.down = nn.Linear(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        gate, up = self.gate_up(x).chunk(2, -1)
        x = x + self.down(F.silu(gate) * up)
        return self.head(x.mean(1))


def image_batch(channels: int = 2, size: int = 8, samples: int = 6, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, channels, size, size, generator=generator, dtype=dtype)
    return x, torch.arange(samples) % 3


def classification(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(x), y)


class Blank(How):
    """Units with all weights zero: what the oracle probes."""

    starts_at_zero = True

    def __init__(self, incoming: dict[str, Tensor] | None = None) -> None:
        self.incoming = incoming or {}

    def start(self, newborns: Newborns) -> Start:
        return Start(incoming=dict(self.incoming))


def new_part(
    model: nn.Module, sites: Sites, site: Site, layer: str, role: str, old_width: int, source: Tensor
) -> Tensor:
    """The new rows or columns of `source` (a weight or its gradient), canonical, unit after unit."""
    from fastgrow.layout import unit_positions

    slot = site.weight(layer, role)
    sizes = sites.sizes(model)
    before = {**sizes, site.axis: old_width // site.step}
    positions = new_positions(slot.layout, before, sizes)
    steps = sizes[site.axis] - before[site.axis]
    part = source.index_select(slot.dim, positions).movedim(slot.dim, 0)
    order = unit_positions(slot.layout, site.axis, {**sizes, site.axis: steps})
    return part[order.reshape(-1)].reshape(steps, order.shape[1], *part.shape[1:])


def incoming_gradients(model: nn.Module, sites: Sites, site: Site, old_width: int) -> Tensor:
    """(steps, rows of a unit x in ...) the gradient at the new units' incoming weights."""
    tensors = tensors_of(model)
    parts = []
    for name in site.producers:
        gradient = tensors[site.weight(name, "producer").tensor].grad
        assert gradient is not None, name
        parts.append(new_part(model, sites, site, name, "producer", old_width, gradient).flatten(1))
    return torch.cat(parts, 1)


def probe(model: nn.Module, sites: Sites, site: Site, loss_of: Callable[[nn.Module], Tensor]) -> Tensor:
    """M of a site whose units are single channels, by giving one new unit every outgoing unit vector in turn."""
    grown = copy.deepcopy(model)
    fg.grow(grown, {site.name: site.step}, Blank(), sites=sites)
    tensors = tensors_of(grown)
    old_width = sites.width(model, site)
    rows = []
    for name in site.consumers:
        slot = site.weight(name, "consumer")
        weight = tensors[slot.tensor]
        sizes = sites.sizes(grown)
        positions = new_positions(slot.layout, {**sizes, site.axis: sizes[site.axis] - 1}, sizes)
        index = torch.zeros(weight.shape, dtype=torch.bool)
        index.index_fill_(slot.dim, positions, True)
        # consumer.weight[:, j].reshape(-1): output first, then the unit's positions and taps
        flat = index.movedim(slot.dim, 1).nonzero()
        for entry in flat:
            out, position, *taps = entry.tolist()
            place = [out, position] if slot.dim == 1 else [position, out]
            with torch.no_grad():
                weight[(*place, *taps)] = 1.0
            grown.zero_grad()
            loss_of(grown).backward()
            rows.append(incoming_gradients(grown, sites, site, old_width)[0])
            with torch.no_grad():
                weight[(*place, *taps)] = 0.0
    return torch.stack(rows)


def small() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network of linear layers in float64, a batch and its targets."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    return model, torch.randn(16, 8).double(), torch.randn(16, 4).double()
