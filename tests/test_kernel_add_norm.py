"""add_norm: the residual stream plus a normed row, scaled or normed again, in one launch."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.errors import KernelError
from mlx_mtp.kernels.add_norm import add_norm, reference, unsupported

EPS = 1e-6
WIDTHS = (
    32,
    256,
    1024,
    1536,
    2816,
    5376,
)  # Gemma's, the widest, and one that leaves most threads without a value
ROUNDING = {mx.float32: 2e-6, mx.float16: 3e-3, mx.bfloat16: 2.4e-2}


def rows_and_gains(rows: int, width: int, *, seed: int, dtype: mx.Dtype) -> list[mx.array]:
    """x, y, gain, next gain; rows of very different sizes, which must not mix."""
    keys = mx.random.split(mx.random.key(seed), 4)
    sizes = mx.array([10.0 ** (i % 4 - 2) for i in range(rows)])[:, None]
    x, y = (mx.random.normal((rows, width), key=key) * sizes for key in keys[:2])
    gains = [1 + 0.3 * mx.random.normal((width,), key=key) for key in keys[2:]]
    return [array.astype(dtype) for array in (x, y, *gains)]


def wide(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def normed(x: np.ndarray, gain: mx.array) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * wide(gain)


def close(got: mx.array, want: np.ndarray) -> bool:
    limit = ROUNDING[got.dtype] * np.abs(want).max(-1, keepdims=True)
    return bool((np.abs(wide(got) - want) <= limit).all())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_near_float64_and_as_mlx_has_it(metal, width, dtype):
    metal.settings(check=True)
    x, y, gain, then = rows_and_gains(3, width, seed=1, dtype=dtype)
    scalar = mx.array([0.37], dtype)
    total = wide(x) + normed(wide(y), gain)
    plain, nothing = add_norm(x, y, gain, EPS)
    scaled, _ = add_norm(x, y, gain, EPS, scalar=scalar)
    first, again = add_norm(x, y, gain, EPS, then=then)
    assert nothing is None and again is not None
    assert plain.dtype == dtype and close(plain, total) and close(scaled, total * wide(scalar))
    assert mx.array_equal(first, plain) and close(again, normed(total, then))
    for got, how in ((plain, {}), (scaled, {"scalar": scalar}), (again, {"then": then})):
        want = reference(x, y, gain, EPS, **how)[1 if "then" in how else 0]
        assert close(got, wide(want))
        assert dtype == mx.float32 or (got == want).mean().item() > 0.97
    assert [metal.lint(launch.kernel) for launch in metal.launches] == [[]] * 3


@pytest.mark.parametrize("width", [96, 2816])
def test_a_row_does_not_depend_on_its_company(metal, width):
    x, y, gain, then = rows_and_gains(9, width, seed=2, dtype=mx.bfloat16)
    whole = add_norm(x, y, gain, EPS, then=then)
    for rows in (slice(0, 1), slice(4, 5), slice(2, 7)):
        for part, full in zip(add_norm(x[rows], y[rows], gain, EPS, then=then), whole, strict=True):
            assert mx.array_equal(part, full[rows])
    for order in ("reverse", "random"):
        with metal.run(order=order, seed=3):
            assert mx.array_equal(add_norm(x, y, gain, EPS, then=then)[1], whole[1])


def test_a_poisoned_row_stays_alone(metal):
    x, y, gain, then = rows_and_gains(4, 64, seed=4, dtype=mx.float32)
    y[2] = mx.nan
    for part, sound in zip(
        add_norm(x, y, gain, EPS, then=then), add_norm(x[3:], y[3:], gain, EPS, then=then), strict=True
    ):
        assert mx.isnan(part[2]).all().item() and mx.array_equal(part[3:], sound)


def test_each_value_is_read_and_written_once(metal):
    x, y, gain, then = rows_and_gains(4, 2816, seed=5, dtype=mx.bfloat16)
    with metal.run(count=True):
        add_norm(x, y, gain, EPS, then=then)
    counts = metal.counts["add_norm_then"]
    for name in ("x", "y"):
        assert counts.read[name].requested == counts.read[name].distinct == x.nbytes
    for name in ("total", "normed"):
        assert counts.written[name].requested == counts.written[name].distinct == x.nbytes
    assert counts.threadgroups == 4 and counts.barriers == 2 * 4


def test_what_it_does_not_compute_is_said_and_refused(metal):
    assert unsupported(5376, mx.bfloat16) is None
    assert "8193" in str(unsupported(8193, mx.bfloat16)) and "int32" in str(unsupported(64, mx.int32))
    x, y, gain, then = rows_and_gains(2, 64, seed=6, dtype=mx.float16)
    with pytest.raises(KernelError, match="all must be"):
        add_norm(x, y, gain.astype(mx.float32), EPS)
    with pytest.raises(KernelError, match="all must be"):
        add_norm(x, y[:1], gain, EPS)
    with pytest.raises(KernelError, match="either scaled or normed"):
        add_norm(x, y, gain, EPS, scalar=mx.array([1.0], mx.float16), then=then)
    assert metal.launches == []
