"""Image transformers and all-MLP models as torchvision's and timm's sources write them, small."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_parts import Permute, StochasticDepth


class ViT(nn.Module):
    """timm's VisionTransformer: class token, position embedding, fused qkv, LayerScale, DropPath."""

    def __init__(self, dim: int = 8, heads: int = 2, glu: bool = False, fused: bool = True) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 5, dim) * 0.02)
        self.pos_drop = nn.Dropout(0.1)
        self.blocks = nn.Sequential(*[ViTBlock(dim, heads, glu, fused) for _ in range(2)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.pos_drop(x + self.pos_embed)
        x = self.norm(self.blocks(x))
        return self.head(x[:, 0])


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(0.1 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TimmAttention(nn.Module):
    def __init__(self, dim: int, heads: int, fused: bool = True) -> None:
        super().__init__()
        self.num_heads = heads
        self.head_dim = dim // heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = fused
        self.qkv = nn.Linear(dim, dim * 3)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, self.num_heads * self.head_dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        self.drop1 = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop1(self.act(self.fc1(x))))


class GluMlp(nn.Module):
    """timm's: the gate is the second chunk."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.Sigmoid(), nn.Linear(hidden // 2, dim)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.norm(x1 * self.act(x2)))


class ViTBlock(nn.Module):
    def __init__(self, dim: int, heads: int, glu: bool, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = TimmAttention(dim, heads, fused)
        self.mlp = GluMlp(dim, 10) if glu else Mlp(dim, 10)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)
        self.drop_path1, self.drop_path2 = StochasticDepth(0.1), StochasticDepth(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class WindowAttention(nn.Module):
    """torchvision's shifted_window_attention as a module, relative position bias table and roll included."""

    def __init__(self, dim: int, window: int, heads: int, shift: int) -> None:
        super().__init__()
        self.window_size, self.num_heads, self.shift = window, heads, shift
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.2)
        coords = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0).contiguous()
        relative[:, :, 0] += window - 1
        relative[:, :, 1] += window - 1
        relative[:, :, 0] *= 2 * window - 1
        self.register_buffer("relative_position_index", relative.sum(-1).flatten())

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        w = self.window_size
        bias = self.relative_position_bias_table[self.relative_position_index]
        bias = bias.view(w * w, w * w, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        num_windows = (H // w) * (W // w)
        x = x.view(B, H // w, w, W // w, w, C)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(B * num_windows, w * w, C)
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias)
        head = self.qkv.out_features // 3 // self.num_heads
        qkv = qkv.reshape(x.size(0), x.size(1), 3, self.num_heads, head).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q = q * head**-0.5
        attn = q.matmul(k.transpose(-2, -1))
        attn = attn + bias
        attn = F.softmax(attn, dim=-1)
        x = attn.matmul(v).transpose(1, 2).reshape(x.size(0), x.size(1), self.num_heads * head)
        x = F.linear(x, self.proj.weight, self.proj.bias)
        x = x.view(B, H // w, W // w, w, w, C)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)
        if self.shift:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        return x


class PatchMerging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x0, x1 = x[..., 0::2, 0::2, :], x[..., 1::2, 0::2, :]
        x2, x3 = x[..., 0::2, 1::2, :], x[..., 1::2, 1::2, :]
        return self.reduction(self.norm(torch.cat([x0, x1, x2, x3], -1)))


class SwinBlock(nn.Module):
    def __init__(self, dim: int, shift: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, 2, 2, shift)
        self.mlp = Mlp(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(3, 8, 2, 2), Permute([0, 2, 3, 1]), nn.LayerNorm(8))
        self.stage1 = nn.Sequential(SwinBlock(8, 0), SwinBlock(8, 1))
        self.merge = PatchMerging(8)
        self.stage2 = nn.Sequential(SwinBlock(16, 0))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.merge(self.stage1(self.embed(x))))
        return self.head(self.norm(x).mean((1, 2)))


class MixerBlock(nn.Module):
    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp_tokens, self.mlp_channels = Mlp(tokens, 5), Mlp(dim, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 8, 8)
        self.blocks = nn.Sequential(MixerBlock(6, 4), MixerBlock(6, 4))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


class GMLPBlock(nn.Module):
    """gMLP's spatial gating unit: half of the channels, projected over the tokens, gate the other half."""

    def __init__(self, dim: int, tokens: int, hidden: int, normed: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.proj_in, self.act = nn.Linear(dim, hidden), nn.GELU()
        self.sgu_norm = nn.LayerNorm(hidden // 2) if normed else nn.Identity()
        self.spatial = nn.Linear(tokens, tokens)
        self.proj_out = nn.Linear(hidden // 2, dim)
        nn.init.ones_(self.spatial.bias)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.act(self.proj_in(self.norm(x))).chunk(2, dim=-1)
        v = self.spatial(self.sgu_norm(v).transpose(-1, -2)).transpose(-1, -2)
        return x + self.proj_out(u * v)


class GMLP(nn.Module):
    def __init__(self, normed: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 8, 8)
        self.blocks = nn.Sequential(GMLPBlock(6, 4, 8, normed), GMLPBlock(6, 4, 8, normed))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(x).mean(1))
