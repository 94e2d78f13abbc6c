"""The stand-in for `mx.fast.metal_kernel`: calls, settings, what is counted, and that schedules change nothing."""

import mlx.core as mx
import numpy as np
import pytest

from metal_snippets import snippet
from msl import Runner, kernel_maker, metal_kernel
from msl.fixture import STAND_IN, active

I = "uint i = thread_position_in_grid.x;\n"  # noqa: E741
ROW_SUMS = """
    uint row = threadgroup_position_in_grid.x;
    float sum = 0;
    for (uint k = thread_index_in_simdgroup; k < K; k += 32) sum += x[k] * w[row * K + k];
    sum = simd_sum(sum);
    if (thread_index_in_simdgroup == 0) y[row] = sum;
"""


def row_sums(rows: int = 6, depth: int = 96, name: str = "row_sums") -> tuple[mx.array, mx.array, mx.array]:
    x, w = (
        mx.random.normal((depth,), key=mx.random.key(1)),
        mx.random.normal((rows, depth), key=mx.random.key(2)),
    )
    (y,) = snippet(
        ROW_SUMS,
        {"x": x, "w": w},
        {"y": ((rows,), mx.float32)},
        32 * rows,
        32,
        template=[("K", depth)],
        name=name,
    )
    return x, w, y


def test_bytes_are_counted_for_each_buffer(metal):
    metal.settings(count=True)
    x, w, y = row_sums()
    np.testing.assert_allclose(np.array(y), np.array(w @ x), rtol=1e-5)
    counts = metal.counts["row_sums"]
    weights, row = counts.read["w"], counts.read["x"]
    assert weights.requested == weights.by_threadgroup == weights.distinct == w.nbytes  # read once
    assert (row.requested, row.by_threadgroup, row.distinct) == (6 * x.nbytes, 6 * x.nbytes, x.nbytes)
    assert counts.written["y"].distinct == counts.written["y"].requested == y.nbytes
    assert counts.read["y"].requested == counts.written["w"].requested == 0
    assert (counts.launches, counts.threadgroups, counts.threads, counts.simd_ops) == (1, 6, 192, 6)


def test_a_byte_read_by_all_lanes_is_asked_for_32_times(metal):
    metal.settings(count=True)
    snippet(I + "y[i] = x[0];", {"x": mx.ones((8,))}, {"y": ((64,), mx.float32)}, 64, 32)
    read = metal.counts["snippet"].read["x"]
    assert (read.requested, read.by_threadgroup, read.distinct) == (64 * 4, 2 * 4, 4)


def test_bytes_nobody_counted_are_an_error(metal):
    row_sums()
    with pytest.raises(LookupError, match="w were not counted"):
        metal.counts["row_sums"].read["w"]
    metal.settings(count=True)
    row_sums()
    with pytest.raises(LookupError):  # one launch of the two was counted: no sum
        metal.counts["row_sums"].read["w"]
    assert metal.launches[-1].counts.read["w"].distinct == 6 * 96 * 4
    assert metal.counts["row_sums"].launches == 2 and metal.counts["row_sums"].simd_ops == 12


def test_barriers_count_once_a_threadgroup(metal):
    body = I + "for (int k = 0; k < 3; k++) threadgroup_barrier(mem_flags::mem_threadgroup);\ny[i] = 0;"
    snippet(body, {}, {"y": ((256,), mx.float32)}, 256, 64)
    assert metal.counts["snippet"].barriers == 4 * 3 and metal.counts["snippet"].simd_ops == 0


def test_settings_hold_for_the_test_and_run_for_its_block(metal):
    metal.settings(order="reverse", seed=4)
    with metal.run(check=True, order="random"):
        row_sums()
        inside = metal.launches[-1].settings
    row_sums()
    outside = metal.launches[-1].settings
    assert (inside.order, inside.seed, inside.check) == ("random", 4, True)
    assert (outside.order, outside.seed, outside.check) == ("reverse", 4, False)
    metal.reset()
    assert metal.launches == [] and metal.counts == {}
    with pytest.raises(ValueError, match="order is one of"):
        metal.settings(order="backwards")
    with pytest.raises(TypeError):
        metal.settings(orders="random")


ORDER_SEEN = """
    uint i = thread_position_in_grid.x;
    y[i] = atomic_fetch_add_explicit((device atomic_uint*)turn, 1u, memory_order_relaxed);
"""


def turns(group: int = 32) -> list[int]:
    """At which turn each of 128 threads came to its atomic."""
    outputs = {"y": ((128,), mx.uint32), "turn": ((8,), mx.uint32)}
    y, _ = snippet(ORDER_SEEN, {}, outputs, 128, group, init_value=0)
    return np.array(y).tolist()


def test_orders(metal):
    assert turns() == list(range(128))
    metal.settings(order="reverse")
    assert turns() == list(range(128))[::-1]
    seen = []
    for seed in (1, 2, 1):
        metal.settings(order="random", seed=seed)
        seen.append(turns())
        assert sorted(seen[-1]) == list(range(128)) and seen[-1] != list(range(128))
        assert turns(group=128) != list(range(128))  # threads are shuffled as well as threadgroups
    assert seen[0] == seen[2] != seen[1]


def test_one_worker_or_two_give_the_same_bits(metal):
    seen = []
    for workers in (1, 2):
        for order in ("forward", "random"):
            metal.settings(workers=workers, order=order, seed=7)
            seen.append(row_sums(rows=200)[2])
    assert all(mx.array_equal(y, seen[0]) for y in seen)


def test_inputs_that_are_not_evaluated_strided_or_numbers(metal):
    lazy = (mx.arange(24.0).reshape(4, 6) * 2).T
    (y,) = snippet(I + "y[i] = x[i] * s;", {"x": lazy, "s": 3}, {"y": ((6, 4), mx.float32)}, 24)
    assert mx.array_equal(y, lazy * 3)
    body = I + "y[i] = x[elem_to_loc(i, x_shape, x_strides, x_ndim)];"
    metal.settings(check=True)
    for x in (lazy, lazy[::2, 1:], mx.broadcast_to(mx.array([1.0, 2.0]), (4, 2))):
        out = {"y": (x.shape, mx.float32)}
        (y,) = snippet(body, {"x": x}, out, x.size, ensure_row_contiguous=False)
        assert mx.array_equal(y, x)


def test_a_slice_is_read_where_it_lies(metal):
    """Its start is as aligned as on Metal, wherever MLX keeps it on a CPU."""
    whole = mx.arange(64.0)
    body = I + "float4 v = ((const device float4*)x)[i]; y[i] = v.x + v.y + v.z + v.w;"
    for check in (False, True):
        metal.settings(check=check)
        (y,) = snippet(body, {"x": whole[4:36]}, {"y": ((8,), mx.float32)}, 8)
        assert mx.array_equal(y, whole[4:36].reshape(8, 4).sum(1))


@pytest.mark.parametrize(
    "dtype", [mx.float32, mx.float16, mx.bfloat16, mx.int8, mx.uint64, mx.bool_], ids=str
)
def test_outputs_start_as_told(dtype, metal):
    outputs = {"y": ((2, 5), dtype), "z": ((8,), dtype)}
    y, z = snippet("z[0] = y[0];", {}, outputs, 1, init_value=1)
    assert y.dtype == dtype and mx.array_equal(y, mx.ones((2, 5), dtype=dtype))
    assert mx.array_equal(z, mx.ones((8,), dtype=dtype))


def test_outputs_nobody_writes_are_not_zero(metal):
    (y,) = snippet(I + "if (i == 0) y[i] = 0;", {}, {"y": ((8,), mx.float32)}, 8)
    assert y[0].item() == 0 and mx.all(mx.isnan(y[1:]))


def test_template_arguments_make_variants(metal):
    for dtype, n, flag in ((mx.float16, 3, True), (mx.float32, -3, False), (mx.float16, 3, True)):
        body = I + "y[i] = FLAG ? T(N) : T(0.1f);"
        template = [("T", dtype), ("N", n), ("FLAG", flag)]
        (y,) = snippet(body, {}, {"y": ((8,), dtype)}, 8, template=template)
        assert mx.array_equal(y, mx.full((8,), n if flag else 0.1, dtype))
    assert "template <typename T, int N, bool FLAG>" in metal.source("snippet")


def test_compiled_functions_see_values(metal):
    double = mx.compile(
        lambda x: snippet(I + "y[i] = 2 * x[i];", {"x": x}, {"y": (x.shape, x.dtype)}, x.size)[0] + 1
    )
    assert mx.array_equal(double(mx.arange(9.0)), mx.arange(9.0) * 2 + 1)


def test_wrong_numbers_of_arguments_are_refused_as_by_mlx(metal):
    kernel = mx.fast.metal_kernel(name="k", input_names=["x"], output_names=["y"], source="y[0] = x[0];")
    size = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1)}
    with pytest.raises(ValueError, match=r"Expected `inputs` to have size 1 but got size 0"):
        kernel(inputs=[], output_shapes=[(1,)], output_dtypes=[mx.float32], **size)
    with pytest.raises(ValueError, match=r"Expected `output_shapes` to have size 1 but got size 2"):
        kernel(inputs=[mx.zeros(9)], output_shapes=[(1,), (1,)], output_dtypes=[mx.float32], **size)


def test_a_kernel_that_was_kept_works_only_under_the_fixture(compiler, monkeypatch):
    kernel = STAND_IN(name="k", input_names=[], output_names=["y"], source="y[0] = 1;")
    size = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1)}
    assert active == []
    with pytest.raises(RuntimeError, match="a test without that fixture"):
        kernel(inputs=[], output_shapes=[(1,)], output_dtypes=[mx.float32], **size)
    monkeypatch.setattr("msl.fixture.active", [Runner()])
    (y,) = kernel(inputs=[], output_shapes=[(1,)], output_dtypes=[mx.float32], **size)
    assert y.item() == 1


def test_without_the_fixture(compiler):
    kernel = metal_kernel(name="k", input_names=["x"], output_names=["y"], source=I + "y[i] = x[i] + 1;")
    (y,) = kernel(
        inputs=[np.arange(8, dtype=np.float32)],
        output_shapes=[(8,)],
        output_dtypes=[mx.float32],
        grid=(8, 1, 1),
        threadgroup=(8, 1, 1),
        check=True,
        order="random",
        seed=2,
    )
    assert y.tolist() == list(range(1, 9))


def test_runners_keep_records_of_their_own(compiler):
    first, second = Runner(count=True), Runner()
    for runner in (first, first, second):
        kernel = kernel_maker(lambda runner=runner: runner)(
            name="k", input_names=[], output_names=["y"], source="y[0] = 1;"
        )
        kernel(
            inputs=[], output_shapes=[(1,)], output_dtypes=[mx.float32], grid=(1, 1, 1), threadgroup=(1, 1, 1)
        )
    assert first.counts["k"].written["y"].requested == 8 and len(second.launches) == 1


def test_where_it_cannot_run_its_tests_are_left_out(pytester, monkeypatch):
    pytester.makepyfile("def test_with(metal): assert False\n\ndef test_without(): pass\n")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    result = pytester.runpytest_inprocess("-p", "msl.fixture", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, deselected=1)
    result.stdout.fnmatch_lines(["Metal source: not on this machine, its tests are left out"])
