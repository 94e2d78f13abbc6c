"""The head of E2B's and E4B's drafters and the choice of a draft in two launches (metal/centroid_head.metal)."""

import functools
import re

import mlx.core as mx

from mlx_mtp.errors import KernelError
from mlx_mtp.kernels import choose
from mlx_mtp.kernels.head_choose import product_reference, product_unsupported, stored
from mlx_mtp.kernels.launch import SMALL, Kernel
from mlx_mtp.kernels.skinny import Skinny
from mlx_mtp.sampling import MAX_CANDIDATES, SamplerClass
from mlx_mtp.sampling import choose as choose_stock
from mlx_mtp.weights import Weight

THREADS = (512, 1, 1)
MAX_CENTROIDS = 4096  # their scores are 16 KB of a threadgroup's 32
MAX_MEMBERS = 512  # tokens of a cluster: items of 4 KB and their logits


def reference(
    centroids: Weight,
    members: mx.array,
    top_k: int,
    table: Weight,
    row: mx.array,
    positions: mx.array,
    seed: mx.array,
    sampling: dict[str, mx.array],
    sampler: SamplerClass,
) -> tuple[mx.array, mx.array]:
    """The same on all candidates at once, products in float32; equal scores go to the lower cluster and token."""
    scores = product_reference(centroids, row)
    best = mx.argsort(-scores, axis=-1)[..., :top_k]
    ids = mx.sort(members[best].reshape(*row.shape[:2], -1), axis=-1)
    logits = mx.take_along_axis(product_reference(table, row), ids, axis=-1)
    return choose_stock(logits, positions, seed, sampling, sampler, ids=ids)


def unsupported(
    centroids: Weight, members: mx.array, top_k: int, table: Weight, dtype: mx.Dtype, sampler: SamplerClass
) -> str | None:
    """Why stock operations choose from these clusters, or None where the kernel does."""
    for weight in (centroids, table):
        reason = product_unsupported(weight, dtype)
        if reason is not None:
            return reason
    clusters, size = members.shape
    if clusters > MAX_CENTROIDS or size > MAX_MEMBERS or members.size < SMALL:
        return f"at most {MAX_CENTROIDS} clusters of {MAX_MEMBERS} tokens fit, got {clusters} of {size}"
    if not 1 <= top_k <= min(choose.MAX_LISTS, clusters):
        return f"the best {top_k} of {clusters} clusters are no 1 to {choose.MAX_LISTS} of them"
    if not sampler.greedy and top_k * size < MAX_CANDIDATES:
        return f"a row draws from {MAX_CANDIDATES} candidates, its clusters have {top_k * size}"
    return choose.unsupported(sampler)


def centroid_head(
    centroids: Weight,
    members: mx.array,
    top_k: int,
    table: Weight,
    row: mx.array,
    positions: mx.array,
    seed: mx.array,
    sampling: dict[str, mx.array],
    sampler: SamplerClass,
) -> tuple[mx.array, mx.array]:
    """row [B, 1, H], centroids [C, H], members [C, S] token ids, table [V, H] -> tokens and valid, both [B, 1].

    Raises KernelError where `unsupported` has a reason.
    """
    reason = unsupported(centroids, members, top_k, table, row.dtype, sampler)
    if reason is None and (row.shape[1] != 1 or row.shape[-1] != centroids.shape[1]):
        reason = f"there must be one row of {centroids.shape[1]} values a member, got {tuple(row.shape)}"
    if reason is not None:
        raise KernelError(f"centroid_head: {reason}; take stock operations")
    batch, _, depth = row.shape
    kept = choose.kept(sampler)
    (of_scores, score_arrays, score_format), (of_table, arrays, table_format) = (
        stored(centroids),
        stored(table),
    )
    (items,) = _kernel(of_scores, of_table)(
        [
            row.reshape(batch, depth),
            *score_arrays,
            *arrays,
            members.reshape(-1),
            _depth(depth),
            sampling["temperature"],
        ],
        template={
            **{f"C_{name}": value for name, value in score_format.items()},
            **table_format,
            "CENTROIDS": members.shape[0],
            "MEMBERS": members.shape[1],
            "KEPT": kept,
        },
        groups=(top_k, batch, 1),
        threads=THREADS,
        shapes=[(batch, top_k, kept)],
        dtypes=[mx.uint64],
    )
    return choose.choose_of_lists(items, positions, seed, sampling, sampler)


@functools.cache
def _kernel(of_scores: Skinny, of_table: Skinny) -> Kernel:
    files = dict.fromkeys((*of_scores.files, *of_table.files))  # each once, in order
    score_arrays = tuple(f"c_{name}" for name in of_scores.arrays)
    centroids = re.sub(r"\b(" + "|".join(of_scores.arrays) + r")\b", r"c_\1", of_scores.weights)
    centroids = re.sub(r"\b(S|W|BITS|GROUP)\b", r"C_\1", centroids).replace("> weights", "> centroids", 1)
    return Kernel(
        name=f"centroid_head_{of_scores.name}_{of_table.name}",
        files=("skinny.metal", *files, "choose.metal", "centroid_head.metal"),
        inputs=("x", *score_arrays, *of_table.arrays, "ids", "sizes", "temperature"),
        outputs=("items",),
        indexed=("sizes", "temperature"),
        body=f"""
    threadgroup float scores[CENTROIDS];
    threadgroup float logits[MEMBERS];
    threadgroup ulong best[MEMBERS > KEPT ? MEMBERS : KEPT];
    threadgroup int tallies[2 * GROUP_SIMDGROUPS];
    threadgroup int found[1];
    const uint worker = thread_index_in_threadgroup;
    const uint lane = thread_index_in_simdgroup;
    const uint simd = simdgroup_index_in_threadgroup;
    const int depth = sizes[0];
    const int rank = threadgroup_position_in_grid.x;
    const int row = threadgroup_position_in_grid.y;
    {centroids};
    {of_table.weights};
    threadgroup_sums(x + row * depth, centroids, CENTROIDS, depth, scores, lane, simd);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int cluster = number_of_rank<CENTROIDS>(scores, rank, tallies, found, worker, lane, simd);
    const auto members = listed(ids + cluster * MEMBERS, weights);
    threadgroup_sums(x + row * depth, members, MEMBERS, depth, logits, lane, simd);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const float heat = KEPT == 1 ? 0.0f : temperature[row];
    write_listed<KEPT, MEMBERS>(
        logits, heat > 0.0f ? heat : 1.0f, ids + cluster * MEMBERS, best,
        items + (row * threadgroups_per_grid.x + rank) * KEPT, worker);
""",
    )


@functools.cache
def _depth(depth: int) -> mx.array:
    return mx.array([depth], mx.int32)
