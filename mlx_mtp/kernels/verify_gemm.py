"""Rows times a dense matrix; a row's bits are the same whatever rows are computed with it."""

import mlx.core as mx

from mlx_mtp.errors import KernelError
from mlx_mtp.kernels.skinny import FLOATS, SEGMENT, Bodies, Skinny
from mlx_mtp.weights import DenseWeight

DENSE = Skinny(
    name="verify_gemm",
    files=("verify_gemm.metal",),
    arrays=("table",),
    weights="Dense<W> weights = {table, depth}",
)


def reference(weight: DenseWeight, x: mx.array) -> mx.array:
    """x [..., K] -> [..., N] in float32, rounded once to x's type; a row's bits may depend on the rows beside it."""
    return (x.astype(mx.float32) @ weight.transposed.astype(mx.float32)).astype(x.dtype)


def unsupported(weight: DenseWeight, dtype: mx.Dtype) -> str | None:
    """Why rows of `dtype` times this matrix must take stock operations, or None where the kernel computes them."""
    if weight.weight.ndim != 2:
        return f"one matrix is [N, K], not a stack of {weight.weight.ndim} axes"
    if dtype not in FLOATS or weight.dtype != dtype:
        return f"no kernel for rows of {dtype} with weights of {weight.dtype}"
    if weight.shape[1] % SEGMENT:
        return f"K must be a multiple of {SEGMENT}, got {weight.shape[1]}"
    return None


def verify_gemm(
    weight: DenseWeight, x: mx.array, *, body: Bodies = "scalar", tile: int | None = None
) -> mx.array:
    """x [..., K] -> [..., N]; a row's bits are a function of that row and the matrix alone.

    `tile` (1 to 16 rows that share one reading of the weights) changes no bit; nor does `body` where a chip's matrix
    units add in the scalar order: only there may it be a number, from so many rows on matrix units.
    Raises KernelError where `unsupported` has a reason.
    """
    reason = unsupported(weight, x.dtype)
    if reason is None and x.shape[-1:] != weight.shape[1:]:
        reason = f"rows must have {weight.shape[1]} values, got {tuple(x.shape)}"
    if reason is not None:
        raise KernelError(f"verify_gemm: {reason}; take stock operations")
    return DENSE(x, [weight.weight], weight.shape[0], template={"W": weight.dtype}, body=body, tile=tile)
