"""Attention of a prefill chunk over keys in the order of their positions (metal/prefill_attention.metal).

A row has the bits that `verify_attention` would give it, whatever the chunk it is in.
"""

import mlx.core as mx

from mlx_mtp.attention import Sight
from mlx_mtp.errors import KernelError
from mlx_mtp.kernels import verify_attention
from mlx_mtp.kernels.launch import Kernel
from mlx_mtp.kernels.operations import AttentionShape
from mlx_mtp.kernels.verify_attention import FLOATS, LEAVES

TILE = 8  # rows of a threadgroup, as in the .metal file

TILES = Kernel(
    name="prefill_attention",
    files=("attention.metal", "prefill_attention.metal"),
    inputs=("queries", "keys", "values", "sizes"),
    outputs=("out",),
    body="""
    threadgroup float4 words[TILE * D / 4];
    threadgroup float* staged = (threadgroup float*)words;
    threadgroup float weights[SPAN * LEAF * TILE];
    threadgroup float peaks[SPAN * TILE];
    threadgroup float totals[SPAN * TILE];
    threadgroup float keep[SPAN * TILE];
    threadgroup float take[SPAN * TILE];
    const int low = threadgroup_position_in_grid.x * TILE;  // row: head low % GQA of position low / GQA
    const int count = min(TILE, sizes[0] * GQA - low);
    const int position = low / GQA;
    const int head = threadgroup_position_in_grid.y;
    const Rows rows = {
        sizes[4] + position, (low + count - 1) / GQA - position + 1, sizes[1], 0, sizes[5]};
    const size_t at = (size_t(position) * sizes[3] + head * GQA) * D;
    const size_t buffer = size_t(head) * sizes[2] * D;
    attend_tile<D, GQA, LEAVES>(
        queries + at, keys + buffer, values + buffer, rows, low % GQA, count, sizes[3], out + at, staged, weights,
        peaks, totals, keep, take, thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
""",
    indexed=("sizes",),
)


def reference(
    queries: mx.array, keys: mx.array, values: mx.array, first_query: int, first_key: int, window: int | None
) -> mx.array:
    """The same in plain MLX: float32 throughout, rounded once; scores of the whole chunk are in memory."""
    end = first_query + queries.shape[2]
    first = mx.array([first_query - first_key], mx.int32)
    keys, values = keys[:, :, : end - first_key], values[:, :, : end - first_key]
    if window is not None:  # a ring that nothing has wrapped round yet
        padding = [(0, 0), (0, 0), (0, window), (0, 0)]
        keys, values = mx.pad(keys, padding), mx.pad(values, padding)
    return verify_attention.reference(queries, keys, values, Sight(first, window, end - first_key, first))


def unsupported(shape: AttentionShape) -> str | None:
    """Why attention of this shape must take stock operations, or None where the kernel computes it."""
    return verify_attention.unsupported(shape)


def prefill_attention(
    queries: mx.array, keys: mx.array, values: mx.array, first_query: int, first_key: int, window: int | None
) -> mx.array:
    """queries [1, heads, M, D], keys/values [1, kv_heads, L, D] -> [M, heads * D]; attention.attend_tiled's twin.

    Rows of keys and values beyond the last query's position may hold anything. Raises KernelError for what it does not
    compute.
    """
    _, heads, positions, dim = queries.shape
    shape = AttentionShape(heads, keys.shape[1], dim, window, queries.dtype)
    reason = unsupported(shape) or _misfit(queries, keys, values, first_query, first_key, window)
    if reason is not None:
        raise KernelError(f"prefill_attention: {reason}; take stock operations")
    group = heads // shape.kv_heads
    sizes = [positions, window or 0, keys.shape[2], heads, first_query, first_key, 0, 0]
    (out,) = TILES(
        [queries.transpose(0, 2, 1, 3), keys, values, mx.array(sizes, mx.int32)],
        template={"D": dim, "GQA": group, "LEAVES": LEAVES if window is None else 1},
        groups=(-(-positions * group // TILE), shape.kv_heads, 1),
        threads=(max(32, dim), 1, 1),
        shapes=[(positions, heads * dim)],
        dtypes=[queries.dtype],
    )
    return out


def _misfit(
    queries: mx.array, keys: mx.array, values: mx.array, first_query: int, first_key: int, window: int | None
) -> str | None:
    """What is wrong with these arrays, whose shape has a kernel."""
    batch, _, positions, dim = queries.shape
    if keys.shape != values.shape or (batch, keys.shape[0], keys.shape[3]) != (1, 1, dim) or not positions:
        return f"one row of K/V of {dim} values a head is needed, got {keys.shape} and {values.shape}"
    if keys.dtype != values.dtype or keys.dtype not in FLOATS:
        return f"K/V of {keys.dtype} and {values.dtype} have no kernel"
    lowest = 0 if window is None else max(0, first_query - window + 1)
    if not 0 <= first_key <= lowest or first_query + positions > first_key + keys.shape[2]:
        return (
            f"keys must reach from position {lowest} to {first_query + positions - 1}, "
            f"got {keys.shape[2]} from {first_key} on"
        )
    return None
