"""Masks that keep packed documents apart, and sliding-window attention that touches only two windows of keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from model import BOS, FULL, SLIDING, WINDOW

HIDDEN = -1e4  # finite, so that a row that sees nothing (the strict view of a <bos>) gives no NaN


def _additive(visible: torch.Tensor) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=torch.bfloat16).masked_fill(~visible, HIDDEN)


def masks(ids: torch.Tensor, strict: bool = False) -> dict[str, torch.Tensor]:
    """Causal masks within documents (each begins with <bos>), for ids [B, L] with L a multiple of the window W.

    full: [B, 1, L, L]; sliding: [B * L / W, 1, W, 2 W], one block of queries against its own window and the one before.
    `strict` is the drafter's view: a query at P sees rows j < P only, in sliding layers the last W of them.
    """
    batch, length = ids.shape
    document = (ids == BOS).cumsum(1)
    gap = torch.arange(length)[:, None] - torch.arange(length)[None]
    full = (document[:, :, None] == document[:, None, :]) & (gap >= strict)
    here = document.view(batch, -1, WINDOW)
    before = F.pad(document, (WINDOW, 0), value=-1)[:, :-WINDOW].view(batch, -1, WINDOW)
    keys = torch.cat([before, here], -1)
    gap = WINDOW + torch.arange(WINDOW)[:, None] - torch.arange(2 * WINDOW)[None]
    sliding = (here[..., :, None] == keys[..., None, :]) & (gap >= strict) & (gap < WINDOW + strict)
    return {FULL: _additive(full)[:, None], SLIDING: _additive(sliding).flatten(0, 1)[:, None]}


def _windows(x: torch.Tensor) -> torch.Tensor:
    """Keys or values [B, 1, L, D] -> [B * L / W, 1, 2 W, D]: each window after the one before it."""
    before = F.pad(x, (0, 0, WINDOW, 0))[:, :, :-WINDOW]
    blocks = [y.reshape(x.shape[0], -1, WINDOW, x.shape[-1]) for y in (before, x)]
    return torch.cat(blocks, 2).flatten(0, 1)[:, None]


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """query [B, H, L, D], key and value [B, 1, L, D] -> [B, L, H, D]; Gemma 4's scale is 1."""
    batch, heads, length, dim = query.shape
    query, key = query.to(value.dtype), key.to(value.dtype)  # rope leaves float32 under autocast
    if module.is_sliding:
        key, value = _windows(key), _windows(value)
        query = query.view(batch, heads, -1, WINDOW, dim).transpose(1, 2).flatten(0, 1)
    # One K/V head: its query heads are rows of one product. Twice the speed of SDPA here, forward and backward.
    rows = query.flatten(1, 2)
    scores = torch.matmul(rows, key[:, 0].transpose(1, 2)).unflatten(1, query.shape[1:3])
    probs = torch.softmax(scores + attention_mask.to(value.dtype), -1)
    out = torch.matmul(probs.flatten(1, 2), value[:, 0]).unflatten(1, query.shape[1:3])
    return out.transpose(1, 2).reshape(batch, length, heads, dim), None


AttentionInterface.register("packed", packed_attention)
