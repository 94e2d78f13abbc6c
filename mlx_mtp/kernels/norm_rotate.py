"""Norm and rotation of a layer's heads in one launch, with the norm of its values (metal/norm_rotate.metal)."""

import functools
import math

import mlx.core as mx

from mlx_mtp.errors import KernelError
from mlx_mtp.kernels.launch import SIMD, Kernel
from mlx_mtp.kernels.skinny import FLOATS
from mlx_mtp.layers import Rotation
from mlx_mtp.layers import norm_rotate as stock

DIMS = (16, 32, 64, 128, 256, 512)
SIMDGROUPS = 1  # a head a threadgroup, as stock's norm has
HEAD = """
    const uint lane = thread_index_in_simdgroup;
    const int head = threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;
    const size_t row = threadgroup_position_in_grid.y;
    const size_t turned = row * (DIM / 2);
    const size_t at = (row * heads[0] + head % heads[0]) * DIM;
    if (head < heads[0]) {
      rotate_head<DIM>(raw + at, gain, cosine + turned, sine + 2 * turned, eps[0], rotated + at, lane);
    }
"""
ROTATE = Kernel(
    name="norm_rotate",
    files=("norm_rotate.metal",),
    inputs=("raw", "gain", "cosine", "sine", "eps", "heads"),
    outputs=("rotated",),
    body=HEAD,
    indexed=("eps", "heads"),
)
ROTATE_AND_NORM = Kernel(
    name="norm_rotate_values",
    files=("norm_rotate.metal",),
    inputs=("raw", "values", "gain", "cosine", "sine", "eps", "heads"),
    outputs=("rotated", "normed"),
    body=HEAD
    + """
    else if (head < 2 * heads[0]) {
      norm_head<DIM>(values + at, eps[0], normed + at, lane);
    }
""",
    indexed=("eps", "heads"),
)


def reference(
    raw: mx.array, gain: mx.array, rotation: Rotation, eps: float, values: mx.array | None = None
) -> tuple[mx.array, mx.array | None]:
    """The same by MLX's own operations."""
    return stock(raw, gain, rotation, eps, values)


def unsupported(head_dim: int, dtype: mx.Dtype) -> str | None:
    """Why heads of this size take stock operations, or None where the kernel computes them."""
    if head_dim not in DIMS:
        return f"a head of {head_dim} is none of {', '.join(map(str, DIMS))}"
    return None if dtype in FLOATS else f"no kernel for heads of {dtype}"


def norm_rotate(
    raw: mx.array, gain: mx.array, rotation: Rotation, eps: float, values: mx.array | None = None
) -> tuple[mx.array, mx.array | None]:
    """raw [B, M, heads, D], gain [D], values of the same shape -> rotated heads, values normed without a gain.

    A head's bits depend on that head and its position alone. Raises KernelError where `unsupported` has a reason.
    """
    batch, each, heads, dim = raw.shape
    reason = unsupported(dim, raw.dtype)
    if reason is None and gain.dtype != raw.dtype:
        reason = f"a gain of {gain.dtype} does not go with heads of {raw.dtype}"
    if reason is None and values is not None and (values.shape, values.dtype) != (raw.shape, raw.dtype):
        reason = f"values must be {raw.dtype} {tuple(raw.shape)}, got {values.dtype} {tuple(values.shape)}"
    if reason is None and rotation.cosine.shape[:2] != (batch, each):
        reason = f"the rotation must be of [{batch}, {each}] rows, got {tuple(rotation.cosine.shape[:2])}"
    if reason is not None:
        raise KernelError(f"norm_rotate: {reason}; take stock operations")
    kernel = ROTATE if values is None else ROTATE_AND_NORM
    outputs = 1 if values is None else 2
    given = [raw] if values is None else [raw, values]
    made = kernel(
        [*given, gain, rotation.cosine, rotation.sine, _eps(eps), _heads(heads)],
        template={"DIM": dim},
        groups=(math.ceil(outputs * heads / SIMDGROUPS), batch * each, 1),
        threads=(SIMDGROUPS * SIMD, 1, 1),
        shapes=[raw.shape] * outputs,
        dtypes=[raw.dtype] * outputs,
    )
    return made[0], made[1] if values is not None else None


@functools.cache
def _eps(eps: float) -> mx.array:
    return mx.array([eps], mx.float32)


@functools.cache
def _heads(heads: int) -> mx.array:
    return mx.array([heads], mx.int32)
