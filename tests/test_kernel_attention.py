"""Attention over the buffers in place, run as Metal source: right, and a row's bits independent of its company.

The full sweeps are in test_kernel_attention_sweep.py, the faults that these checks see in
test_kernel_attention_mutants.py; prefill chunks in test_kernel_prefill_attention.py.
"""

import mlx.core as mx
import numpy as np
import pytest

from attention_cases import (
    Heads,
    assert_near,
    attended,
    buffers,
    cut,
    gemma_shapes,
    past,
    same_bits,
    sight,
    usual_rows,
)
from mlx_mtp.attention import attend, fold_mask
from mlx_mtp.errors import KernelError
from mlx_mtp.kernels.operations import AttentionShape
from mlx_mtp.kernels.verify_attention import (
    leaf_pieces,
    reference,
    slice_width,
    unsupported,
    verify_attention,
)
from mlx_mtp.verify import positions_in_ring
from msl.stand_in import Runner

GEMMA = {name: cut(shape) for name, shape in gemma_shapes().items()}
SMALL = {
    "ring": Heads(4, 2, 64, 40),
    "full": Heads(4, 2, 64, None),
}


@pytest.mark.parametrize("name", GEMMA)
def test_near_float64_for_every_layer_of_gemma(metal: Runner, name: str) -> None:
    """Two members at different positions, one of them near the beginning; NaN wherever no row looks."""
    known = past(GEMMA[name], 310, seed=1, batch=2)
    assert_near(attended(known, [300, 5], 7), known, [300, 5], 7)


@pytest.mark.parametrize(("dim", "dtype"), [(16, mx.float32), (32, mx.float16), (128, mx.float32)])
def test_near_float64_for_small_heads(metal: Runner, dim: int, dtype: mx.Dtype) -> None:
    for window in (None, 24):
        known = past(Heads(6, 2, dim, window), 290, seed=2, dtype=dtype)
        assert_near(attended(known, [270], 3), known, [270], 3)


def test_a_pair_of_heads_and_a_single_key(metal: Runner) -> None:
    """The fewest numbers that a launch can hand to the next: a peak and a total a head."""
    for window in (None, 24):
        for heads in (1, 2, 3):
            known = past(Heads(heads, 1, 16, window), 1, seed=19, dtype=mx.float32)
            assert_near(attended(known, [0], 1), known, [0], 1)


def test_reference_is_the_same_in_plain_mlx() -> None:
    for shape in (*SMALL.values(), GEMMA["e2b full"], GEMMA["e2b sliding"]):
        known = past(shape, 310, seed=3, batch=2, dtype=mx.float32)
        first, held = [280, 7], usual_rows(shape, 290)
        keys, values = buffers(known, first, 4, held)
        queries = mx.stack([known.queries[b, at : at + 4] for b, at in enumerate(first)])
        out = reference(queries.transpose(0, 2, 1, 3), keys, values, sight(shape, first, held))
        assert_near(out, known, first, 4)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("keys", [1, 2, 15, 16, 17, 32, 33, 255, 256, 257, 512, 513, 530])
def test_any_number_of_keys(metal: Runner, name: str, keys: int) -> None:
    """From one key to more than two partitions; the last row sees `keys` of them."""
    rows = min(keys, 2)
    known = past(SMALL[name], keys, seed=4)
    assert_near(attended(known, [keys - rows], rows), known, [keys - rows], rows)


@pytest.mark.parametrize("name", SMALL)
def test_bits_do_not_depend_on_how_many_rows_there_are(metal: Runner, name: str) -> None:
    """M rows at once equal M single steps, each of which finds only the keys up to its own in the buffers."""
    known = past(SMALL[name], 290, seed=5)
    single = mx.concatenate([attended(known, [at], 1) for at in range(250, 267)])
    for rows in (2, 3, 4, 5, 6, 7, 8, 9, 16, 17):
        assert same_bits(attended(known, [250], rows), single[:rows]), rows


@pytest.mark.parametrize("name", ["e2b full", "12b full", "31b sliding", "e2b sliding"])
def test_bits_do_not_depend_on_how_many_rows_there_are_in_gemma(metal: Runner, name: str) -> None:
    """12B has 16 query heads a K/V head: 9 rows are two chunks."""
    known = past(GEMMA[name], 300, seed=6)
    rows = 9 if name == "12b full" else 8
    single = mx.concatenate([attended(known, [at], 1) for at in range(251, 251 + rows)])
    for some in (5, rows):
        assert same_bits(attended(known, [251], some), single[:some]), some


@pytest.mark.parametrize("name", SMALL)
def test_bits_do_not_depend_on_the_batch(metal: Runner, name: str) -> None:
    """Ragged members, in any order, each as if it were alone; an inactive one (at its old position) disturbs nobody."""
    known = past(SMALL[name], 540, seed=7, batch=4)
    first = [520, 0, 77, 256]
    alone = [attended(known.at(b), [at], 3) for b, at in enumerate(first)]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 2, 0, 1]):
        out = attended(known.at(*order), [first[b] for b in order], 3)
        assert same_bits(out, mx.concatenate([alone[b] for b in order])), order


def test_bits_do_not_depend_on_bucket_or_capacity(metal: Runner) -> None:
    known = past(SMALL["full"], 300, seed=8)
    expected = attended(known, [280], 4)
    for bucket, held in ((512, 512), (512, 1024), (2048, 2048), (284, 300)):
        assert same_bits(attended(known, [280], 4, bucket=bucket, held=held), expected), (bucket, held)


@pytest.mark.parametrize("name", ["e2b full", "e4b drafter full", "12b full"])
def test_bits_do_not_depend_on_how_work_is_shared_out(metal: Runner, name: str) -> None:
    """Longer buckets have fewer threadgroups a leaf and wider slices, 4,096 rows whole leaves and the widest."""
    known = past(GEMMA[name], 270, seed=20)
    expected = attended(known, [257], 3, bucket=4096)
    shared = set()
    for bucket in (512, 1024, 2048, 4096):
        for rows in (1, 2, 3):
            assert same_bits(attended(known, [257], rows, bucket=bucket), expected[:rows]), (bucket, rows)
            shared.add((leaf_pieces(512, bucket // 256, rows), slice_width(512, bucket // 256, rows)))
    assert {(4, 8), (2, 16), (1, 32), (1, 64)} <= shared


def test_bits_do_not_depend_on_the_phase_of_the_ring(metal: Runner) -> None:
    """The same positions in rings of 60 sizes: in each the window begins in another slot."""
    known = past(SMALL["ring"], 300, seed=9)
    expected = attended(known, [280], 4)
    phases = set()
    for held in range(43, 103):
        phases.add((280 - 39) % held)
        assert same_bits(attended(known, [280], 4, held=held), expected), held
    assert len(phases) > 40


def test_ring_at_every_phase(metal: Runner) -> None:
    """Every position for over two rounds of the ring, from the very first on."""
    shape = Heads(2, 1, 16, 24)
    known = past(shape, 130, seed=10, dtype=mx.float32)
    for first in range(126):
        assert_near(attended(known, [first], 3), known, [first], 3)


@pytest.mark.parametrize("name", SMALL)
def test_bits_do_not_depend_on_the_order_threads_run_in(metal: Runner, name: str) -> None:
    known = past(SMALL[name], 290, seed=11, batch=2)
    expected = attended(known, [270, 30], 3)
    orders = [("forward", 0), ("reverse", 0), *(("random", seed) for seed in range(4))]
    for order, seed in orders:
        with metal.run(order=order, seed=seed, check=True):
            assert same_bits(attended(known, [270, 30], 3), expected), (order, seed)


@pytest.mark.parametrize("name", SMALL)
def test_draft_that_is_no_number_spoils_no_row_before_it(metal: Runner, name: str) -> None:
    """Rows 2 and 3 have K and V of NaN: rows 0 and 1 keep their bits, the others show it."""
    known = past(SMALL[name], 290, seed=12)
    first = [265]
    expected = attended(known, first, 4)
    keys, values = buffers(known, first, 4, usual_rows(SMALL[name], 269))
    slots = mx.array([267, 268]) % (keys.shape[2] if name == "ring" else 10_000)
    for spoilt in ((keys, values), (values, keys)):
        spoilt[0][:, :, slots] = mx.nan
        queries = known.queries[:, 265:269].transpose(0, 2, 1, 3)
        out = verify_attention(queries, keys, values, sight(SMALL[name], first, 269))
        assert same_bits(out[:2], expected[:2])
        assert bool(mx.isnan(out[2:]).all())


@pytest.mark.parametrize("name", ["e4b drafter sliding", "e4b drafter full"])
def test_drafter_sees_committed_rows_only(metal: Runner, name: str) -> None:
    """Its row asks at position `length` and sees the rows below it; those of rejected drafts lie behind, as NaN."""
    shape = GEMMA[name]
    known = past(shape, 300, seed=13, batch=2)
    lengths = [281, 64]
    ends = [length - 1 for length in lengths]
    keys, values = buffers(known, ends, 1, usual_rows(shape, 281))
    queries = mx.stack([known.queries[b, length : length + 1] for b, length in enumerate(lengths)])
    out = verify_attention(queries.transpose(0, 2, 1, 3), keys, values, sight(shape, ends, 281))
    for b, end in enumerate(ends):
        known.queries[b, end] = known.queries[b, lengths[b]]
    assert_near(out, known, ends, 1)


@pytest.mark.parametrize("name", SMALL)
def test_row_that_sees_nothing_is_zero(metal: Runner, name: str) -> None:
    """A drafter's row at length 0 would be one."""
    known = past(SMALL[name], 20, seed=14, batch=2)
    keys, values = buffers(known, [10, 10], 1, usual_rows(SMALL[name], 20))
    queries = known.queries[:, 10:11].transpose(0, 2, 1, 3)
    out = verify_attention(queries, keys, values, sight(SMALL[name], [-1, 10], 20))
    assert bool((out[0] == 0).all())
    assert same_bits(out[1:], attended(known.at(1), [10], 1))


@pytest.mark.parametrize("name", ["e2b full", "e2b sliding", "31b sliding", "12b full"])
def test_keys_and_values_are_read_once_however_many_rows(metal: Runner, name: str) -> None:
    """Exactly the rows that some query sees, once for all of them, and none behind or below."""
    shape = GEMMA[name]
    known = past(shape, 300, seed=15, batch=2)
    metal.settings(count=True)
    for rows in (1, 8):
        metal.reset()
        first = [90, 7]
        attended(known, first, rows, bucket=512)
        seen = sum(min(at + 1, shape.window or at + 1) + rows - 1 for at in first)
        for kind in ("keys", "values"):
            read = [launch.counts.read[kind] for launch in metal.launches if kind in launch.counts.read]
            assert sum(one.requested for one in read) == seen * shape.kv_heads * shape.dim * 2, (kind, rows)


@pytest.mark.parametrize("name", ["12b full", "e2b sliding"])
def test_source_is_clean_and_sums_are_few(metal: Runner, name: str) -> None:
    known = past(GEMMA[name], 60, seed=16)
    for rows in (1, 8):
        metal.reset()
        attended(known, [40], rows)
        assert len(metal.launches) == (3 if GEMMA[name].window is None else 2)
        for launch in metal.launches:
            assert launch.threads // launch.threadgroups <= 512
            assert launch.threadgroup_bytes <= 32768
            assert metal.lint(launch.kernel) == []
            assert metal.accumulators(launch.kernel) <= 24


def test_nothing_is_copied_before_a_launch() -> None:
    """Queries are a transposed view of what is contiguous, as a pass makes them: turned back, they need no copy."""
    known = past(SMALL["full"], 60, seed=17, batch=2)
    rows = mx.contiguous(known.queries[:, 40:43])
    back = rows.transpose(0, 2, 1, 3).transpose(0, 2, 1, 3)
    mx.eval(back)
    there, here = (np.array(x.view(mx.uint16), copy=False) for x in (rows, back))
    assert here.flags.c_contiguous
    assert here.ctypes.data == there.ctypes.data


def test_same_as_stock_operations(metal: Runner) -> None:
    """attention.attend on the same buffers (stale numbers in the rows not seen), float32."""
    for name, shape in SMALL.items():
        known = past(shape, 290, seed=18, batch=2, dtype=mx.float32)
        first, rows = [270, 12], 4
        keys, values = (mx.nan_to_num(x) for x in buffers(known, first, rows, usual_rows(shape, 274)))
        query = (mx.array(first)[:, None] + mx.arange(rows))[..., None]
        held = mx.arange(keys.shape[2])[None, None]
        if name == "ring":
            held = positions_in_ring(query[:, -1], keys.shape[2])[:, None]
        visible = (held <= query) & (held >= 0)
        if shape.window is not None:
            visible = visible & (held > query - shape.window)
        seen = sight(shape, first, 512)._replace(mask=fold_mask(visible, shape.heads, shape.kv_heads))
        queries = mx.stack([known.queries[b, at : at + rows] for b, at in enumerate(first)])
        queries = queries.transpose(0, 2, 1, 3)
        assert mx.allclose(
            verify_attention(queries, keys, values, seen), attend(queries, keys, values, seen), atol=1e-5
        )


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (AttentionShape(8, 1, 96, None, mx.bfloat16), "a head of 96"),
        (AttentionShape(8, 3, 64, None, mx.bfloat16), "no multiple of 3"),
        (AttentionShape(256, 1, 64, None, mx.bfloat16), "256 query heads"),
        (AttentionShape(8, 1, 64, 512, mx.int32), "int32"),
    ],
)
def test_what_has_no_kernel_is_named(shape: AttentionShape, reason: str) -> None:
    assert reason in (unsupported(shape) or "")


def test_calls_that_do_not_fit_are_refused() -> None:
    """Nothing is launched: there is no runner here, and no Metal."""
    queries = mx.zeros((1, 4, 3, 64))
    ring, full = mx.zeros((1, 2, 41, 64)), mx.zeros((1, 2, 256, 64))
    cases = [
        (
            queries,
            ring,
            ring,
            sight(SMALL["ring"], [5], 0),
            "at least 42 rows for a window of 40 and 3 rows, got 41",
        ),
        (queries, full, full, sight(SMALL["full"], [5], 257), "at least 257 rows, got 256"),
        (queries, full, ring, sight(SMALL["full"], [5], 41), "K/V must be"),
        (queries, full, full.astype(mx.float16), sight(SMALL["full"], [5], 41), "float16"),
        (queries, full, full, sight(SMALL["full"], [5, 6], 41), "one int32 for each of 1 rows"),
        (mx.zeros((1, 4, 3, 96)), full, full, sight(SMALL["full"], [5], 41), "a head of 96"),
    ]
    for *arrays, seen, reason in cases:
        with pytest.raises(KernelError, match=reason):
            verify_attention(*arrays, seen)
