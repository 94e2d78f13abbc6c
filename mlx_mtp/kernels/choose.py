"""The second launch of both heads (metal/choose.metal): lists of a row's best logits -> its token."""

import functools

import mlx.core as mx

from mlx_mtp.kernels.launch import Kernel
from mlx_mtp.sampling import MAX_CANDIDATES, SamplerClass

MAX_LISTS = 512  # a thread each
THREADS = (512, 1, 1)
SETTINGS = ("temperature", "top_k", "top_p", "min_p")  # of a batch member
ROW = """
    const uint row = threadgroup_position_in_grid.x;
    const uint worker = thread_index_in_threadgroup;
    const uint lane = thread_index_in_simdgroup;
"""
GREEDY = Kernel(
    name="choose_greedy",
    files=("choose.metal",),
    inputs=("items", "counts"),
    outputs=("token", "valid"),
    indexed=("items", "counts"),
    body=ROW
    + """
    threadgroup ulong scratch[MERGE_THREADS / 32];
    ulong best = 0;
    for (int i = worker; i < counts[0]; i += MERGE_THREADS) {
      best = better_of(best, items[row * counts[0] + i]);
    }
    best = best_of_threads(best, scratch, lane, simdgroup_index_in_threadgroup);
    if (worker == 0) {
      token[row] = id_of(best);
      valid[row] = is_valid(best);
    }
""",
)
DRAWN = Kernel(
    name="choose_drawn",
    files=("choose.metal",),
    inputs=("items", "counts", "positions", "seed", *SETTINGS),
    outputs=("token", "valid"),
    indexed=("counts", "positions", "seed", *SETTINGS),
    body=ROW
    + """
    threadgroup ulong heads[MERGE_THREADS];
    threadgroup uint order[BEST];
    threadgroup ulong pool[POOL];
    threadgroup atomic_uint filled[1];
    threadgroup ulong best[BEST];
    threadgroup float weights[BEST];
    const uint member = row / counts[1];
    const Draw draw = {
        seed[member], uint(positions[row]), temperature[member], top_k[member], top_p[member], min_p[member]};
    merge_lists(items + long(row) * counts[0] * BEST, counts[0], heads, order, pool, filled, best, worker);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const ulong chosen = drawn_item(best, draw, weights, heads, worker, lane);
    if (worker == 0) {
      token[row] = id_of(chosen);
      valid[row] = is_valid(best[0]);
    }
""",
)


def unsupported(sampler: SamplerClass) -> str | None:
    """Why a sampler class takes stock operations, or None where `choose_of_lists` has it."""
    if sampler.penalties or sampler.bias:
        return "penalties and bias look at every logit"
    if not (sampler.greedy or sampler.candidates):
        return f"a row draws from more than {MAX_CANDIDATES} candidates"
    return None


def kept(sampler: SamplerClass) -> int:
    """Items that a list has: only the best one counts where all rows are greedy."""
    return 1 if sampler.greedy else MAX_CANDIDATES


def choose_of_lists(
    items: mx.array, positions: mx.array, seed: mx.array, sampling: dict[str, mx.array], sampler: SamplerClass
) -> tuple[mx.array, mx.array]:
    """items [B * M, lists, kept] uint64, positions [B, M] -> tokens [B, M] uint32, valid [B, M] bool."""
    rows, lists, _ = items.shape
    counts = _counts(lists, positions.shape[1])
    inputs = [items, counts]
    if not sampler.greedy:
        inputs += [positions, seed, *(sampling[name] for name in SETTINGS)]
    token, valid = (GREEDY if sampler.greedy else DRAWN)(
        inputs,
        template={},
        groups=(rows, 1, 1),
        threads=THREADS,
        shapes=[(rows,), (rows,)],
        dtypes=[mx.uint32, mx.bool_],
    )
    return token.reshape(positions.shape), valid.reshape(positions.shape)


@functools.cache
def _counts(lists: int, rows_a_member: int) -> mx.array:
    return mx.array([lists, rows_a_member], mx.int32)
