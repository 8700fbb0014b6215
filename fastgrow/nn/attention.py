"""Torch's multi-head attention with a number of heads that the embedding does not set."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MultiheadAttention"]


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` that keeps its head size as heads are added.

    ``out_proj(concat_h softmax(Q_h K_h^T / sqrt(d)) V_h)``, with ``num_heads * head_dim`` rows in each of the
    projections, whatever ``embed_dim`` is: torch's takes d = embed_dim / num_heads. Arguments, parameters, names in
    ``state_dict()``, shapes, masks, dropout and errors are torch's; as it is built it computes what torch's does,
    to rounding. A mask of shape (N * num_heads, L, S) counts the present heads.

    Nested tensors, which ``torch.nn.TransformerEncoder`` makes of padded batches in evaluation mode, are accepted for
    self-attention. Torch's fused inference kernels serve as long as ``num_heads * head_dim == embed_dim``.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # Torch's layers ask this before they hand the weights to kernels that divide embed_dim by num_heads.
        known: bool = vars(self)["_qkv_same_embed_dim"]
        return known and self.fits_torch

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        vars(self)["_qkv_same_embed_dim"] = value

    @property
    def fits_torch(self) -> bool:
        """Whether the heads fill ``embed_dim``, as torch's own attention wants them to."""
        return self.num_heads * self.head_dim == self.embed_dim

    def forward(
        self,
        query: Tensor,  # (N, L, E), (L, N, E) or (L, E)
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,  # (N, S) or (S,)
        need_weights: bool = True,
        attn_mask: Tensor | None = None,  # (L, S) or (N * num_heads, L, S)
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested or key.is_nested or value.is_nested:
            masked = key_padding_mask is not None or attn_mask is not None
            return self._of_nested(query, query is key is value and not masked and not need_weights), None
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        q, k, v = self._projected(query, key, value)
        if not batched:
            q, k, v = (part.unsqueeze(0) for part in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None
        if not causal:
            mask = self._mask(attn_mask, key_padding_mask, query.dtype, (q.shape[0], q.shape[1], k.shape[1]))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = _with_row(k, self.bias_k), _with_row(v, self.bias_v)
        heads = (self.num_heads, self.head_dim)
        q, k, v = (part.unflatten(-1, heads).transpose(1, 2) for part in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            attended = weights @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        # (N, H, L, d) -> (N, L, H d), or (L, N, H d)
        order = (0, 2, 1, 3) if self.batch_first or not batched else (2, 0, 1, 3)
        output = self.out_proj(attended.permute(order).flatten(-2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            output, weights = output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of all heads, (..., num_heads * head_dim) each, in as few products as torch."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is None:
            projections = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            parts = [F.linear(x, w) for x, w in zip((query, key, value), projections, strict=True)]
            # One bias for three weights: it is added apart, so that each product has parameters of its own.
            return tuple(parts) if bias is None else tuple(p + b for p, b in zip(parts, bias.chunk(3), strict=True))
        if key is value and query is key:
            return F.linear(query, weight, bias).chunk(3, -1)
        inner = self.num_heads * self.head_dim
        cuts = [inner, 2 * inner] if key is value else [inner, inner, inner]
        biases = [None] * len(cuts) if bias is None else bias.split(cuts)
        sources = (query, key, value)
        parts = [F.linear(x, w, b) for x, w, b in zip(sources, weight.split(cuts), biases, strict=False)]
        return (parts[0], *parts[1].chunk(2, -1)) if key is value else tuple(parts)

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype, shape: tuple[int, int, int]
    ) -> Tensor | None:
        """Both masks added, broadcast against (N, H, L, S); rows for the bias and for zero attention are not masked."""
        batch, length, keys = shape
        masks: list[Tensor] = []
        if attn_mask is not None:
            wanted = (length, keys) if attn_mask.dim() == 2 else (batch * self.num_heads, length, keys)
            if tuple(attn_mask.shape) != wanted:
                raise RuntimeError(
                    f"The shape of the {attn_mask.dim()}D attn_mask is {tuple(attn_mask.shape)}, but should be {wanted}"
                )
            mask = _additive(attn_mask, "attn_mask", dtype)
            masks.append(mask if mask.dim() == 2 else mask.unflatten(0, (batch, self.num_heads)))
        if key_padding_mask is not None:
            if tuple(key_padding_mask.shape) != (batch, keys):
                raise AssertionError(
                    f"key_padding_mask has shape {tuple(key_padding_mask.shape)}, but should be {(batch, keys)}"
                )
            masks.append(_additive(key_padding_mask, "key_padding_mask", dtype)[:, None, None])
        if not masks:
            return None
        mask = masks[0] if len(masks) == 1 else masks[0] + masks[1]
        further = int(self.bias_k is not None) + int(self.add_zero_attn)
        return F.pad(mask, (0, further)) if further else mask

    def _of_nested(self, query: Tensor, plain: bool) -> Tensor:
        """Self-attention of sequences of different lengths, (N, *, E) nested: padded, masked, and nested again."""
        if not plain or not self.batch_first:
            raise AssertionError(
                "MultiheadAttention takes nested tensors for self-attention alone, with batch_first=True, "
                "need_weights=False and no masks"
            )
        lengths = [len(sequence) for sequence in query.unbind()]
        padded = query.to_padded_tensor(0.0)
        ends = torch.tensor(lengths, device=padded.device)
        beyond = torch.arange(padded.shape[1], device=padded.device) >= ends[:, None]
        output, _ = self.forward(padded, padded, padded, key_padding_mask=beyond, need_weights=False)
        return torch.nested.as_nested_tensor([row[:length] for row, length in zip(output, lengths, strict=True)])


def _with_row(x: Tensor, row: Tensor) -> Tensor:
    """(N, S, I) and (1, 1, I) -> (N, S + 1, I)."""
    # Zeros of x's own batch size, be it what it may: an expanded row would carry the size it was traced with.
    return torch.cat([x, torch.zeros_like(x.sum(1, keepdim=True)) + row], 1)


def _additive(mask: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """A mask to be added to the scores: -inf where a boolean one is True."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    if not mask.is_floating_point():
        raise AssertionError(f"only bool and floating types of {name} are supported")
    return mask
