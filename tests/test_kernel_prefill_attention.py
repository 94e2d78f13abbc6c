"""Attention of prefill chunks, run as Metal source: right, and with the bits of a verify pass, whatever the chunk."""

from itertools import pairwise

import mlx.core as mx
import pytest

from attention_cases import Heads, Past, assert_near, attended, cut, gemma_shapes, lowest, past, same_bits
from mlx_mtp.attention import attend_tiled
from mlx_mtp.errors import KernelError
from mlx_mtp.kernels.prefill_attention import prefill_attention, reference
from msl.stand_in import Runner

GEMMA = {name: cut(shape) for name, shape in gemma_shapes().items()}
SMALL = {
    "window": Heads(4, 2, 64, 40),
    "full": Heads(4, 2, 64, None),
    "three query heads": Heads(3, 1, 16, None),
    "sixteen query heads": Heads(16, 1, 16, 24),
}


def chunk(known: Past, low: int, high: int, *, spare: int = 0, compute=prefill_attention) -> mx.array:  # type: ignore[no-untyped-def]
    """Rows low .. high - 1 as one chunk, over the keys that prefill hands over and `spare` rows of NaN behind them."""
    first = lowest(known.shape, low)
    keys, values = (
        mx.pad(x[:, :, first:high], [(0, 0), (0, 0), (0, spare), (0, 0)], constant_values=mx.nan)
        for x in (known.keys, known.values)
    )
    queries = known.queries[:, low:high].transpose(0, 2, 1, 3)
    return compute(queries, keys, values, low, first, known.shape.window)


@pytest.mark.parametrize("name", SMALL)
def test_near_float64(metal: Runner, name: str) -> None:
    known = past(SMALL[name], 300, seed=1, dtype=mx.float32)
    for low, high in ((0, 1), (0, 37), (250, 300)):
        with metal.run(check=high == 300):
            assert_near(chunk(known, low, high), known, [low], high - low)


@pytest.mark.parametrize("name", ["12b full", "31b sliding"])
def test_near_float64_for_gemma(metal: Runner, name: str) -> None:
    known = past(GEMMA[name], 290, seed=2)
    assert_near(chunk(known, 270, 275), known, [270], 5)


def test_reference_and_stock_operations_are_the_same_in_plain_mlx() -> None:
    for shape in SMALL.values():
        known = past(shape, 120, seed=3, dtype=mx.float32)
        for low in (0, 90):
            assert_near(chunk(known, low, 120, compute=reference), known, [low], 120 - low)
            assert_near(chunk(known, low, 120, compute=attend_tiled), known, [low], 120 - low)


@pytest.mark.parametrize("name", SMALL)
def test_bits_are_those_of_a_verify_pass(metal: Runner, name: str) -> None:
    """Whatever comes first, a chunk or rounds: what follows sees the same numbers."""
    known = past(SMALL[name], 541, seed=4)
    for low, high in ((0, 20), (510, 541)):
        rows = [attended(known, [at], min(4, high - at)) for at in range(low, high, 4)]
        assert same_bits(chunk(known, low, high), mx.concatenate(rows)), (low, high)


def test_bits_are_those_of_a_verify_pass_in_gemma(metal: Runner) -> None:
    for name in ("e2b full", "31b sliding"):
        known = past(GEMMA[name], 271, seed=5)
        assert same_bits(chunk(known, 254, 262), attended(known, [254], 8)), name


@pytest.mark.parametrize("name", SMALL)
def test_bits_do_not_depend_on_the_chunk(metal: Runner, name: str) -> None:
    known = past(SMALL[name], 90, seed=6)
    whole = chunk(known, 0, 90)
    for cuts in ([0, 1, 90], [0, 7, 8, 41, 90], [0, 64, 90]):
        parts = [chunk(known, low, high, spare=5) for low, high in pairwise(cuts)]
        assert same_bits(mx.concatenate(parts), whole), cuts


def test_bits_do_not_depend_on_the_order_threads_run_in(metal: Runner) -> None:
    for name in ("window", "full"):
        known = past(SMALL[name], 60, seed=7)
        expected = chunk(known, 40, 60)
        for order, seed in (("reverse", 0), ("random", 0), ("random", 1)):
            with metal.run(order=order, seed=seed, check=True):
                assert same_bits(chunk(known, 40, 60), expected), (name, order, seed)


def test_keys_further_on_that_are_no_numbers_spoil_nothing(metal: Runner) -> None:
    for name in ("window", "full"):
        known = past(SMALL[name], 60, seed=8)
        expected = chunk(known, 41, 60)
        known.values[:, :, 50:] = mx.nan
        out = chunk(known, 41, 60)
        assert same_bits(out[:9], expected[:9])
        assert bool(mx.isnan(out[9:]).all())


def test_source_is_clean_and_sums_are_few(metal: Runner) -> None:
    known = past(Heads(8, 1, 512, None), 20, seed=9)
    chunk(known, 0, 20)
    (done,) = metal.launches
    assert done.threads // done.threadgroups == 512
    assert done.threadgroup_bytes <= 32768
    assert metal.lint(done.kernel) == []
    assert metal.accumulators(done.kernel) <= 24


def test_calls_that_do_not_fit_are_refused() -> None:
    queries, keys = mx.zeros((1, 4, 3, 64)), mx.zeros((1, 2, 50, 64))
    cases = [
        (queries, keys, keys, 48, 0, None, "from position 0 to 50, got 50 from 0 on"),
        (queries, keys, keys, 20, 5, 17, "from position 4 to 22, got 50 from 5 on"),
        (queries, keys, keys[:, :, :9], 0, 0, None, "one row of K/V"),
        (mx.zeros((2, 4, 3, 64)), keys, keys, 0, 0, None, "one row of K/V"),
        (queries, keys, keys.astype(mx.float16), 0, 0, None, "float16"),
        (mx.zeros((1, 4, 3, 96)), keys, keys, 0, 0, None, "a head of 96"),
    ]
    for *given, reason in cases:
        with pytest.raises(KernelError, match=reason):
            prefill_attention(*given)
