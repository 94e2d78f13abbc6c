"""Attention of a few rows over K/V buffers in place, bits by position alone (metal/attention.metal has the order).

Every buffer row that is seen is read once for all the query heads and rows that share it, the others never. How many
rows, batch members or buffer rows there are decides how many threadgroups run, and no bit.
"""

import functools
import math
from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.attention import Sight, merge_heads
from mlx_mtp.errors import KernelError
from mlx_mtp.kernels.attention_bodies import (
    LEAF_PASS,
    MERGE_PASS,
    SCORES_PASS,
    VALUES_OF_SCORES_PASS,
    VALUES_PASS,
    WEIGHTS_PASS,
)
from mlx_mtp.kernels.launch import SIMD, SMALL
from mlx_mtp.kernels.operations import AttentionShape

DIMS = (16, 32, 64, 128, 256, 512)
FLOATS = (mx.float16, mx.bfloat16, mx.float32)
LEAF = 16  # keys; metal/attention.metal has the same
LEAVES = 16  # of a partition where there is no window
MAX_ROWS = 128  # query heads of one K/V head times positions: what a chunk holds of them
STAGED = 8  # rows of queries in threadgroup memory
SLICE, NARROWEST = 64, 4  # columns of the values that a threadgroup sums: fewer where keys are few
MAX_SLICE_THREADS = 512
NARROW_THREADS = 128  # what a narrow slice's threadgroup has at least: they also stage, and weigh scores
# Full layers: a launch has at least so many threadgroups a K/V head with one row, so far as keys can be shared out.
# Stock's 8 a query head (16 of which share a K/V head in the 12B) are no more.
GROUPS_A_HEAD = 128


class _Plan(NamedTuple):
    """Sizes of one call: `chunks` of up to `positions` rows, each with up to `parts` partitions.

    `positions` is a power of two: few sizes, hence few compilations.
    """

    positions: int
    chunks: int
    parts: int
    partition: int  # keys
    template: dict[str, int]
    sizes: mx.array


def reference(queries: mx.array, keys: mx.array, values: mx.array, sight: Sight) -> mx.array:
    """The same in plain MLX, float32 throughout, rounded once; every buffer row that `sight` covers must be finite.

    Bits may differ by M, B and the buffers' sizes, and from the kernel's.
    """
    batch, heads, positions, _ = queries.shape
    query = sight.first[:, None] + mx.arange(positions, dtype=mx.int32)
    row = mx.arange(keys.shape[2], dtype=mx.int32)
    held = row[None] if sight.window is None else query[:, -1:] - (query[:, -1:] - row) % keys.shape[2]
    visible = (held[:, None] <= query[..., None]) & (held[:, None] >= 0)
    if sight.window is not None:
        visible = visible & (held[:, None] > query[..., None] - sight.window)
    live = visible.any(axis=1)[:, None, :, None]
    keys, values = (mx.where(live, x, 0).astype(mx.float32) for x in (keys, values))
    folded = queries.astype(mx.float32).reshape(batch, keys.shape[1], -1, positions, queries.shape[-1])
    scores = folded @ keys[:, :, None].swapaxes(-1, -2)
    weights = mx.softmax(mx.where(visible[:, None, None], scores, -mx.inf), axis=-1)
    out = mx.nan_to_num(weights, nan=0.0) @ values[:, :, None]
    return merge_heads(out.reshape(batch, heads, positions, -1)).astype(queries.dtype)


def unsupported(shape: AttentionShape) -> str | None:
    """Why attention of this shape must take stock operations, or None where the kernel computes it."""
    if shape.head_dim not in DIMS:
        return f"a head of {shape.head_dim} has no kernel; {', '.join(map(str, DIMS))} have"
    if not 0 < shape.kv_heads <= shape.heads or shape.heads % shape.kv_heads:
        return f"{shape.heads} query heads are no multiple of {shape.kv_heads} K/V heads"
    if shape.heads // shape.kv_heads > MAX_ROWS:
        return f"{shape.heads // shape.kv_heads} query heads share a K/V head, more than {MAX_ROWS}"
    if shape.dtype not in FLOATS:
        return f"queries of {shape.dtype} have no kernel"
    return None


def verify_attention(queries: mx.array, keys: mx.array, values: mx.array, sight: Sight) -> mx.array:
    """queries [B, heads, M, D], whole K/V buffers [B, kv_heads, R, D] -> [B * M, heads * D]; attention.attend's twin.

    A row that sees no key gets zeros. Raises KernelError for what it does not compute.
    """
    batch, heads, positions, dim = queries.shape
    shape = AttentionShape(heads, keys.shape[1], dim, sight.window, queries.dtype)
    reason = unsupported(shape) or _misfit(queries, keys, values, sight)
    if reason is not None:
        raise KernelError(f"verify_attention: {reason}; take stock operations")
    plan = _plan(shape, batch, positions, keys.shape[2], sight.bucket)
    queries = queries.transpose(0, 2, 1, 3)
    passes = _whole_partitions if sight.window is None else _leaf_partitions
    tops, sums = passes(plan, queries, keys, values, sight.first)
    (out,) = MERGE_PASS(
        [tops, sums, sight.first, plan.sizes],
        template={**plan.template, "PARTITION": plan.partition, "WIDTH": SLICE},
        groups=(-(-dim // SLICE), batch * positions * heads, 1),
        threads=(SLICE, 1, 1),
        shapes=[(batch * positions, heads * dim)],
        dtypes=[queries.dtype],
    )
    return out


def _misfit(queries: mx.array, keys: mx.array, values: mx.array, sight: Sight) -> str | None:
    """What is wrong with these arrays, whose shape has a kernel."""
    batch, _, positions, dim = queries.shape
    if keys.shape != values.shape or (keys.shape[0], keys.shape[3]) != (batch, dim):
        return f"K/V must be [{batch}, kv_heads, rows, {dim}], got {keys.shape} and {values.shape}"
    if keys.dtype != values.dtype or keys.dtype not in FLOATS:
        return f"K/V of {keys.dtype} and {values.dtype} have no kernel"
    if sight.first.shape != (batch,) or sight.first.dtype != mx.int32 or not positions:
        return f"positions must be one int32 for each of {batch} rows, got {sight.first.dtype} {sight.first.shape}"
    held = keys.shape[2]
    needed = sight.bucket if sight.window is None else max(LEAF, sight.window + positions - 1)
    if held < needed:
        window = "" if sight.window is None else f" for a window of {sight.window} and {positions} rows"
        return f"buffers must have at least {needed} rows{window}, got {held}"
    return None


@functools.lru_cache(maxsize=256)
def _plan(shape: AttentionShape, batch: int, positions: int, held: int, bucket: int) -> _Plan:
    per_chunk, chunks, parts, partition = _shares(shape, positions, bucket)
    members = batch * shape.kv_heads
    sizes = [positions, shape.window or 0, held, shape.heads, shape.kv_heads, parts, members, 0]
    return _Plan(
        positions=per_chunk,
        chunks=chunks,
        parts=parts,
        partition=partition,
        template={
            "D": shape.head_dim,
            "GQA": shape.group,
            "POSITIONS": per_chunk,
            "STAGED": min(STAGED, per_chunk * shape.group),
        },
        sizes=mx.array(sizes, mx.int32),
    )


def _shares(shape: AttentionShape, positions: int, bucket: int) -> tuple[int, int, int, int]:
    """Positions a chunk, chunks, partitions, and keys of a partition."""
    per_chunk = 1 << min((positions - 1).bit_length(), (MAX_ROWS // shape.group).bit_length() - 1)
    chunks = -(-positions // per_chunk)
    if shape.window is None:
        return per_chunk, chunks, -(-bucket // (LEAF * LEAVES)), LEAF * LEAVES
    return per_chunk, chunks, -(-(shape.window + min(positions, per_chunk) - 2) // LEAF) + 1, LEAF


def scratch_bytes(shape: AttentionShape, batch: int, positions: int, bucket: int) -> int:
    """What a call has in memory beside its inputs and its result: tops and sums of partitions, weights of leaves."""
    per_chunk, chunks, parts, partition = _shares(shape, positions, bucket)
    rows = batch * shape.kv_heads * chunks * per_chunk * shape.group
    partitions = 4 * math.prod(_tops(rows, parts)) + 4 * rows * parts * shape.head_dim
    if shape.window is not None:
        return partitions
    tops = leaf_pieces(shape.head_dim, parts, per_chunk) == 1  # otherwise what leaves give is scores alone
    return partitions + 4 * rows * parts * partition + tops * 4 * math.prod(_tops(rows, parts * LEAVES))


def _leaf_partitions(
    plan: _Plan, queries: mx.array, keys: mx.array, values: mx.array, first: mx.array
) -> list[mx.array]:
    """Tops [chunks, B * kv_heads, rows, parts, 2], flat, and sums [..., parts, D] of partitions of one leaf."""
    members, rows, dim = keys.shape[0] * keys.shape[1], plan.positions * plan.template["GQA"], keys.shape[3]
    folded = (plan.chunks, members, rows, plan.parts)
    return LEAF_PASS(
        [queries, keys, values, first, plan.sizes],
        template=plan.template,
        groups=(plan.parts, members, plan.chunks),
        threads=(leaf_threads(dim), 1, 1),
        shapes=[_tops(*folded), (*folded, dim)],
        dtypes=[mx.float32, mx.float32],
    )


def _whole_partitions(
    plan: _Plan, queries: mx.array, keys: mx.array, values: mx.array, first: mx.array
) -> list[mx.array]:
    """The same of partitions of LEAVES leaves: weights or scores of every leaf first, then slices of the values."""
    members, rows, dim = keys.shape[0] * keys.shape[1], plan.positions * plan.template["GQA"], keys.shape[3]
    pieces, width = leaf_pieces(dim, plan.parts, plan.positions), slice_width(dim, plan.parts, plan.positions)
    leaves, template = plan.parts * LEAVES, {**plan.template, "LEAVES": LEAVES}
    weights_shape = (plan.chunks, members, leaves, LEAF, rows)
    if pieces > 1:
        of_leaves = SCORES_PASS(
            [queries, keys, first, plan.sizes],
            template={**template, "PIECES": pieces},
            groups=(leaves * pieces, members, plan.chunks),
            threads=(leaf_threads(dim) // pieces, 1, 1),
            shapes=[weights_shape],
            dtypes=[mx.float32],
        )
    else:
        of_leaves = WEIGHTS_PASS(
            [queries, keys, first, plan.sizes],
            template=template,
            groups=(leaves, members, plan.chunks),
            threads=(leaf_threads(dim), 1, 1),
            shapes=[_tops(plan.chunks, members, leaves, rows), weights_shape],
            dtypes=[mx.float32, mx.float32],
        )
    own, threads = slice_threads(rows, width, is_narrow=width < min(SLICE, dim))
    folded = (plan.chunks, members, rows, plan.parts)
    return (VALUES_OF_SCORES_PASS if pieces > 1 else VALUES_PASS)(
        [values, *of_leaves, first, plan.sizes],
        template={**template, "SLICE": width, "OWN": own, "THREADS": threads},
        groups=(plan.parts * dim // width, members, plan.chunks),
        threads=(threads, 1, 1),
        shapes=[_tops(*folded), (*folded, dim)],
        dtypes=[mx.float32, mx.float32],
    )


def _tops(*axes: int) -> tuple[int]:
    """A peak and a total for each, never fewer numbers than a kernel's input must have."""
    return (max(SMALL, 2 * math.prod(axes)),)


def leaf_threads(dim: int) -> int:
    """Threads that hold the keys of a leaf."""
    return max(SIMD, dim // 2)


def leaf_pieces(dim: int, parts: int, positions: int) -> int:
    """Threadgroups that share a leaf's keys, at least a simdgroup each, where `parts` partitions have few leaves."""
    pieces = 1
    while pieces * SIMD < leaf_threads(dim) and parts * LEAVES * pieces * positions < GROUPS_A_HEAD:
        pieces *= 2
    return pieces


def slice_width(dim: int, parts: int, positions: int) -> int:
    """Columns of a slice. Each reads all weights of its partition: the more rows, the fewer and wider slices."""
    width = min(SLICE, dim)
    while width > NARROWEST and parts * dim // width * positions < GROUPS_A_HEAD:
        width //= 2
    return width


def slice_threads(rows: int, width: int, *, is_narrow: bool) -> tuple[int, int]:
    """How many rows' sums a thread of `sum_values` has, and how many threads there are."""
    own = 1 if is_narrow else min(4, rows)
    while -(-rows // own) * width > MAX_SLICE_THREADS:
        own *= 2
    threads = -(-rows // own * width // SIMD) * SIMD
    return own, max(threads, NARROW_THREADS) if is_narrow else threads
