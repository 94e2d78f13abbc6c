"""Attention over every layer of Gemma, every number of rows, keys and phases; minutes, hence slow."""

import mlx.core as mx
import pytest

from attention_cases import (
    Heads,
    assert_near,
    attended,
    cut,
    gemma_shapes,
    lowest,
    past,
    same_bits,
)
from mlx_mtp.kernels.prefill_attention import prefill_attention
from msl.stand_in import Runner

pytestmark = pytest.mark.slow
GEMMA = gemma_shapes()
ROWS = (*range(1, 10), 16, 17)
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


@pytest.mark.parametrize("name", GEMMA)
def test_every_layer_of_gemma_with_all_its_heads(metal: Runner, name: str) -> None:
    """The real window, wrapped, and more than two partitions; one member near the beginning."""
    known = past(GEMMA[name], 1130 if GEMMA[name].window else 540, seed=1, batch=2)
    first = [1100, 9] if GEMMA[name].window else [513, 9]
    single = [attended(known, [at + row for at in first], 1) for row in range(17)]
    for rows in ROWS:
        out = attended(known, first, rows)
        if rows in (1, 4, 17):
            assert_near(out, known, first, rows)
        expected = mx.stack(single[:rows], axis=1).reshape(2 * rows, -1)
        assert same_bits(out, expected), rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
def test_every_head_size_type_and_group(metal: Runner, group: int, dim: int, dtype: mx.Dtype) -> None:
    metal.settings(check=True)
    for window in (None, 33):
        known = past(Heads(2 * group, 2, dim, window), 280, seed=2, batch=2, dtype=dtype)
        assert_near(attended(known, [270, 2], 5), known, [270, 2], 5)


@pytest.mark.parametrize("window", [None, 40])
def test_every_number_of_keys(metal: Runner, window: int | None) -> None:
    """The last of up to three rows sees 1 to 530 keys, as it would alone."""
    known = past(Heads(2, 1, 32, window), 530, seed=3)
    for keys in range(1, 531):
        rows = min(keys, 3)
        out = attended(known, [keys - rows], rows)
        assert_near(out[-1:], known, [keys - 1], 1)
        assert same_bits(out[-1:], attended(known, [keys - 1], 1)), keys


@pytest.mark.parametrize("window", [512, 1024])
def test_real_rings_at_every_phase(metal: Runner, window: int) -> None:
    known = past(Heads(2, 1, 16, window), 2 * window + 80, seed=4)
    for first in range(window - 40, 2 * window + 72, 1 if window == 512 else 3):
        assert_near(attended(known, [first], 4), known, [first], 4)


@pytest.mark.parametrize("name", GEMMA)
def test_every_order_of_threads(metal: Runner, name: str) -> None:
    shape = cut(GEMMA[name])
    known = past(shape, 280, seed=5, batch=2)
    expected = attended(known, [262, 4], 5)
    for order, seed in (("forward", 0), ("reverse", 0), *(("random", seed) for seed in range(5))):
        with metal.run(order=order, seed=seed, check=True):
            assert same_bits(attended(known, [262, 4], 5), expected), (order, seed)


@pytest.mark.parametrize("name", GEMMA)
def test_chunks_of_every_layer_are_a_verify_pass(metal: Runner, name: str) -> None:
    shape = cut(GEMMA[name], window=512)
    known = past(shape, 640, seed=6)
    low, high = 500, 612
    first = lowest(shape, low)
    out = prefill_attention(
        known.queries[:, low:high].transpose(0, 2, 1, 3),
        known.keys[:, :, first:high],
        known.values[:, :, first:high],
        low,
        first,
        shape.window,
    )
    passes = [attended(known, [at], 8) for at in range(low, high, 8)]
    assert same_bits(out, mx.concatenate(passes))
