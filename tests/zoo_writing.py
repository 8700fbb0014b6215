"""Models that write the same things in the many ways that PyTorch allows, each with its inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint


class Padded(nn.Module):
    """Two convolutions in 1, 2 or 3 dimensions with these options, a flatten."""

    def __init__(self, dims: int, transposed: bool = False, size: int = 6, **options: Any) -> None:
        super().__init__()
        conv = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
        self.conv1, self.conv2 = conv(2, 3, 3, **options), conv(3, 3, 3, **options)
        with torch.no_grad():
            length = self.conv2(self.conv1(torch.zeros(1, 2, *[size] * dims))).numel()
        self.head = nn.Linear(length, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv2(torch.tanh(self.conv1(x)))).flatten(1))


class CausalConv1d(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


class WaveNet(nn.Module):
    """Gated residual blocks of causal dilated convolutions with skip outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.filters = nn.ModuleList(CausalConv1d(4, 3, 2, dilation=2**i) for i in range(3))
        self.gates = nn.ModuleList(CausalConv1d(4, 3, 2, dilation=2**i) for i in range(3))
        self.residuals = nn.ModuleList(nn.Conv1d(3, 4, 1) for _ in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(3, 5, 1) for _ in range(3))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(5, 6, 1), nn.ReLU(), nn.Conv1d(6, 7, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).transpose(1, 2)
        total: Any = 0
        for f, g, r, s in zip(self.filters, self.gates, self.residuals, self.skips, strict=True):
            z = torch.tanh(f(x)) * torch.sigmoid(g(x))
            total = total + s(z)
            x = x + r(z)
        return self.end(total)


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.decoder_bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.encoder(x))
        return F.linear(code, self.encoder.weight.t(), self.decoder_bias)


class DeepAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.rnn = kind(4, 5, batch_first=True, num_layers=2)
        self.fc1, self.relu, self.fc2 = nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        out, _ = self.rnn(self.embed(tokens))
        return self.fc2(self.relu(self.fc1(out[:, -1, :])))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(9, 4, mode="mean")
        self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, text: Tensor, offsets: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(self.embedding(text, offsets))))


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 4), nn.Linear(5, 6)
        self.bilinear, self.fc = nn.Bilinear(4, 6, 5), nn.Linear(5, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.bilinear(torch.tanh(self.left(a)), torch.tanh(self.right(b)))))


def weight_normed() -> nn.Module:
    norm = parametrizations.weight_norm
    return nn.Sequential(norm(nn.Linear(5, 6)), nn.Tanh(), norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 3))


def spectral_normed() -> nn.Module:
    norm = parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def orthogonal() -> nn.Module:
    return nn.Sequential(
        parametrizations.orthogonal(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)
    )


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    prune.l1_unstructured(model[2], "weight", 0.5)
    return model


class LoRALinear(nn.Module):
    """A frozen base and a low-rank adapter, as peft writes it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_dropout = nn.Dropout(0.0)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        self.scaling = 2.0

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        return result + self.lora_B(self.lora_A(self.lora_dropout(x))) * self.scaling


def lora() -> nn.Module:
    return nn.Sequential(
        LoRALinear(nn.Linear(5, 6)), nn.GELU(), LoRALinear(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 3)
    )


class Functional(nn.Module):
    """Parameters of its own, called by F.conv2d, F.linear, matmul, addmm, einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 2, 3, 3) * 0.3)
        self.weight = nn.Parameter(torch.randn(5, 4) * 0.3)
        self.bias = nn.Parameter(torch.zeros(5))
        self.w2, self.b2 = nn.Parameter(torch.randn(5, 6) * 0.3), nn.Parameter(torch.zeros(6))
        self.w3 = nn.Parameter(torch.randn(6, 4) * 0.3)
        self.w4, self.w5 = nn.Parameter(torch.randn(5, 4) * 0.3), nn.Parameter(torch.randn(3, 5) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.conv2d(x, self.kernel, padding=1)).mean((2, 3))
        x = torch.tanh(F.linear(x, self.weight, self.bias))
        x = torch.tanh(torch.addmm(self.b2, x, self.w2))
        x = torch.tanh(x @ self.w3)
        x = torch.tanh(torch.einsum("bi,oi->bo", x, self.w4))
        return torch.einsum("bi,oi->bo", x, self.w5)


class Einsum(nn.Module):
    """Sequences through einsum with three-dimensional weights: heads written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.wq = nn.Parameter(torch.randn(6, 2, 3) * 0.3)
        self.wk = nn.Parameter(torch.randn(6, 2, 3) * 0.3)
        self.wv = nn.Parameter(torch.randn(6, 2, 3) * 0.3)
        self.wo = nn.Parameter(torch.randn(2, 3, 6) * 0.3)
        self.fc1, self.fc2 = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.up(x))
        q = torch.einsum("btd,dhk->bhtk", x, self.wq)
        k = torch.einsum("btd,dhk->bhtk", x, self.wk)
        v = torch.einsum("btd,dhk->bhtk", x, self.wv)
        attention = torch.softmax(torch.einsum("bhtk,bhsk->bhts", q, k), -1)
        o = torch.einsum("bhts,bhsk->bhtk", attention, v)
        x = x + torch.einsum("bhtk,hkd->btd", o, self.wo)
        return self.fc2(torch.tanh(self.fc1(x))).mean(1)


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None


class Dictionary(nn.Module):
    def __init__(self, dataclass: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 6), nn.Linear(6, 3)
        self.dataclass = dataclass

    def forward(self, x: Tensor) -> Any:
        logits = self.fc2(torch.tanh(self.fc1(x)))
        return Output(logits) if self.dataclass else {"logits": logits, "extra": None}


class Nested(nn.Module):
    """Lists and dictionaries of tensors, None, numbers and keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(5, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(
        self, parts: list[Tensor], options: dict[str, Tensor], scale: float = 1.0, mask: Tensor | None = None
    ) -> Tensor:
        h = torch.tanh(self.fc1(parts[0]) * options["gain"] + self.fc2(parts[1]) * scale)
        if mask is not None:
            h = h * mask
        return self.fc3(h)


class Buffers(nn.Module):
    """Buffers of the channels' size, one of them not saved, and a scale that is a buffer too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 6), nn.Linear(6, 3)
        self.register_buffer("centre", torch.randn(6) * 0.1)
        self.register_buffer("gain", torch.rand(6) + 0.5, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)) * self.gain)


class CentredBuffer(Buffers):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x) - self.centre) * self.gain)


class Shared(nn.Module):
    """One block called three times, one head called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(5, 6)
        self.up, self.down, self.act = nn.Linear(6, 7), nn.Linear(7, 6), nn.ReLU()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        first = self.head(x)
        for _ in range(3):
            x = x + self.down(self.act(self.up(x)))
        return first + self.head(x)


class Recursive(nn.Module):
    """A square layer called on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.core, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        for _ in range(2):
            x = torch.tanh(self.core(x))
        return self.head(x)


class Loops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 2), "b": nn.Linear(6, 3)})
        self.acts = nn.ModuleList(nn.ReLU() for _ in range(3))
        self.inp = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.inp(x)
        for layer, act in zip(self.layers, self.acts, strict=True):
            x = act(layer(x))
        return {name: head(x) for name, head in self.heads.items()}


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6)) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(x)


class Reshapes(nn.Module):
    """Sizes read from the tensors, as people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3, stride=2)
        self.fc1, self.fc2 = nn.Linear(3 * 9, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        B = x.shape[0]
        x = F.silu(self.conv1(x))
        x = x / (x.shape[1] ** 0) + 0 * x.size(0)
        x = torch.tanh(self.conv2(x)).view(B, -1)
        return self.fc2(F.silu(self.fc1(x)))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        y = self.relu(self.conv2(x.clone()))
        y = y + x
        y += x
        y.mul_(0.5).tanh_()
        y = y + 2.0 * x
        return self.fc(y.mean((2, 3)))


class Cuts(nn.Module):
    """chunk, split, unbind, narrow, index_select and slices with fixed indices."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(5, 8), nn.Linear(4, 6), nn.Linear(6, 5)
        self.stacked, self.fc4, self.fc5 = nn.Linear(5, 6), nn.Linear(3, 4), nn.Linear(2, 3)
        self.register_buffer("order", torch.tensor([2, 0]))

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.tanh(self.fc1(x)).chunk(2, -1)
        c, d = torch.tanh(self.fc2(a * 0.5 + b)).split([4, 2], -1)
        x = self.fc3(torch.cat([d, c.narrow(-1, 0, 4)], -1))
        one, two = torch.tanh(self.stacked(x)).view(-1, 2, 3).unbind(1)
        y = torch.tanh(self.fc4(one + two))
        return self.fc5(y.index_select(-1, self.order))


class ChannelIndexed(nn.Module):
    """Channels picked one by one: they must keep their places."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.fc1(x))
        h = h[:, [5, 4, 3, 2, 1, 0]]
        return self.fc3(torch.tanh(self.fc2(h)))


class GroupedAttention(nn.Module):
    """nn.Transformer-free attention with batch_first, masks as keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(7, 8), nn.Embedding(6, 8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 8))
        self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 7, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        B, T = input_ids.shape
        x = self.embed(input_ids) + self.position(torch.arange(T, device=input_ids.device))[None]
        q, k, v = (f(x).view(B, T, -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        mask = torch.tril(torch.ones(T, T, dtype=torch.bool, device=x.device))
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool()
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.o(a.transpose(1, 2).reshape(B, T, -1))
        return self.head(x + self.fc2(F.gelu(self.fc1(x))))


class Noisy(nn.Module):
    """Variational autoencoder: reparametrised noise between encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.mu, self.logvar = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(6, 4)
        self.fc3, self.fc4 = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.tanh(self.fc1(x))
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar) if self.training else mu
        return self.fc4(torch.tanh(self.fc3(z))), mu, logvar


class Highway(nn.Module):
    """A gate between a layer and its input: the stream's channels and the gate's are one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.h, self.t = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        t = torch.sigmoid(self.t(x))
        x = t * torch.tanh(self.h(x)) + (1 - t) * x
        return self.head(x)


class FiLM(nn.Module):
    """Feature-wise affine modulation by a conditioning network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3)
        self.cond, self.act = nn.Linear(5, 8), nn.SiLU()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        gamma, beta = self.cond(c).chunk(2, dim=1)
        x = self.conv1(x) * (1 + gamma[:, :, None, None]) + beta[:, :, None, None]
        return self.conv2(self.act(x)).mean((2, 3))


class Maxout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x.view(x.shape[0], 4, 2).max(-1).values)


class Softmaxed(nn.Module):
    """A softmax and an L2 normalisation over channels: neither may grow."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.fc4 = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.softmax(self.fc1(x), -1)
        x = F.normalize(self.fc2(x), dim=-1)
        return self.fc4(torch.tanh(self.fc3(x)))


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 2, 7, 7)


def vectors(n: int = 6) -> Tensor:
    return torch.randn(n, 5)


def tokens(n: int = 3, length: int = 6) -> Tensor:
    return torch.randint(0, 7, (n, length))


WRITTEN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "conv1d": (lambda: Padded(1, padding=1), lambda: torch.randn(4, 2, 6)),
    "conv3d": (lambda: Padded(3, stride=1, padding=1, size=4), lambda: torch.randn(3, 2, 4, 4, 4)),
    "conv1d_same": (lambda: Padded(1, padding="same", dilation=2), lambda: torch.randn(4, 2, 6)),
    "conv2d_same": (lambda: Padded(2, padding="same"), lambda: torch.randn(4, 2, 6, 6)),
    "conv2d_valid": (lambda: Padded(2, padding="valid"), lambda: torch.randn(4, 2, 6, 6)),
    "conv3d_same": (lambda: Padded(3, padding="same", size=4), lambda: torch.randn(3, 2, 4, 4, 4)),
    "reflect": (lambda: Padded(2, padding=1, padding_mode="reflect"), lambda: torch.randn(4, 2, 6, 6)),
    "circular": (lambda: Padded(2, padding=1, padding_mode="circular"), lambda: torch.randn(4, 2, 6, 6)),
    "replicate": (lambda: Padded(2, padding=1, padding_mode="replicate"), lambda: torch.randn(4, 2, 6, 6)),
    "replicate3d": (lambda: Padded(3, padding=1, padding_mode="replicate", size=4), lambda: torch.randn(2, 2, 4, 4, 4)),
    "reflect1d": (lambda: Padded(1, padding=1, padding_mode="reflect"), lambda: torch.randn(4, 2, 6)),
    "same_reflect": (
        lambda: Padded(2, padding="same", padding_mode="reflect"), lambda: torch.randn(4, 2, 6, 6)
    ),
    "dilated": (lambda: Padded(2, padding=2, dilation=2), lambda: torch.randn(4, 2, 6, 6)),
    "strided": (lambda: Padded(2, padding=1, stride=2), lambda: torch.randn(4, 2, 6, 6)),
    "transposed": (
        lambda: Padded(2, True, size=4, padding=1, stride=2, output_padding=1), lambda: torch.randn(3, 2, 4, 4)
    ),
    "transposed1d": (
        lambda: Padded(1, True, size=4, padding=1, stride=2, output_padding=1), lambda: torch.randn(3, 2, 4)
    ),
    "transposed3d": (
        lambda: Padded(3, True, size=2, padding=1, stride=2, dilation=2), lambda: torch.randn(2, 2, 2, 2, 2)
    ),
    "wavenet": (WaveNet, tokens),
    "tied_autoencoder": (TiedAutoencoder, lambda: torch.randn(5, 6)),
    "autoencoder": (DeepAutoencoder, lambda: torch.randn(5, 6)),
    "lstm": (lambda: Recurrent(nn.LSTM), tokens),
    "gru": (lambda: Recurrent(nn.GRU), tokens),
    "rnn": (lambda: Recurrent(nn.RNN), tokens),
    "embedding_bag": (Bag, lambda: (torch.randint(0, 9, (8,)), torch.tensor([0, 3, 5]))),
    "bilinear": (TwoTowers, lambda: (vectors(), vectors())),
    "weight_norm": (weight_normed, vectors),
    "spectral_norm": (spectral_normed, vectors),
    "orthogonal": (orthogonal, vectors),
    "pruned": (pruned, vectors),
    "lora": (lora, vectors),
    "functional": (Functional, images),
    "einsum": (Einsum, lambda: torch.randn(3, 5, 4)),
    "dictionary": (lambda: Dictionary(False), vectors),
    "dataclass": (lambda: Dictionary(True), vectors),
    "nested": (
        Nested,
        lambda: {"parts": [vectors(), torch.randn(6, 4)], "options": {"gain": torch.rand(6, 1)}, "mask": None},
    ),
    "nested_swapped": (
        Nested,
        lambda: {"options": {"gain": torch.rand(6, 1)}, "scale": 0.5, "parts": [vectors(), torch.randn(6, 4)],
                 "mask": torch.rand(6, 1)},
    ),
    "buffers": (Buffers, vectors),
    "centred_buffer": (CentredBuffer, vectors),
    "shared": (Shared, vectors),
    "recursive": (Recursive, vectors),
    "loops": (Loops, vectors),
    "checkpointed": (Checkpointed, vectors),
    "reshapes": (Reshapes, images),
    "in_place": (InPlace, images),
    "cuts": (Cuts, vectors),
    "indexed": (ChannelIndexed, vectors),
    "grouped_query": (GroupedAttention, lambda: {"input_ids": tokens(), "attention_mask": torch.ones(3, 6)}),
    "vae": (Noisy, vectors),
    "highway": (Highway, vectors),
    "film": (FiLM, lambda: (images(), vectors(4))),
    "maxout": (Maxout, vectors),
    "softmaxed": (Softmaxed, vectors),
}  # fmt: skip
