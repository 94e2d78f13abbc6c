"""Rows times a quantised matrix, each row's bits the same whatever rows are computed with it (metal/verify_qmm.metal)."""

import functools
import math
from typing import Literal

import mlx.core as mx

from mlx_mtp.errors import KernelError
from mlx_mtp.kernels.launch import SIMD, SMALL, Kernel
from mlx_mtp.weights import QuantizedWeight

Body = Literal["scalar", "matrix"]
BITS = (4, 8)
GROUPS = (32, 64, 128)
FLOATS = (mx.float16, mx.bfloat16, mx.float32)
SEGMENT = 32  # K is a multiple of it
MAX_TILE = 16  # rows
MAX_SUMS = 24  # a thread's accumulators: more and the compiler spills
# Rows from which two tiles issue less than one: a scalar tile of more has a single column to share its rows' loads.
USUAL_TILE = {"scalar": 12, "matrix": 16}
SCALAR_SIMDGROUPS, SCALAR_COLUMNS = 2, 4  # the threadgroups of stock's qmv at one row
MATRIX_SIMDGROUPS, MATRIX_COLUMNS = 8, 8

FILES = ("skinny.metal", "verify_qmm.metal")
INPUTS = ("x", "words", "scales", "biases", "sizes")
WEIGHTS = """
    const uint lane = thread_index_in_simdgroup;
    const uint simd = simdgroup_index_in_threadgroup;
    const Affine<S, BITS, GROUP> weights = {{words}, scales, biases, sizes[2], lane};
"""
SCALAR = Kernel(
    name="verify_qmm_scalar",
    files=FILES,
    inputs=INPUTS,
    outputs=("y",),
    body=WEIGHTS
    + """
    skinny_scalar<ROWS, COLUMNS>(
        x, weights, y, sizes[0], sizes[1], sizes[2], threadgroup_position_in_grid.x * ROWS,
        (threadgroup_position_in_grid.y * simdgroups_per_threadgroup + simd) * COLUMNS, lane);
""",
    indexed=("sizes",),
)
MATRIX = Kernel(
    name="verify_qmm_matrix",
    files=FILES,
    inputs=INPUTS,
    outputs=("y",),
    body=WEIGHTS
    + """
    threadgroup float scratch[SPLITS * TILES * 64];
    skinny_matrix<TILES>(
        x, weights, y, sizes[0], sizes[1], sizes[2], threadgroup_position_in_grid.x * TILES * 8,
        threadgroup_position_in_grid.y * 8, scratch, lane, simd);
""",
    indexed=("sizes",),
)


def reference(x: mx.array, weight: QuantizedWeight) -> mx.array:
    """x [..., K] -> [..., N] in float32, rounded once to x's type; rows may differ in bits by what stands beside them."""
    biases = None if weight.biases is None else weight.biases.astype(mx.float32)
    scales = weight.scales.astype(mx.float32) if weight.mode == "affine" else weight.scales
    table = mx.dequantize(
        weight.weight,
        scales,
        biases,
        group_size=weight.group_size,
        bits=weight.bits,
        mode=weight.mode,
        dtype=mx.float32,
    )
    return (x.astype(mx.float32) @ table.swapaxes(-1, -2)).astype(x.dtype)


def unsupported(weight: QuantizedWeight, dtype: mx.Dtype) -> str | None:
    """Why rows of `dtype` times this matrix must take stock operations, or None where the kernel computes them."""
    if weight.weight.ndim != 2:
        return f"a stack of {weight.weight.ndim - 1} axes of matrices is not one matrix"
    if weight.mode != "affine" or weight.bits not in BITS or weight.group_size not in GROUPS:
        return f"{weight.bits}-bit {weight.mode} in groups of {weight.group_size} has no kernel"
    if dtype not in FLOATS or weight.scales.dtype not in FLOATS:
        return f"rows of {dtype} with scales of {weight.scales.dtype} have no kernel"
    depth = weight.shape[1]
    if depth % SEGMENT or depth % weight.group_size:
        return f"rows of {depth} values are no whole number of segments of {SEGMENT} and groups of {weight.group_size}"
    if weight.scales.size < SMALL:
        return f"{weight.scales.size} scales are fewer than {SMALL}"
    return None


def verify_qmm(
    x: mx.array, weight: QuantizedWeight, *, body: Body = "scalar", tile: int | None = None
) -> mx.array:
    """x [..., K] -> [..., N], a row's bits a function of that row and the matrix alone.

    `tile` is how many rows share one reading of the weights, 1 to 16; it changes no bit. Both bodies give the same
    bits where the chip's matrix units add in the scalar order. Raises KernelError where `unsupported` has a reason.
    """
    depth, rows = weight.shape[-1], math.prod(x.shape[:-1])
    reason = unsupported(weight, x.dtype)
    if reason is None and (x.shape[-1:] != (depth,) or not rows):
        reason = f"rows must be at least one of {depth} values, got {tuple(x.shape)}"
    if tile is not None and not 1 <= tile <= MAX_TILE:
        reason = f"a tile must have 1 to {MAX_TILE} rows, got {tile}"
    if reason is not None:
        raise KernelError(f"verify_qmm: {reason}; take stock operations")
    assert weight.biases is not None, "affine"
    columns = weight.shape[0]
    launch = _scalar_launch if body == "scalar" else _matrix_launch
    kernel, sizes, groups, threads = launch(rows, columns, tile or usual_tile(rows, body))
    (y,) = kernel(
        [x.reshape(rows, depth), weight.weight, weight.scales, weight.biases, _sizes(rows, columns, depth)],
        template={
            "S": weight.scales.dtype,
            "BITS": weight.bits,
            "GROUP": weight.group_size,
            **sizes,
        },
        groups=groups,
        threads=threads,
        shapes=[(rows, columns)],
        dtypes=[x.dtype],
    )
    return y.reshape(*x.shape[:-1], columns)


def usual_tile(rows: int, body: Body) -> int:
    """Rows of a tile: all where one tile takes them, otherwise tiles of like size."""
    return math.ceil(rows / math.ceil(rows / USUAL_TILE[body]))


Launch = tuple[Kernel, dict[str, int], tuple[int, int, int], tuple[int, int, int]]


def _scalar_launch(rows: int, columns: int, tile: int) -> Launch:
    own = min(SCALAR_COLUMNS, MAX_SUMS // tile)
    groups = (math.ceil(rows / tile), math.ceil(columns / (own * SCALAR_SIMDGROUPS)), 1)
    return SCALAR, {"ROWS": tile, "COLUMNS": own}, groups, (SCALAR_SIMDGROUPS * SIMD, 1, 1)


def _matrix_launch(rows: int, columns: int, tile: int) -> Launch:
    tiles = math.ceil(tile / 8)
    groups = (math.ceil(rows / (tiles * 8)), math.ceil(columns / MATRIX_COLUMNS), 1)
    return MATRIX, {"TILES": tiles}, groups, (MATRIX_SIMDGROUPS * SIMD, 1, 1)


@functools.cache
def _sizes(rows: int, columns: int, depth: int) -> mx.array:
    """[M, N, K] read at run time: as template arguments every shape and row count would be compiled anew."""
    return mx.array([rows, columns, depth], mx.int32)
