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

PART = 512  # tokens of a threadgroup: a list each
SIMDGROUPS = 16
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
    if reason is None and not MAX_CANDIDATES <= tokens <= PART * choose.MAX_LISTS:
        reason = f"a vocabulary must have {MAX_CANDIDATES} to {PART * choose.MAX_LISTS} tokens, got {tokens}"
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
    items = best_of_parts(weight, cap, hidden, sampling, sampler, tile)
    return choose.choose_of_lists(items, positions, seed, sampling, sampler)


def best_of_parts(
    weight: Weight,
    cap: float | None,
    hidden: mx.array,
    sampling: dict[str, mx.array],
    sampler: SamplerClass,
    tile: int | None,
) -> mx.array:
    """The first launch: hidden [B, M, H] -> the best logits of each part of the vocabulary, [B * M, parts, kept]."""
    batch, each, depth = hidden.shape
    rows, tokens = batch * each, weight.shape[0]
    tile = tile or math.ceil(rows / math.ceil(rows / MAX_ROWS))
    parts, kept = math.ceil(tokens / PART), choose.kept(sampler)
    skinny, arrays, template = stored(weight)
    (items,) = _kernel(skinny)(
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
            "KEPT": kept,
            "CAPPED": cap is not None,
        },
        groups=(math.ceil(rows / tile), parts, 1),
        threads=(SIMDGROUPS * SIMD, 1, 1),
        shapes=[(rows, parts, kept)],
        dtypes=[mx.uint64],
    )
    return items


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
def _kernel(skinny: Skinny) -> Kernel:
    return Kernel(
        name=skinny.name.replace("verify", "head"),
        files=("skinny.metal", *skinny.files, "choose.metal", "head_choose.metal"),
        inputs=("x", *skinny.arrays, "sizes", "cap", "temperature"),
        outputs=("items",),
        indexed=("sizes", "cap", "temperature"),
        body=f"""
    threadgroup float logits[ROWS * PART];
    const uint lane = thread_index_in_simdgroup;
    const int depth = sizes[2];
    const {skinny.weights};
    const int first_row = threadgroup_position_in_grid.x * ROWS;
    const int row = min(first_row + int(lane) / COLUMNS, sizes[0] - 1);
    const float heat = KEPT == 1 ? 0.0f : temperature[row / sizes[3]];
    head_part<ROWS, COLUMNS, KEPT, CAPPED>(
        x, weights, items, sizes[0], sizes[1], depth, first_row, threadgroup_position_in_grid.y,
        threadgroups_per_grid.y, cap[0], heat > 0.0f ? heat : 1.0f, logits, lane, simdgroup_index_in_threadgroup);
""",
    )


@functools.cache
def _sizes(rows: int, tokens: int, depth: int, rows_a_member: int) -> mx.array:
    return mx.array([rows, tokens, depth, rows_a_member], mx.int32)


@functools.cache
def _cap(cap: float | None) -> mx.array:
    return mx.array([cap or 1.0], mx.float32)
