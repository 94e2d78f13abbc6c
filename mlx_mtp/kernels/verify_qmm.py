"""Rows times a quantised matrix; a row's bits are the same whatever rows are computed with it."""

import mlx.core as mx

from mlx_mtp.errors import KernelError
from mlx_mtp.kernels.launch import SMALL
from mlx_mtp.kernels.skinny import FLOATS, SEGMENT, Bodies, Skinny
from mlx_mtp.weights import QuantizedWeight

AFFINE_BITS = (4, 8)  # those whose weights never straddle two words
AFFINE = Skinny(
    name="verify_qmm",
    files=("verify_qmm.metal",),
    arrays=("words", "scales", "biases"),
    weights="Affine<S, BITS, GROUP> weights = {{words}, scales, biases, depth, lane}",
)
BLOCK_FLOAT = Skinny(
    name="verify_qmm_float",
    files=("verify_qmm.metal",),
    arrays=("words", "scales"),
    weights="BlockFloat<BITS, GROUP> weights = {{words}, scales, depth, lane}",
)


def reference(weight: QuantizedWeight, x: mx.array) -> mx.array:
    """x [..., K] -> [..., N] in float32, rounded once to x's type; a row's bits may depend on the rows beside it."""
    table = mx.dequantize(
        weight.weight,
        weight.scales.astype(mx.float32) if weight.mode == "affine" else weight.scales,
        None if weight.biases is None else weight.biases.astype(mx.float32),
        group_size=weight.group_size,
        bits=weight.bits,
        mode=weight.mode,
        dtype=mx.float32,
    )
    return (x.astype(mx.float32) @ table.swapaxes(-1, -2)).astype(x.dtype)


def unsupported(weight: QuantizedWeight, dtype: mx.Dtype) -> str | None:
    """Why rows of `dtype` times this matrix must take stock operations, or None where the kernel computes them."""
    if weight.weight.ndim != 2:
        return f"one matrix is [N, K], not a stack of {weight.weight.ndim} axes"
    is_affine = weight.mode == "affine"
    if is_affine and weight.bits not in AFFINE_BITS:
        return f"no kernel for {weight.bits} bits"
    if dtype not in FLOATS or (is_affine and weight.scales.dtype not in FLOATS):
        return f"no kernel for rows of {dtype} with scales of {weight.scales.dtype}"
    if weight.global_scale is not None:
        return "no kernel for a scale of the whole matrix"
    depth = weight.shape[1]
    if depth % SEGMENT or depth % weight.group_size:
        return f"K must be a multiple of {SEGMENT} and of the group size {weight.group_size}, got {depth}"
    if weight.scales.size < SMALL:
        return f"fewer than {SMALL} scales"
    return None


def verify_qmm(
    weight: QuantizedWeight, x: mx.array, *, body: Bodies = "scalar", tile: int | None = None
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
        raise KernelError(f"verify_qmm: {reason}; take stock operations")
    template: dict[str, int | mx.Dtype] = {"BITS": weight.bits, "GROUP": weight.group_size}
    if weight.biases is None:
        arrays = [weight.weight, weight.scales]
        return BLOCK_FLOAT(x, arrays, weight.shape[0], template=template, body=body, tile=tile)
    arrays = [weight.weight, weight.scales, weight.biases]
    template["S"] = weight.scales.dtype
    return AFFINE(x, arrays, weight.shape[0], template=template, body=body, tile=tile)
