"""norm_rotate: the norm and rotation of heads, and the norm of values, in one launch."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.errors import KernelError
from mlx_mtp.kernels.norm_rotate import DIMS, norm_rotate, reference, unsupported
from mlx_mtp.layers import Rope, Rotation

EPS = 1e-6
ROUNDING = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}


def heads(batch: int, rows: int, count: int, dim: int, *, seed: int, dtype: mx.Dtype) -> mx.array:
    """Of very different sizes: a norm that mixed them would show."""
    x = mx.random.normal((batch, rows, count, dim), key=mx.random.key(seed))
    return (x * mx.array([10.0**-i for i in range(count)])[:, None]).astype(dtype)


def rotation(dim: int, positions: list[int], rows: int, *, turned: int | None = None) -> Rotation:
    turned = dim // 2 if turned is None else turned
    frequencies = np.concatenate([10_000.0 ** (-np.arange(turned) * 2 / dim), np.zeros(dim // 2 - turned)])
    return Rope(mx.array(frequencies.astype(np.float32))).at(mx.array(positions, mx.int32), rows)


def exact(raw: mx.array, gain: mx.array | None, turn: Rotation | None) -> np.ndarray:
    """In float64, nothing rounded."""
    x = np.array(raw.astype(mx.float32)).astype(np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    if gain is not None:
        x = x * np.array(gain.astype(mx.float32))
    if turn is None:
        return x
    cosine = np.array(turn.cosine)[:, :, 0]
    sine = np.array(turn.sine)[:, :, 0, 1][:, :, None]
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate([low * cosine - high * sine, high * cosine + low * sine], axis=-1)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_near_float64_and_as_mlx_has_it(metal, dim, dtype):
    """Keys with values and queries without; a number of heads that leaves simdgroups over; partial rotation."""
    metal.settings(check=True)
    raw, values = (heads(2, 3, 3, dim, seed=seed, dtype=dtype) for seed in (1, 2))
    gain = (1 + 0.3 * mx.random.normal((dim,), key=mx.random.key(3))).astype(dtype)
    turn = rotation(dim, [5, 700], 3, turned=dim // 8)
    keys, normed = norm_rotate(raw, gain, turn, EPS, values)
    queries, nothing = norm_rotate(raw, gain, turn, EPS)
    assert nothing is None and mx.array_equal(keys, queries)
    for got, want in ((keys, exact(raw, gain, turn)), (normed, exact(values, None, None))):
        off = np.abs(np.array(got.astype(mx.float32)) - want)
        assert got.dtype == dtype and (off <= ROUNDING[dtype] * np.abs(want).max(-1, keepdims=True)).all()
    for got, want in zip((keys, normed), reference(raw, gain, turn, EPS, values), strict=True):
        # The sum of squares is added in another order: now and then a value is rounded the other way.
        assert mx.allclose(got, want, rtol=ROUNDING[dtype], atol=1e-6).item()
        assert dtype == mx.float32 or (got == want).mean().item() > 0.98
    assert [metal.lint(launch.kernel) for launch in metal.launches] == [[], []]


def test_a_head_does_not_depend_on_its_company(metal):
    raw, values = (heads(2, 5, 4, 256, seed=seed, dtype=mx.bfloat16) for seed in (4, 5))
    gain = mx.ones((256,), mx.bfloat16) * 1.5
    turn = rotation(256, [9, 40_000], 5)
    keys, normed = norm_rotate(raw, gain, turn, EPS, values)
    for member, row in ((0, 0), (1, 4)):
        own = Rotation(*(part[member : member + 1, row : row + 1] for part in turn))
        one = raw[member : member + 1, row : row + 1], values[member : member + 1, row : row + 1]
        alone = norm_rotate(one[0], gain, own, EPS, one[1])
        assert mx.array_equal(alone[0][0, 0], keys[member, row])
        assert mx.array_equal(alone[1][0, 0], normed[member, row])
        single = norm_rotate(one[0][:, :, 2:3], gain, own, EPS)[0]
        assert mx.array_equal(single[0, 0, 0], keys[member, row, 2])
    for order in ("reverse", "random"):
        with metal.run(order=order, seed=6):
            assert mx.array_equal(norm_rotate(raw, gain, turn, EPS, values)[0], keys)


def test_each_value_is_read_and_written_once(metal):
    raw, values = (heads(1, 4, 8, 256, seed=seed, dtype=mx.bfloat16) for seed in (7, 8))
    with metal.run(count=True):
        norm_rotate(raw, mx.ones((256,), mx.bfloat16), rotation(256, [0], 4), EPS, values)
    counts = metal.counts["norm_rotate_values"]
    for name in ("raw", "values"):
        assert counts.read[name].requested == counts.read[name].distinct == raw.nbytes
    for name in ("rotated", "normed"):
        assert counts.written[name].requested == counts.written[name].distinct == raw.nbytes
    assert counts.threadgroups == 4 * 8 * 2 and counts.barriers == 0  # a head each, as stock's norm


def test_what_it_does_not_compute_is_said_and_refused(metal):
    assert unsupported(256, mx.bfloat16) is None
    assert "96" in str(unsupported(96, mx.bfloat16))
    assert "int32" in str(unsupported(256, mx.int32))
    raw, gain, turn = (
        heads(1, 2, 2, 64, seed=9, dtype=mx.float16),
        mx.ones((64,), mx.float16),
        rotation(64, [0], 2),
    )
    with pytest.raises(KernelError, match="gain of"):
        norm_rotate(raw, gain.astype(mx.float32), turn, EPS)
    with pytest.raises(KernelError, match="values must be"):
        norm_rotate(raw, gain, turn, EPS, raw[:, :1])
    with pytest.raises(KernelError, match="rotation must be"):
        norm_rotate(raw[:, :1], gain, turn, EPS)
    with pytest.raises(KernelError, match="none of"):
        norm_rotate(raw[..., :48], gain[:48], turn, EPS)
    assert metal.launches == []
