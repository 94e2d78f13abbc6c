"""Skinny products, run as Metal source: right, and each row's bits independent of its company, tile and body.

The full sweeps are in test_kernel_qmm_sweep.py, what breaks which check here in test_kernel_qmm_mutants.py.
"""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.errors import KernelError
from mlx_mtp.kernels import verify_gemm, verify_qmm
from mlx_mtp.kernels.skinny import MAX_SUMS, MAX_TILE, Body, layout, usual_tile
from mlx_mtp.weights import DenseWeight, QuantizedWeight, Weight
from msl.stand_in import Runner
from qmm_cases import (
    BODIES,
    assert_near,
    gemma_shapes,
    multiply,
    quantised,
    random_rows,
    same_bits,
    table_of,
)

COLUMNS = 21  # no multiple of what a simdgroup or a threadgroup owns
# K: one with idle lanes in the last round, one of 26B, one of the smallest.
WEIGHTS: dict[str, Weight] = {
    "4-bit, 64": quantised(COLUMNS, 704, seed=1),
    "8-bit, 32": quantised(COLUMNS, 96, seed=2, bits=8, group=32),
    "4-bit, 128": quantised(COLUMNS, 2816, seed=3, group=128, dtype=mx.float16),
    "8-bit, 128": quantised(COLUMNS, 384, seed=4, bits=8, group=128, dtype=mx.float32),
    "4-bit, 32": quantised(COLUMNS, 288, seed=5, group=32),
    "8-bit, 64": quantised(COLUMNS, 2112, seed=6, bits=8, group=64),
    "mxfp4": quantised(COLUMNS, 704, seed=7, mode="mxfp4"),
    "mxfp8": quantised(COLUMNS, 96, seed=8, mode="mxfp8"),
    "nvfp4": quantised(COLUMNS, 704, seed=9, mode="nvfp4"),
    "bfloat16": DenseWeight(random_rows(COLUMNS, 704, seed=10, dtype=mx.bfloat16)),
    "float16": DenseWeight(random_rows(COLUMNS, 96, seed=11, dtype=mx.float16)),
    "float32": DenseWeight(random_rows(COLUMNS, 352, seed=12)),
}
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 20, 40, 72)


def dtype_of(weight: Weight) -> mx.Dtype:
    return weight.dtype if isinstance(weight, DenseWeight) else mx.float32


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_near_float64(metal: Runner, name: str, body: Body) -> None:
    weight = WEIGHTS[name]
    metal.settings(check=True)
    x = random_rows(9, weight.shape[1], seed=20, dtype=dtype_of(weight))
    assert_near(multiply(weight, x, body=body), weight, x)
    assert metal.launches[-1].kernel.endswith(body)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("body", BODIES)
def test_result_is_rounded_once_to_the_rows_type(metal: Runner, body: Body, dtype: mx.Dtype) -> None:
    weight = WEIGHTS["4-bit, 64"]
    x = random_rows(3, 704, seed=21, dtype=dtype)
    rounded = multiply(weight, x, body=body)
    assert_near(rounded, weight, x)
    assert same_bits(rounded, multiply(weight, x.astype(mx.float32), body=body).astype(dtype))


@pytest.mark.parametrize("name", ["4-bit, 64", "8-bit, 32", "float32"])
def test_bits_do_not_depend_on_rows_tile_or_body(metal: Runner, name: str) -> None:
    weight = WEIGHTS[name]
    x = random_rows(max(ROWS), weight.shape[1], seed=22)
    expected = mx.concatenate([multiply(weight, x[row : row + 1]) for row in range(max(ROWS))])
    for rows in ROWS:
        for body in BODIES:
            assert same_bits(multiply(weight, x[:rows], body=body), expected[:rows]), (rows, body)
    for tile in (1, 3, 7, 10, 13, 16):
        for body in BODIES:
            assert same_bits(multiply(weight, x[:20], body=body, tile=tile), expected[:20]), (tile, body)


def test_bits_do_not_depend_on_the_place_in_a_batch(metal: Runner) -> None:
    weight = WEIGHTS["4-bit, 64"]
    x = random_rows(24, 704, seed=23)
    expected = multiply(weight, x)
    places = mx.random.permutation(24, key=mx.random.key(24))
    for body in BODIES:
        assert same_bits(multiply(weight, x[places], body=body), expected[places])
        assert same_bits(multiply(weight, x.reshape(4, 6, 704), body=body), expected.reshape(4, 6, COLUMNS))
        assert same_bits(multiply(weight, x[5], body=body), expected[5])


def test_bits_do_not_depend_on_the_order_threads_run_in(metal: Runner) -> None:
    weight = WEIGHTS["4-bit, 64"]
    x = random_rows(9, 704, seed=25)
    expected = multiply(weight, x)
    orders = [("forward", 0), ("reverse", 0), *(("random", seed) for seed in range(4))]
    for order, seed in orders:
        with metal.run(order=order, seed=seed, check=True):
            for body in BODIES:
                assert same_bits(multiply(weight, x, body=body), expected), (order, seed, body)


def exact_weight(bits: int, group: int, columns: int, depth: int) -> QuantizedWeight:
    """Random words under scales and biases with which every weight is exact in float32, no two groups alike."""
    words = mx.random.randint(0, 2**32 - 1, (columns, depth * bits // 32), mx.uint32, key=mx.random.key(26))
    count = columns * depth // group
    scales = (mx.arange(count) + 1).reshape(columns, -1) / 8
    biases = (mx.arange(count) * 7 - 300).reshape(columns, -1) / 4
    weight = QuantizedWeight(words, scales, biases, group, bits, "affine", mx.float32)
    return weight


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 32), (8, 64)])
def test_every_weight_is_in_its_place(metal: Runner, bits: int, group: int, body: Body) -> None:
    """Rows of the identity bring out the table, every weight of it exact."""
    weight = exact_weight(bits, group, columns=11, depth=384)
    out = np.array(multiply(weight, mx.eye(384), body=body)).astype(np.float64)
    assert np.array_equal(out, table_of(weight).T)
    looked_up = np.array(weight.rows(mx.arange(11)))  # a tied table: embeddings and head are one matrix
    assert np.array_equal(out.T, looked_up.astype(np.float64))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4", "bfloat16"])
def test_every_weight_of_other_formats_is_in_its_place(metal: Runner, name: str, body: Body) -> None:
    weight = WEIGHTS[name]
    rows = mx.eye(weight.shape[1], dtype=dtype_of(weight))[:300]
    out = np.array(multiply(weight, rows, body=body).astype(mx.float32)).astype(np.float64)
    assert np.array_equal(out, table_of(weight).T[:300])


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
def test_every_code_of_small_floats(metal: Runner, mode: str) -> None:
    """All 16 codes of e2m1 and all 254 finite ones of e4m3 come out as MLX reads them, whatever the scale."""
    if mode == "mxfp4":
        bits, codes = 4, np.arange(8, dtype=np.uint8) * 34 + 16  # two in a byte, the lower one first
    else:
        bits, codes = 8, np.delete(np.arange(256, dtype=np.uint8), [127, 255])  # those two are no numbers
    depth = 256
    words = np.resize(codes, (8, depth * bits // 8)).view(np.uint32)
    scales = mx.arange(120, 128, dtype=mx.uint8)[:, None] * mx.ones((1, depth // 32), mx.uint8)
    weight = QuantizedWeight(mx.array(words), scales, None, 32, bits, mode, mx.bfloat16)
    table = table_of(weight)
    assert len(set(table[-1])) == (15 if bits == 4 else 253)  # 0 equals -0
    for body in BODIES:
        out = np.array(multiply(weight, mx.eye(depth), body=body)).astype(np.float64)
        assert np.array_equal(out, table.T), body


@pytest.mark.parametrize("body", BODIES)
def test_what_is_no_number_stays_in_its_row_and_column(metal: Runner, body: Body) -> None:
    weight = WEIGHTS["4-bit, 64"]
    assert isinstance(weight, QuantizedWeight)
    x = random_rows(5, 704, seed=27)
    expected = multiply(weight, x)
    poisoned = mx.where(mx.arange(5)[:, None] == 2, math.nan, x)
    out = multiply(weight, poisoned, body=body)
    assert bool(mx.isnan(out[2]).all())
    others = mx.array([0, 1, 3, 4])
    assert same_bits(out[others], expected[others])
    scales = mx.where(mx.arange(COLUMNS)[:, None] == COLUMNS - 1, math.nan, weight.scales)
    spoilt = QuantizedWeight(weight.weight, scales, weight.biases, 64, 4, "affine", mx.bfloat16)
    out = multiply(spoilt, x, body=body)
    assert bool(mx.isnan(out[:, -1]).all())
    assert same_bits(out[:, :-1], expected[:, :-1])


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", ["4-bit, 64", "8-bit, 32", "nvfp4", "bfloat16"])
def test_weights_are_read_once_however_many_rows(metal: Runner, name: str, body: Body) -> None:
    sample = WEIGHTS[name]
    if isinstance(sample, DenseWeight):
        weight: Weight = DenseWeight(random_rows(170, 256, seed=28, dtype=mx.bfloat16))
    else:
        weight = quantised(170, 256, seed=28, bits=sample.bits, group=sample.group_size, mode=sample.mode)
    metal.settings(count=True)

    def weight_bytes(rows: int) -> int:
        x = random_rows(rows, 256, seed=29, dtype=dtype_of(weight))
        multiply(weight, x, body=body)
        read = metal.launches[-1].counts.read
        return sum(read[name].requested for name in read if name not in ("x", "sizes"))

    once = weight_bytes(1)
    assert weight_bytes(8) <= 1.02 * once
    read = metal.launches[-1].counts.read["table" if isinstance(weight, DenseWeight) else "words"]
    assert read.distinct == weight.arrays[0].nbytes
    assert read.requested <= 1.04 * read.distinct  # the last columns' tile is read whole


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", ["4-bit, 64", "8-bit, 64", "nvfp4", "bfloat16"])
def test_source_is_clean_and_sums_are_few(metal: Runner, name: str, body: Body) -> None:
    weight = WEIGHTS[name]
    for rows in (1, 6, 8, 12, 16):
        x = random_rows(rows, weight.shape[1], seed=30, dtype=dtype_of(weight))
        multiply(weight, x, body=body, tile=rows)
    kernel = metal.launches[-1].kernel
    assert metal.lint(kernel) == []
    assert 0 < metal.accumulators(kernel) <= MAX_SUMS
    assert metal.launches[-1].threadgroup_bytes <= 4096


def stock_threadgroups(depth: int, columns: int) -> int:
    """MLX 0.32.4, one row: qmv has 8 columns a threadgroup, qmv_quad (K of 64 or 128) 64."""
    return math.ceil(columns / (64 if depth in (64, 128) else 8))


def test_no_fewer_threadgroups_than_stock_with_one_row() -> None:
    shapes = list(gemma_shapes())
    assert len(shapes) > 40 and (5376, 262144) in shapes and (704, 2816) in shapes
    for depth, columns in shapes:
        for body in BODIES:
            for rows in (1, 8):
                groups = math.prod(layout(rows, columns, body, usual_tile(rows, body))[1])
                assert groups >= stock_threadgroups(depth, columns), (depth, columns, body)


def test_tiles_and_sums_of_every_number_of_rows() -> None:
    for rows in range(1, 145):
        for body in BODIES:
            tile = usual_tile(rows, body)
            assert 1 <= tile <= MAX_TILE
            sizes, groups, _ = layout(rows, 2816, body, tile)
            assert groups[0] == math.ceil(rows / tile) == math.ceil(rows / (12 if body == "scalar" else 16))
            assert sizes.get("ROWS", 0) * sizes.get("COLUMNS", 0) <= MAX_SUMS


REFUSED = {
    "5-bit": (lambda: quantised(16, 64, seed=31, bits=5), mx.float32, "5 bits"),
    "stack": (
        lambda: QuantizedWeight(
            *(part[None] for part in quantised(16, 64, seed=31).arrays), 64, 4, "affine", mx.bfloat16
        ),
        mx.float32,
        r"\[N, K\]",
    ),
    "integer rows": (lambda: quantised(16, 64, seed=31), mx.int32, "rows of .*int32"),
    "half segments": (lambda: quantised(16, 48, seed=31, mode="nvfp4"), mx.float32, "multiple of 32.*48"),
    "few scales": (lambda: quantised(3, 128, seed=31), mx.float32, "fewer than 8"),
    "dense, mixed": (
        lambda: DenseWeight(random_rows(8, 64, seed=31)),
        mx.bfloat16,
        "bfloat16 with .*float32",
    ),
    "dense, half segments": (lambda: DenseWeight(random_rows(8, 48, seed=31)), mx.float32, "32, got 48"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_with_the_rule(name: str) -> None:
    """Without Metal: nothing is launched, and nothing else computes it instead."""
    make, dtype, rule = REFUSED[name]
    weight = make()
    module = verify_gemm if isinstance(weight, DenseWeight) else verify_qmm
    with pytest.raises(KernelError, match=rule):
        multiply(weight, mx.zeros((2, weight.shape[-1]), dtype))
    assert module.unsupported(weight, dtype) is not None


def test_rows_and_tiles_that_cannot_be_are_refused(metal: Runner) -> None:
    weight = WEIGHTS["4-bit, 64"]
    for x, tile, rule in (
        (mx.zeros((2, 640)), None, r"704 values, got \(2, 640\)"),
        (mx.zeros((0, 704)), None, "got 0 in tiles"),
        (mx.zeros((2, 704)), 17, "tiles of 17"),
    ):
        with pytest.raises(KernelError, match=rule):
            multiply(weight, x, tile=tile)
    assert not metal.launches


@pytest.mark.parametrize("name", ["4-bit, 64", "mxfp8", "float16"])
def test_reference_is_the_same_product(name: str) -> None:
    weight = WEIGHTS[name]
    x = random_rows(5, weight.shape[1], seed=32, dtype=dtype_of(weight))
    module = verify_gemm if isinstance(weight, DenseWeight) else verify_qmm
    assert_near(module.reference(weight, x), weight, x)
