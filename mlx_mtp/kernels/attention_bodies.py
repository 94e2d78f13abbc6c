"""What verify_attention launches: bodies around metal/verify_attention.metal."""

from mlx_mtp.kernels.launch import Kernel

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
    threadgroup float shared[POSITIONS * GQA * LEAF];
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
    threadgroup float shared[POSITIONS * GQA * LEAF];
    const size_t leaves = threadgroups_per_grid.x;
    weigh_leaf<D, GQA, POSITIONS * GQA, STAGED, LEAVES>(
        queries + query, keys + buffer, rows, sizes[3], threadgroup_position_in_grid.x,
        (device float2*)tops + folded * leaves, weights + folded * leaves * LEAF, staged, shared, lane, simd);
""",
    indexed=("first", "sizes"),
)
SCORES_PASS = Kernel(
    name="verify_attention_scores",
    files=FILES,
    inputs=("queries", "keys", "first", "sizes"),
    outputs=("scores",),
    body=ROWS
    + QUERY
    + """
    const size_t leaves = threadgroups_per_grid.x / PIECES;
    score_keys<D, GQA, POSITIONS * GQA, STAGED, LEAVES, PIECES>(
        queries + query, keys + buffer, rows, sizes[3], threadgroup_position_in_grid.x / PIECES,
        threadgroup_position_in_grid.x % PIECES, scores + folded * leaves * LEAF, staged, simd * 32 + lane);
""",
    indexed=("first", "sizes"),
)
VALUES = """
    threadgroup float factors[POSITIONS * GQA * LEAVES];
    threadgroup float shared[POSITIONS * GQA * LEAF];
    threadgroup float staged[LEAF * SLICE];
    const int part = threadgroup_position_in_grid.x / (D / SLICE);
    const int parts = threadgroups_per_grid.x / (D / SLICE);
    const size_t before = (folded * parts + size_t(part) * POSITIONS * GQA) * LEAVES;  // leaves' rows
    const Leaves leaves = leaves_of<LEAVES>(rows, part);
    if (leaves.high < leaves.low) {
      return;
    }
"""


def _sums(raw: str, weights: str, peaks: str) -> str:
    """The call that ends both kernels of values: from weights, or from raw scores and their leaves' peaks."""
    return f"""
    sum_values<D, GQA, POSITIONS * GQA, LEAVES, SLICE, OWN, THREADS, {raw}>(
        values + buffer, {weights} + before * LEAF, rows, leaves, part, parts,
        threadgroup_position_in_grid.x % (D / SLICE), (device float2*)tops + folded * parts, sums + folded * parts * D,
        {peaks}, factors, staged, shared, thread_index_in_threadgroup);
"""


VALUES_PASS = Kernel(
    name="verify_attention_values",
    files=FILES,
    inputs=("values", "leaf_tops", "leaf_weights", "first", "sizes"),
    outputs=("tops", "sums"),
    body=ROWS
    + VALUES
    + """
    take_tops<GQA, POSITIONS * GQA, LEAVES, THREADS>(
        (const device float2*)leaf_tops + before, rows, leaves, factors, shared, thread_index_in_threadgroup);
"""
    + _sums("false", "leaf_weights", "factors"),
    indexed=("first", "sizes"),
)
VALUES_OF_SCORES_PASS = Kernel(
    name="verify_attention_values_of_scores",
    files=FILES,
    inputs=("values", "scores", "first", "sizes"),
    outputs=("tops", "sums"),
    body=ROWS
    + VALUES
    + """
    threadgroup float peaks[POSITIONS * GQA * LEAVES];
    find_tops<GQA, POSITIONS * GQA, LEAVES, THREADS>(
        scores + before * LEAF, rows, leaves, factors, shared, thread_index_in_threadgroup);
"""
    + _sums("true", "scores", "peaks"),
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
