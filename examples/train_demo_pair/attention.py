"""Masks that keep packed documents apart, and sliding-window attention that touches only two windows of keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from model import BOS, FULL, SLIDING, WINDOW


def _additive(visible: torch.Tensor) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=torch.bfloat16).masked_fill(~visible, float("-inf"))


def masks(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Causal masks within documents (each begins with <bos>), for ids [B, L] with L a multiple of the window W.

    full: [B, 1, L, L]; sliding: [B * L / W, 1, W, 2 W], one block of queries against its own window and the one before.
    """
    batch, length = ids.shape
    document = (ids == BOS).cumsum(1)
    gap = torch.arange(length)[:, None] - torch.arange(length)[None]
    full = (document[:, :, None] == document[:, None, :]) & (gap >= 0)
    here = document.view(batch, -1, WINDOW)
    before = F.pad(document, (WINDOW, 0), value=-1)[:, :-WINDOW].view(batch, -1, WINDOW)
    keys = torch.cat([before, here], -1)
    gap = WINDOW + torch.arange(WINDOW)[:, None] - torch.arange(2 * WINDOW)[None]
    sliding = (here[..., :, None] == keys[..., None, :]) & (gap >= 0) & (gap < WINDOW)
    return {FULL: _additive(full)[:, None], SLIDING: _additive(sliding).flatten(0, 1)[:, None]}


def _windows(x: torch.Tensor) -> torch.Tensor:
    """Keys or values [B, 1, L, D] -> [B * L / W, 1, 2 W, D]: each window after the one before it."""
    before = F.pad(x, (0, 0, WINDOW, 0))[:, :, :-WINDOW]
    blocks = [y.reshape(x.shape[0], -1, WINDOW, x.shape[-1]) for y in (before, x)]
    return torch.cat(blocks, 2).flatten(0, 1)[:, None]


def packed_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     attention_mask: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
    """query [B, H, L, D], key and value [B, 1, L, D] -> [B, L, H, D]; Gemma 4's scale is 1."""
    batch, heads, length, dim = query.shape
    query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    if module.is_sliding:
        key, value = _windows(key), _windows(value)
        query = query.view(batch, heads, -1, WINDOW, dim).transpose(1, 2).flatten(0, 1)
    key, value = key.expand(-1, heads, -1, -1), value.expand(-1, heads, -1, -1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=1.0)
    return out.transpose(1, 2).reshape(batch, length, heads, dim), None


AttentionInterface.register("packed", packed_attention)
