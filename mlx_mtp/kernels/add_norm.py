"""The residual stream plus a normed row, scaled or normed again, in one launch (metal/add_norm.metal)."""

import functools

import mlx.core as mx

from mlx_mtp.errors import KernelError
from mlx_mtp.kernels.launch import SMALL, Kernel
from mlx_mtp.kernels.skinny import FLOATS
from mlx_mtp.layers import add_norm as stock

MAX_WIDTH = 8192  # 16 values a thread
WIDE = 2048  # from here on a row has 512 threads, below 256
ROW = """
    threadgroup float scratch[64];
    const size_t row = threadgroup_position_in_grid.x * size_t(WIDTH);
"""
WHERE = "scratch, thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup);\n"
PLAIN = Kernel(
    name="add_norm",
    files=("add_norm.metal",),
    inputs=("x", "y", "gain", "eps"),
    outputs=("total",),
    body=f"{ROW}    add_norm_row<WIDTH, THREADS, false, false>("
    f"x + row, y + row, gain, gain, eps[0], 1.0f, total + row, total + row, {WHERE}",
    indexed=("eps",),
)
SCALED = Kernel(
    name="add_norm_scaled",
    files=("add_norm.metal",),
    inputs=("x", "y", "gain", "eps", "scalar"),
    outputs=("total",),
    body=f"{ROW}    add_norm_row<WIDTH, THREADS, true, false>("
    f"x + row, y + row, gain, gain, eps[0], float(scalar[0]), total + row, total + row, {WHERE}",
    indexed=("eps", "scalar"),
)
THEN = Kernel(
    name="add_norm_then",
    files=("add_norm.metal",),
    inputs=("x", "y", "gain", "next_gain", "eps"),
    outputs=("total", "normed"),
    body=f"{ROW}    add_norm_row<WIDTH, THREADS, false, true>("
    f"x + row, y + row, gain, next_gain, eps[0], 1.0f, total + row, normed + row, {WHERE}",
    indexed=("eps",),
)


def reference(
    x: mx.array,
    y: mx.array,
    gain: mx.array,
    eps: float,
    *,
    scalar: mx.array | None = None,
    then: mx.array | None = None,
) -> tuple[mx.array, mx.array | None]:
    """The same by MLX's own operations."""
    return stock(x, y, gain, eps, scalar=scalar, then=then)


def unsupported(width: int, dtype: mx.Dtype) -> str | None:
    """Why rows of this width take stock operations, or None where the kernel computes them."""
    if not SMALL <= width <= MAX_WIDTH:
        return f"a row must have {SMALL} to {MAX_WIDTH} values, got {width}"
    return None if dtype in FLOATS else f"no kernel for rows of {dtype}"


def add_norm(
    x: mx.array,
    y: mx.array,
    gain: mx.array,
    eps: float,
    *,
    scalar: mx.array | None = None,
    then: mx.array | None = None,
) -> tuple[mx.array, mx.array | None]:
    """x, y [N, H], gains [H] -> (x + y normed) * scalar [1], and that normed with the gain `then`, if there is one.

    A row's bits depend on that row alone. Raises KernelError where `unsupported` has a reason, and for both at once.
    """
    rows, width = x.shape
    reason = unsupported(width, x.dtype)
    arrays = [y, gain, *(array for array in (scalar, then) if array is not None)]
    if reason is None and (y.shape != x.shape or any(array.dtype != x.dtype for array in arrays)):
        reason = f"all must be {x.dtype}, and both rows {tuple(x.shape)}, got {tuple(y.shape)}"
    if reason is None and scalar is not None and then is not None:
        reason = "a row is either scaled or normed again"
    if reason is not None:
        raise KernelError(f"add_norm: {reason}; take stock operations")
    inputs = [x, y, gain]
    kernel = PLAIN if scalar is None else SCALED
    if then is not None:
        kernel, inputs = THEN, [*inputs, then]
    inputs.append(_eps(eps))
    if scalar is not None:
        inputs.append(scalar)
    outputs = 1 if then is None else 2
    threads = 512 if width >= WIDE else 256
    made = kernel(
        inputs,
        template={"WIDTH": width, "THREADS": threads},
        groups=(rows, 1, 1),
        threads=(threads, 1, 1),
        shapes=[(rows, width)] * outputs,
        dtypes=[x.dtype] * outputs,
    )
    return made[0], None if then is None else made[1]


@functools.cache
def _eps(eps: float) -> mx.array:
    return mx.array([eps], mx.float32)
