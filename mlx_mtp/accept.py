"""How many drafts of a verified round stand, and what the row looks like after them."""

import mlx.core as mx


def accept(drafts: mx.array, chosen: mx.array, valid: mx.array, active: mx.array) -> mx.array:
    """drafts [B, k], the target's own choices [B, k+1], valid [B, k+1], active [B] -> n [B] int32.

    n drafts agree with the target's choices before the first mismatch, and chosen[:, :n+1] is emitted. -1: nothing is
    emitted, because the row is inactive or a choice among those n + 1 had no finite logit.
    """
    if drafts.shape[1] == 0:  # MLX divides by the length of what it scans
        return mx.where(active & valid[:, 0], 0, -1)
    agreed = (drafts == chosen[:, :-1]).astype(mx.int32)
    n = mx.cumprod(agreed, axis=-1).sum(axis=-1).astype(mx.int32)
    emitted = mx.arange(chosen.shape[1], dtype=mx.int32) <= n[:, None]
    sound = (valid | ~emitted).all(axis=-1)
    return mx.where(active & sound, n, -1)


def row_at(rows: mx.array, index: mx.array) -> mx.array:
    """rows [B, M, ...], index [B] -> rows[b, index[b]] as [B, 1, ...]."""
    shape = (index.shape[0],) + (1,) * (rows.ndim - 1)
    return mx.take_along_axis(rows, index.reshape(shape), axis=1)
