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
from mlx_mtp.kernels.launch import SIMD, SMALL, Kernel
from mlx_mtp.kernels.operations import AttentionShape

DIMS = (16, 32, 64, 128, 256, 512)
FLOATS = (mx.float16, mx.bfloat16, mx.float32)
LEAF = 16  # keys; metal/attention.metal has the same
LEAVES = 16  # of a partition where there is no window
MAX_ROWS = 128  # query heads of one K/V head times positions: what a chunk holds of them
STAGED = 8  # rows of queries in threadgroup memory
SLICE = 64  # columns of the values that a threadgroup sums
MAX_SLICE_THREADS = 512

ROWS = """
    const int members = threadgroups_per_grid.y;  // batch * kv_heads
    const int member = threadgroup_position_in_grid.y;
    const int chunk = threadgroup_position_in_grid.z;
    const int batch = member / sizes[4];
    const int skipped = chunk * POSITIONS;
    const int ring = sizes[1] > 0 ? sizes[2] : 0;
    const Rows rows = {first[batch] + skipped, min(POSITIONS, sizes[0] - skipped), sizes[1], ring, 0};
    const size_t folded = (size_t(chunk) * members + member) * POSITIONS * GQA;
    const size_t buffer = size_t(member) * sizes[2] * D;
"""
QUERY = """
    const size_t query = ((size_t(batch) * sizes[0] + skipped) * sizes[3] + member % sizes[4] * GQA) * D;
    const uint lane = thread_index_in_simdgroup;
    const uint simd = simdgroup_index_in_threadgroup;
    threadgroup float4 words[STAGED * D / 4];
    threadgroup float* staged = (threadgroup float*)words;
    threadgroup float shared[POSITIONS * GQA * LEAF];
"""
FILES = ("attention.metal", "verify_attention.metal")
LEAF_PASS = Kernel(
    name="verify_attention_leaf",
    files=FILES,
    inputs=("queries", "keys", "values", "first", "sizes"),
    outputs=("tops", "sums"),
    body=ROWS
    + QUERY
    + """
    const int parts = threadgroups_per_grid.x;
    attend_leaf<D, GQA, STAGED>(
        queries + query, keys + buffer, values + buffer, rows, sizes[3], threadgroup_position_in_grid.x, parts,
        (device float2*)tops + folded * parts, sums + folded * parts * D, staged, shared, lane, simd);
""",
    indexed=("first", "sizes"),
)
WEIGHTS_PASS = Kernel(
    name="verify_attention_weights",
    files=FILES,
    inputs=("queries", "keys", "first", "sizes"),
    outputs=("tops", "weights"),
    body=ROWS
    + QUERY
    + """
    const size_t leaves = threadgroups_per_grid.x;
    weigh_leaf<D, GQA, POSITIONS * GQA, STAGED, LEAVES>(
        queries + query, keys + buffer, rows, sizes[3], threadgroup_position_in_grid.x,
        (device float2*)tops + folded * leaves, weights + folded * leaves * LEAF, staged, shared, lane, simd);
""",
    indexed=("first", "sizes"),
)
VALUES_PASS = Kernel(
    name="verify_attention_values",
    files=FILES,
    inputs=("values", "leaf_tops", "leaf_weights", "first", "sizes"),
    outputs=("tops", "sums"),
    body=ROWS
    + """
    threadgroup float factors[POSITIONS * GQA * LEAVES];
    threadgroup float shared[POSITIONS * GQA * LEAF];
    threadgroup float staged[LEAF * SLICE];
    const int parts = threadgroups_per_grid.x / (D / SLICE);
    const size_t leaves = size_t(parts) * LEAVES;
    sum_values<D, GQA, POSITIONS * GQA, LEAVES, SLICE, OWN>(
        values + buffer, (const device float2*)leaf_tops + folded * leaves, leaf_weights + folded * leaves * LEAF, rows,
        threadgroup_position_in_grid.x / (D / SLICE), parts, threadgroup_position_in_grid.x % (D / SLICE),
        (device float2*)tops + folded * parts, sums + folded * parts * D, factors, staged, shared,
        thread_index_in_threadgroup);
""",
    indexed=("first", "sizes"),
)
MERGE_PASS = Kernel(
    name="verify_attention_merge",
    files=FILES,
    inputs=("tops", "sums", "first", "sizes"),
    outputs=("out",),
    body="""
    threadgroup float2 shared[WIDTH];
    threadgroup float keep[WIDTH];
    threadgroup float take[WIDTH];
    const int row = threadgroup_position_in_grid.y;  // [batch][position][head]
    const int head = row % sizes[3];
    const int position = row / sizes[3] % sizes[0];
    const int batch = row / sizes[3] / sizes[0];
    const int skipped = position / POSITIONS * POSITIONS;
    const Rows group = {first[batch] + skipped, 1, sizes[1], 0, 0};
    const Rows own = {first[batch] + position, 1, sizes[1], 0, 0};
    const int base = group.lowest() / PARTITION;
    const int high = own.highest() < 0 ? -1 : min(own.highest() / PARTITION - base, sizes[5] - 1);
    const size_t member = size_t(skipped / POSITIONS) * sizes[6] + batch * sizes[4] + head / GQA;
    const size_t folded = ((member * POSITIONS + position - skipped) * GQA + head % GQA) * sizes[5];
    merge_partitions<D, WIDTH>(
        (const device float2*)tops + folded, sums + folded * D, own.lowest() / PARTITION - base, high,
        out + size_t(row) * D, threadgroup_position_in_grid.x, shared, keep, take, thread_index_in_threadgroup);
""",
    indexed=("first", "sizes"),
)


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
    group = shape.heads // shape.kv_heads
    per_chunk = 1 << min((positions - 1).bit_length(), (MAX_ROWS // group).bit_length() - 1)
    if shape.window is None:
        partition = LEAF * LEAVES
        parts = -(-bucket // partition)
    else:
        partition = LEAF
        parts = -(-(shape.window + min(positions, per_chunk) - 2) // LEAF) + 1
    members = batch * shape.kv_heads
    sizes = [positions, shape.window or 0, held, shape.heads, shape.kv_heads, parts, members, 0]
    return _Plan(
        positions=per_chunk,
        chunks=-(-positions // per_chunk),
        parts=parts,
        partition=partition,
        template={
            "D": shape.head_dim,
            "GQA": group,
            "POSITIONS": per_chunk,
            "STAGED": min(STAGED, per_chunk * group),
        },
        sizes=mx.array(sizes, mx.int32),
    )


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
    """The same of partitions of LEAVES leaves: weights of every leaf first, then slices of the values."""
    members, rows, dim = keys.shape[0] * keys.shape[1], plan.positions * plan.template["GQA"], keys.shape[3]
    leaves = plan.parts * LEAVES
    tops, weights = WEIGHTS_PASS(
        [queries, keys, first, plan.sizes],
        template={**plan.template, "LEAVES": LEAVES},
        groups=(leaves, members, plan.chunks),
        threads=(leaf_threads(dim), 1, 1),
        shapes=[_tops(plan.chunks, members, leaves, rows), (plan.chunks, members, leaves, LEAF, rows)],
        dtypes=[mx.float32, mx.float32],
    )
    width, own = min(SLICE, dim), rows_of_thread(rows)
    folded = (plan.chunks, members, rows, plan.parts)
    return VALUES_PASS(
        [values, tops, weights, first, plan.sizes],
        template={**plan.template, "LEAVES": LEAVES, "SLICE": width, "OWN": own},
        groups=(plan.parts * dim // width, members, plan.chunks),
        threads=(-(-rows // own * width // SIMD) * SIMD, 1, 1),
        shapes=[_tops(*folded), (*folded, dim)],
        dtypes=[mx.float32, mx.float32],
    )


def _tops(*axes: int) -> tuple[int]:
    """A peak and a total for each, never fewer numbers than a kernel's input must have."""
    return (max(SMALL, 2 * math.prod(axes)),)


def leaf_threads(dim: int) -> int:
    """Threads that hold the keys of a leaf."""
    return max(SIMD, dim // 2)


def rows_of_thread(rows: int) -> int:
    """How many rows' sums a thread of `sum_values` has: few while the threadgroup stays within its limit."""
    own = min(4, rows)
    while -(-rows // own) * SLICE > MAX_SLICE_THREADS:
        own *= 2
    return own
