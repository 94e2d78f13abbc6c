"""The MoE block at 26B-A4B's real widths, fewer experts: every format and type, 1 to 72 rows bit by bit."""

import mlx.core as mx
import numpy as np
import pytest

from expert_cases import (
    check_combined,
    check_pairs,
    check_scores,
    make_experts,
    mix,
    routings,
    rows_alone,
    rows_for,
)
from mlx_mtp.kernels.verify_experts import LONG
from msl.stand_in import Runner
from qmm_cases import same_bits
from test_kernel_experts import ROWS, assert_read_once, pairs_of

pytestmark = pytest.mark.slow
FORMATS = [(4, 32), (4, 64), (4, 128), (8, 32), (8, 64), (8, 128), (None, 0)]
TYPES = [mx.bfloat16, mx.float16, mx.float32]
WIDTHS = [(2816, 704), (2816, 640), (704, 2816)]  # 704 is no number of whole groups of 128
ORDERS = [("forward", 0), ("reverse", 0), *(("random", seed) for seed in range(10))]


def fits(hidden: int, width: int, group: int) -> bool:
    return not group or not (hidden % group or width % group)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_stages_near_float64(metal: Runner, bits: int | None, group: int, dtype: mx.Dtype) -> None:
    for hidden, width in WIDTHS:
        if fits(hidden, width, group):
            layer = make_experts(12, 8, hidden, width, bits=bits, group=group, dtype=dtype, seed=1)
            rows = rows_for(layer, 4)
            check_scores(layer, rows)
            check_combined(layer, 4, dtype)
            check_pairs(layer, rows, routings(4, 12, 8)["any"])


@pytest.mark.parametrize(
    ("bits", "group", "dtype"), [(4, 64, mx.bfloat16), (8, 64, mx.float16), (None, 0, mx.bfloat16)]
)
def test_bits_do_not_depend_on_rows_or_place(
    metal: Runner, bits: int | None, group: int, dtype: mx.Dtype
) -> None:
    layer = make_experts(16, 8, 2816, 704, bits=bits, group=group or 64, dtype=dtype, seed=2)
    x = rows_for(layer, max(ROWS))
    expected = rows_alone(lambda row: mix(layer, row), x)
    for rows in ROWS:
        assert same_bits(mix(layer, x[:rows]), expected[:rows]), rows
    places = mx.random.permutation(max(ROWS), key=mx.random.key(3))
    assert same_bits(mix(layer, x[places]), expected[places])


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32), (None, 0)])
def test_adversarial_routings(metal: Runner, bits: int | None, group: int) -> None:
    layer = make_experts(16, 8, 704, 320, bits=bits, group=group or 32, dtype=mx.bfloat16, seed=4)
    x, every = rows_for(layer, max(ROWS)), np.arange(16)[None]
    alone = mx.stack([pairs_of(layer, x[row : row + 1], every) for row in range(max(ROWS))])
    for rows in (1, 5, 7, 13, 25, 72):
        for name, ids in routings(rows, 16, 8).items():
            metal.reset()
            expected = alone[mx.arange(rows)[:, None], mx.array(ids)].reshape(rows * 8, -1)
            with metal.run(count=name.startswith("the")):
                assert same_bits(pairs_of(layer, x[:rows], ids), expected), (rows, name)
            # Without long runs kept, an expert repeated within a row, as the router never has it, is read again.
            if name.startswith("the same") or (name.startswith("the") and rows > LONG):
                for kernel, matrix in (("gate_up", "gate"), ("gate_up", "up"), ("down", "down")):
                    assert_read_once(metal, kernel, matrix, getattr(layer, matrix), len(np.unique(ids)))


@pytest.mark.parametrize("bits", [4, 8, None])
def test_orders_and_checker(metal: Runner, bits: int | None) -> None:
    layer = make_experts(16, 4, 704, 320, bits=bits, group=64, dtype=mx.bfloat16, seed=5)
    for rows in (1, 5, 9, 40):
        x = rows_for(layer, rows)
        expected = mix(layer, x)
        for order, seed in ORDERS:
            with metal.run(order=order, seed=seed, check=True):
                assert same_bits(mix(layer, x), expected), (rows, order, seed)
