"""The output head and the choice of a token in two launches; a row of logits is never whole in memory."""

import functools
import math

import mlx.core as mx

from mlx_mtp.errors import KernelError
from mlx_mtp.kernels import choose, verify_gemm, verify_qmm
from mlx_mtp.kernels.launch import SIMD, Kernel
from mlx_mtp.kernels.skinny import Skinny
from mlx_mtp.sampling import MAX_CANDIDATES, SamplerClass
from mlx_mtp.sampling import choose as choose_stock
from mlx_mtp.weights import DenseWeight, QuantizedWeight, Weight

NEIGHBOURS = 8  # tokens of a threadgroup, as many as stock's product has
SIMDGROUPS = 2
MAX_TOKENS = 262_144  # the second launch's 512 threads see 64 groups each
MAX_ROWS = 12  # that share one reading of the weights: 24 sums a thread at two columns
FOUR_COLUMNS_ROWS = 6  # with so many rows, four columns have 24 sums


def reference(
    weight: Weight,
    cap: float | None,
    hidden: mx.array,
    positions: mx.array,
    seed: mx.array,
    sampling: dict[str, mx.array],
    sampler: SamplerClass,
) -> tuple[mx.array, mx.array]:
    """The same on all logits at once: product in float32, softcap in the row's type, `sampling.choose`."""
    logits = product_reference(weight, hidden)
    if cap is not None:
        logits = mx.tanh(logits / cap) * cap
    return choose_stock(logits, positions, seed, sampling, sampler)


def unsupported(weight: Weight, dtype: mx.Dtype, sampler: SamplerClass) -> str | None:
    """Why stock operations choose from this matrix's logits, or None where the kernel does."""
    reason = product_unsupported(weight, dtype)
    tokens = weight.shape[0]
    if reason is None and not MAX_CANDIDATES <= tokens <= MAX_TOKENS:
        reason = f"a vocabulary must have {MAX_CANDIDATES} to {MAX_TOKENS} tokens, got {tokens}"
    return reason or choose.unsupported(sampler)


def head_choose(
    weight: Weight,
    cap: float | None,
    hidden: mx.array,
    positions: mx.array,
    seed: mx.array,
    sampling: dict[str, mx.array],
    sampler: SamplerClass,
    *,
    tile: int | None = None,
) -> tuple[mx.array, mx.array]:
    """hidden [B, M, H], the head's matrix [V, H], positions [B, M] -> tokens [B, M] uint32, valid [B, M] bool.

    The logits have the bits of `verify_qmm` and `verify_gemm`, and a row's token does not depend on the others. `tile`
    (1 to 12 rows that share one reading of the weights) changes nothing. Raises KernelError where `unsupported` has a
    reason.
    """
    reason = unsupported(weight, hidden.dtype, sampler)
    if reason is None and hidden.shape[-1] != weight.shape[1]:
        reason = f"rows must have {weight.shape[1]} values, got {tuple(hidden.shape)}"
    if reason is None and tile is not None and not 1 <= tile <= MAX_ROWS:
        reason = f"a tile must have 1 to {MAX_ROWS} rows, got {tile}"
    if reason is not None:
        raise KernelError(f"head_choose: {reason}; take stock operations")
    items, seconds = best_of_groups(weight, cap, hidden, sampling, tile)
    if sampler.greedy:
        return choose.choose_of_lists(items[..., None], positions, seed, sampling, sampler)
    return _draw(weight, cap, hidden, items, seconds, positions, seed, sampling)


def best_of_groups(
    weight: Weight, cap: float | None, hidden: mx.array, sampling: dict[str, mx.array], tile: int | None
) -> list[mx.array]:
    """The first launch: hidden [B, M, H] -> the best item of each group of eight tokens, [B * M, groups] uint64.

    And the order of its second best logit, [B * M, groups] uint32.
    """
    batch, each, depth = hidden.shape
    rows, tokens = batch * each, weight.shape[0]
    tile = tile or math.ceil(rows / math.ceil(rows / MAX_ROWS))
    groups = math.ceil(tokens / NEIGHBOURS)
    skinny, arrays, template = stored(weight)
    return _group_kernel(skinny)(
        [
            hidden.reshape(rows, depth),
            *arrays,
            _sizes(rows, tokens, depth, each),
            _cap(cap),
            sampling["temperature"],
        ],
        template={
            **template,
            "T": hidden.dtype,
            "ROWS": tile,
            "COLUMNS": 4 if tile <= FOUR_COLUMNS_ROWS else 2,
            "CAPPED": cap is not None,
        },
        groups=(math.ceil(rows / tile), groups, 1),
        threads=(SIMDGROUPS * SIMD, 1, 1),
        shapes=[(rows, groups), (rows, groups)],
        dtypes=[mx.uint64, mx.uint32],
    )


def _draw(
    weight: Weight,
    cap: float | None,
    hidden: mx.array,
    items: mx.array,
    seconds: mx.array,
    positions: mx.array,
    seed: mx.array,
    sampling: dict[str, mx.array],
) -> tuple[mx.array, mx.array]:
    """The second launch where some row is drawn: the best 64 tokens of the groups, and one of them."""
    batch, each, depth = hidden.shape
    rows = batch * each
    skinny, arrays, template = stored(weight)
    token, valid = _draw_kernel(skinny)(
        [
            hidden.reshape(rows, depth),
            *arrays,
            items,
            seconds,
            _sizes(rows, weight.shape[0], depth, each),
            _cap(cap),
            positions,
            seed,
            *(sampling[name] for name in choose.SETTINGS),
        ],
        template={**template, "T": hidden.dtype, "CAPPED": cap is not None},
        groups=(rows, 1, 1),
        threads=choose.THREADS,
        shapes=[(rows,), (rows,)],
        dtypes=[mx.uint32, mx.bool_],
    )
    return token.reshape(positions.shape), valid.reshape(positions.shape)


def product_reference(weight: Weight, x: mx.array) -> mx.array:
    """x [..., K] -> [..., N], the reference of whichever product the format of the matrix takes."""
    if isinstance(weight, DenseWeight):
        return verify_gemm.reference(weight, x)
    return verify_qmm.reference(weight, x)


def product_unsupported(weight: Weight, dtype: mx.Dtype) -> str | None:
    """Why there is no product of ours with this matrix, None if there is."""
    if isinstance(weight, DenseWeight):
        return verify_gemm.unsupported(weight, dtype)
    return verify_qmm.unsupported(weight, dtype)


def stored(weight: Weight) -> tuple[Skinny, list[mx.array], dict[str, int | mx.Dtype]]:
    """How a matrix's numbers come out of its arrays, those arrays, and the sizes of its format."""
    if isinstance(weight, DenseWeight):
        return verify_gemm.DENSE, [weight.weight], {"W": weight.dtype}
    assert isinstance(weight, QuantizedWeight)
    template: dict[str, int | mx.Dtype] = {"BITS": weight.bits, "GROUP": weight.group_size}
    if weight.biases is None:
        return verify_qmm.BLOCK_FLOAT, [weight.weight, weight.scales], template
    arrays = [weight.weight, weight.scales, weight.biases]
    return verify_qmm.AFFINE, arrays, {**template, "S": weight.scales.dtype}


@functools.cache
def _group_kernel(skinny: Skinny) -> Kernel:
    return Kernel(
        name=skinny.name.replace("verify", "head"),
        files=("skinny.metal", *skinny.files, "choose.metal", "head_choose.metal"),
        inputs=("x", *skinny.arrays, "sizes", "cap", "temperature"),
        outputs=("items", "seconds"),
        indexed=("sizes", "cap", "temperature"),
        body=f"""
    threadgroup float logits[ROWS * NEIGHBOURS];
    const uint lane = thread_index_in_simdgroup;
    const int depth = sizes[2];
    const {skinny.weights};
    const int first_row = threadgroup_position_in_grid.x * ROWS;
    const int row = min(first_row + int(lane) / COLUMNS, sizes[0] - 1);
    const float heat = temperature[row / sizes[3]];
    head_group<ROWS, COLUMNS, CAPPED>(
        x, weights, items, seconds, sizes[0], sizes[1], depth, first_row, threadgroup_position_in_grid.y,
        threadgroups_per_grid.y, cap[0], heat > 0.0f ? heat : 1.0f, logits, lane, simdgroup_index_in_threadgroup);
""",
    )


@functools.cache
def _draw_kernel(skinny: Skinny) -> Kernel:
    return Kernel(
        name=skinny.name.replace("verify", "choose"),
        files=("skinny.metal", *skinny.files, "choose.metal", "head_choose.metal"),
        inputs=(
            "x",
            *skinny.arrays,
            "items",
            "seconds",
            "sizes",
            "cap",
            "positions",
            "seed",
            *choose.SETTINGS,
        ),
        outputs=("token", "valid"),
        indexed=("sizes", "cap", "positions", "seed", *choose.SETTINGS),
        body=f"""{choose.ROW}
    threadgroup ulong found[MERGE_THREADS];
    threadgroup uint order[BEST];
    threadgroup int tallies[2 * MERGE_THREADS / 32];
    threadgroup atomic_uint filled[1];
    threadgroup ulong picked[BEST];
    threadgroup ulong best[BEST];
    threadgroup float odds[BEST];
    const int depth = sizes[2];
    const {skinny.weights};
    const uint member = row / sizes[3];
    const Draw draw = {{
        seed[member], uint(positions[row]), temperature[member], top_k[member], top_p[member], min_p[member]}};
    const int groups = (sizes[1] + NEIGHBOURS - 1) / NEIGHBOURS;
    best_of_groups<CAPPED>(
        x + size_t(row) * depth, weights, items + size_t(row) * groups, seconds + size_t(row) * groups, sizes[1], depth,
        groups, cap[0], draw.temperature > 0.0f ? draw.temperature : 1.0f, found, order, tallies, filled, picked, best,
        worker, lane, simdgroup_index_in_threadgroup);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const ulong chosen = drawn_item(best, draw, odds, picked, worker, lane);
    if (worker == 0) {{
      token[row] = id_of(chosen);
      valid[row] = is_valid(best[0]);
    }}
""",
    )


@functools.cache
def _sizes(rows: int, tokens: int, depth: int, rows_a_member: int) -> mx.array:
    return mx.array([rows, tokens, depth, rows_a_member], mx.int32)


@functools.cache
def _cap(cap: float | None) -> mx.array:
    return mx.array([cap or 1.0], mx.float32)
