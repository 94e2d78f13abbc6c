"""What the rows of a pass see of the K/V buffers, and attention over it on stock operations."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx

KEY_TILE = 1024
SCORES_PER_TILE = 2**24  # 64 MiB of float32 scores: heads * queries * KEY_TILE


class Sight(NamedTuple):
    """What M rows of each of B batch members see in the buffers of one attention type; worked out once a pass.

    Row m stands at position first + m and sees the keys at positions 0 .. first + m, the last `window` of them if there
    is one. Position p lies in buffer row p, in a ring (whatever has a window) in row p % ring.
    """

    first: mx.array  # [B] int32
    window: int | None
    bucket: int  # buffer rows that hold all visible keys where there is no window
    mask: mx.array  # [B, 1, heads/kv_heads * M, keys], the same for stock operations: True where visible


def fold_mask(visible: mx.array, heads: int, kv_heads: int) -> mx.array:
    """visible [B, M, L] -> [B, 1, heads/kv_heads * M, L], the row order of `attend_masked`."""
    batch, rows, keys = visible.shape
    group = heads // kv_heads
    tiled = mx.broadcast_to(visible[:, None], (batch, group, rows, keys))
    return tiled.reshape(batch, 1, group * rows, keys)


def attend(queries: mx.array, keys: mx.array, values: mx.array, sight: Sight) -> mx.array:
    """queries [B, heads, M, D], whole K/V buffers [B, kv_heads, R, D] -> [B * M, heads * D]."""
    if sight.window is None:
        keys, values = keys[:, :, : sight.bucket], values[:, :, : sight.bucket]
    return attend_masked(queries, keys, values, sight.mask)


def attend_masked(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array) -> mx.array:
    """queries [B, heads, M, D], keys/values [B, kv_heads, L, D], folded mask -> [B * M, heads * D].

    Query heads that share a K/V head become rows of one product, so K and V are walked once.
    """
    batch, heads, rows, dim = queries.shape
    folded = queries.reshape(batch, keys.shape[1], -1, dim)
    out = mx.fast.scaled_dot_product_attention(folded, keys, values, scale=1.0, mask=mask)
    if rows == 1:
        return out.reshape(batch, -1)
    return merge_heads(out.reshape(batch, heads, rows, dim))


def merge_heads(x: mx.array) -> mx.array:
    """x [B, heads, M, D] -> [B * M, heads * D]."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0] * x.shape[2], -1)


def attend_tiled(
    queries: mx.array, keys: mx.array, values: mx.array, first_query: int, first_key: int, window: int | None
) -> mx.array:
    """queries [1, heads, M, D], keys/values [1, kv_heads, L, D] -> [M, heads * D] under a fixed scratch budget.

    first_query and first_key are the absolute positions of row 0. A query sees the keys up to its own position, the
    last `window` of them if there is one.
    """
    heads, rows = queries.shape[1], queries.shape[2]
    query_tile = max(1, SCORES_PER_TILE // (heads * KEY_TILE))
    parts = []
    for low in range(0, rows, query_tile):
        part = queries[:, :, low : low + query_tile]
        parts.append(_attend_query_tile(part, keys, values, first_query + low, first_key, window))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)


def _attend_query_tile(
    queries: mx.array, keys: mx.array, values: mx.array, first_query: int, first_key: int, window: int | None
) -> mx.array:
    """One tile of queries over all keys up to its last row: an online softmax over key tiles at absolute multiples."""
    _, heads, rows, dim = queries.shape
    kv_heads = keys.shape[1]
    end = min(first_query + rows, first_key + keys.shape[2])
    tiles = _key_tiles(first_key, end)
    mask_of = _mask_of_keys(first_query, rows, window, heads, kv_heads)
    if len(tiles) <= 2:
        stop = end - first_key
        return attend_masked(queries, keys[:, :, :stop], values[:, :, :stop], mask_of(first_key, end))
    folded = queries.reshape(1, kv_heads, -1, dim).astype(mx.float32)
    peak = mx.full((*folded.shape[:3], 1), -mx.inf, mx.float32)
    total = mx.zeros_like(peak)
    out = mx.zeros(folded.shape, mx.float32)
    for low, high in tiles:
        tile = slice(low - first_key, high - first_key)
        scores = folded @ keys[:, :, tile].astype(mx.float32).swapaxes(-1, -2)
        scores = mx.where(mask_of(low, high), scores, -mx.inf)
        new_peak = mx.maximum(peak, scores.max(axis=-1, keepdims=True))
        # Until a row sees its first key its peak is -inf, and exp(-inf - -inf) would be NaN.
        shift = mx.where(new_peak == -mx.inf, 0.0, new_peak)
        weights = mx.exp(scores - shift)
        scale = mx.exp(peak - shift)
        total = total * scale + weights.sum(axis=-1, keepdims=True)
        out = out * scale + weights @ values[:, :, tile].astype(mx.float32)
        peak = new_peak
    return merge_heads((out / total).reshape(1, heads, rows, dim).astype(queries.dtype))


def _key_tiles(first: int, end: int) -> list[tuple[int, int]]:
    """[first, end) cut at absolute multiples of KEY_TILE."""
    marks = [first, *range((first // KEY_TILE + 1) * KEY_TILE, end, KEY_TILE), end]
    return list(pairwise(marks))


def _mask_of_keys(
    first_query: int, rows: int, window: int | None, heads: int, kv_heads: int
) -> Callable[[int, int], mx.array]:
    """Gives the folded mask of the keys at positions low .. high - 1."""
    query = mx.arange(first_query, first_query + rows, dtype=mx.int32)[None, :, None]

    def mask_of(low: int, high: int) -> mx.array:
        key = mx.arange(low, high, dtype=mx.int32)[None, None]
        visible = key <= query
        if window is not None:
            visible = visible & (key > query - window)
        return fold_mask(visible, heads, kv_heads)

    return mask_of
