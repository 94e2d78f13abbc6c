"""Metal's library as the runner has it, against numpy and against what Metal's specification says."""

import mlx.core as mx
import numpy as np
import pytest

from metal_snippets import snippet

LANES = np.arange(32)
FLOATS = {"float": mx.float32, "half": mx.float16, "bfloat": mx.bfloat16}
I = "uint i = thread_position_in_grid.x;\n"  # noqa: E741


def random(*shape: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def one(expression: str, x, dtype=mx.float32, threads: int | None = None) -> np.ndarray:
    """y[i] = expression, with v = x[i] and lane = i % 32."""
    x = mx.array(x)
    body = I + f"uint lane = thread_index_in_simdgroup; auto v = x[i]; y[i] = {expression};"
    threads = threads or x.size
    (y,) = snippet(body, {"x": x}, {"y": ((threads,), dtype)}, threads, 32)
    return np.array(y.astype(mx.float32) if dtype == mx.bfloat16 else y)


SIMD = {
    "simd_sum(v)": lambda x: np.full(32, x.sum()),
    "simd_max(v)": lambda x: np.full(32, x.max()),
    "simd_min(v)": lambda x: np.full(32, x.min()),
    "simd_product(v)": lambda x: np.full(32, x.prod()),
    "simd_prefix_inclusive_sum(v)": lambda x: x.cumsum(),
    "simd_prefix_exclusive_sum(v)": lambda x: x.cumsum() - x,
    "simd_shuffle(v, 31 - lane)": lambda x: x[::-1],
    "simd_shuffle_xor(v, 5)": lambda x: x[LANES ^ 5],
    "simd_shuffle_down(v, 3)": lambda x: x[np.where(LANES < 29, LANES + 3, LANES)],
    "simd_shuffle_up(v, 3)": lambda x: x[np.where(LANES > 2, LANES - 3, LANES)],
    "simd_shuffle_rotate_down(v, 3)": lambda x: x[(LANES + 3) % 32],
    "simd_shuffle_rotate_up(v, 3)": lambda x: x[(LANES - 3) % 32],
    "simd_shuffle_and_fill_down(v, -v, 4)": lambda x: np.where(
        LANES < 28, x[(LANES + 4) % 32], -x[(LANES + 4) % 32]
    ),
    "simd_broadcast(v, 7)": lambda x: np.full(32, x[7]),
    "simd_broadcast_first(v)": lambda x: np.full(32, x[0]),
    "float(simd_is_first())": lambda x: (LANES == 0) * 1.0,
    "float(popcount(uint(uint64_t(simd_ballot(v > 0)))))": lambda x: np.full(32, (x > 0).sum()),
    "float(uint(uint64_t(simd_ballot(lane < 3))))": lambda x: np.full(32, 7.0),
    "simd_any(v > 100) ? 1.0f : simd_all(v < 100) ? 2.0f : 3.0f": lambda x: np.full(32, 2.0),
    "quad_sum(v)": lambda x: x.reshape(8, 4).sum(1).repeat(4),
    "quad_max(v)": lambda x: x.reshape(8, 4).max(1).repeat(4),
    "quad_broadcast(v, 2)": lambda x: x.reshape(8, 4)[:, 2].repeat(4),
    "quad_shuffle_xor(v, 1)": lambda x: x[LANES ^ 1],
    "quad_shuffle_down(v, 1)": lambda x: x[np.where(LANES % 4 < 3, LANES + 1, LANES)],
}


@pytest.mark.parametrize("expression", SIMD)
def test_simdgroup_operations(expression, metal):
    x = random(32)
    for order in ("forward", "random"):
        metal.settings(order=order, seed=1)
        np.testing.assert_allclose(
            one(expression, x), SIMD[expression](x.astype(np.float64)), rtol=2e-6, atol=1e-6
        )


MATH = {
    "exp(v)": np.exp,
    "precise::exp(v)": np.exp,
    "fast::exp(v)": np.exp,
    "exp2(v)": np.exp2,
    "tanh(v)": np.tanh,
    "precise::tanh(v)": np.tanh,
    "log(abs(v))": lambda x: np.log(np.abs(x)),
    "rsqrt(abs(v))": lambda x: 1 / np.sqrt(np.abs(x)),
    "sin(v) * cos(v)": lambda x: np.sin(x) * np.cos(x),
    "pow(abs(v), 1.5f)": lambda x: np.abs(x) ** 1.5,
    "floor(v) + rint(v * 3)": lambda x: np.floor(x) + np.rint(x.astype(np.float32) * 3),
    "fma(v, v, 2.0f)": lambda x: x * x + 2,
    "clamp(v, -0.5f, 0.5f)": lambda x: np.clip(x, -0.5, 0.5),
    "select(v, 9.0f, v > 0)": lambda x: np.where(x > 0, 9, x),
    "max(v, NAN)": lambda x: x,
    "isnan(v / 0.0f * 0.0f) ? 1.0f : 0.0f": lambda x: np.ones_like(x),
    "float(clz(uint(abs(v) * 1000)))": lambda x: [
        32 - int(a).bit_length() for a in np.abs(x.astype(np.float32)) * 1000
    ],
    "float(extract_bits(0xABCDu, 4, 8))": lambda x: np.full_like(x, 0xBC),
}


@pytest.mark.parametrize("expression", MATH)
def test_functions(expression, metal):
    x = random(256)
    np.testing.assert_allclose(
        one(expression, x), MATH[expression](x.astype(np.float64)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", FLOATS)
def test_each_operation_rounds_to_its_own_type(name, metal):
    """As numpy does for float16: no product is kept longer than its type for the sum after it."""
    dtype = FLOATS[name]
    a, b = (mx.array(random(4096, seed=seed)).astype(dtype) for seed in (1, 2))
    (y,) = snippet(I + "y[i] = a[i] * b[i] + a[i];", {"a": a, "b": b}, {"y": ((4096,), dtype)}, 4096, 256)
    product = (a.astype(mx.float32) * b.astype(mx.float32)).astype(dtype)
    assert mx.array_equal(y, (product.astype(mx.float32) + a.astype(mx.float32)).astype(dtype))


@pytest.mark.parametrize("name", FLOATS)
def test_conversions_round_to_nearest_even(name, metal):
    """All 2^16 upper halves of a float, with lower halves at, below and above the tie."""
    bits = np.arange(65536, dtype=np.uint32)[:, None] << 16 | np.array([0, 0x7FFF, 0x8000, 0x8001], np.uint32)
    x = bits.view(np.float32).reshape(-1)
    x = x[~np.isnan(x)]
    (y,) = snippet(
        I + "y[i] = T(x[i]);",
        {"x": x},
        {"y": ((x.size,), FLOATS[name])},
        x.size,
        256,
        template=[("T", FLOATS[name])],
    )
    assert mx.array_equal(y, mx.array(x).astype(FLOATS[name]))


def test_bits_keep_their_places(metal):
    x = random(64)
    assert np.array_equal(one("as_type<uint>(v)", x, mx.uint32), x.view(np.uint32))
    assert np.array_equal(one("as_type<half2>(as_type<uint>(v)).y", x, mx.float16), x.view(np.float16)[1::2])
    upper = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert np.array_equal(one("float(as_type<bfloat>(ushort(as_type<uint>(v) >> 16)))", x), upper)


@pytest.mark.parametrize("name", FLOATS)
def test_vectors_load_store_and_mix(name, metal):
    body = """
        uint i = thread_position_in_grid.x;
        device vec<T, 4>* out = (device vec<T, 4>*)y;
        vec<T, 4> v = ((const device vec<T, 4>*)x)[i];
        out[i] = v.wzyx;
        out[i].yz = vec<T, 2>(v.x, T(2) * v.w);
        out[i] += vec<T, 4>(T(1));
        z[i] = dot(float4(v), float4(1, 2, 3, 4)) + float3(v.xyz).z + float(any(v > T(100)));
    """
    dtype = FLOATS[name]
    x = mx.array(np.arange(64) % 17).astype(dtype)
    outputs = {"y": ((64,), dtype), "z": ((16,), mx.float32)}
    metal.settings(check=True)
    y, z = snippet(body, {"x": x}, outputs, 16, 16, template=[("T", dtype)])
    v = np.array(x.astype(mx.float32)).reshape(16, 4)
    expected = np.stack([v[:, 3], v[:, 0], 2 * v[:, 3], v[:, 0]], 1) + 1
    assert np.array_equal(np.array(y.astype(mx.float32)).reshape(16, 4), expected)
    assert np.array_equal(np.array(z), v @ [1, 2, 3, 4] + v[:, 2])


MATRIX = """
    simdgroup_matrix<T, 8, 8> a, b;
    simdgroup_matrix<float, 8, 8> c = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    uint row = threadgroup_position_in_grid.x * 8;
    for (int k = 0; k < 24; k += 8) {
        simdgroup_load(a, A, 24, ulong2(k, row));
        simdgroup_load(b, B + k, 24, ulong2(0, 0), true);
        simdgroup_multiply_accumulate(c, a, b, c);
    }
    simdgroup_store(c, C + row * 8, 8);
    c.thread_elements()[0] += 1;
    simdgroup_store(c, D + row * 8, 8, ulong2(0, 0), true);
"""


@pytest.mark.parametrize("name", FLOATS)
def test_simdgroup_matrices(name, metal):
    """A [16, 24] times B [8, 24] transposed; strides, offsets, both ways round, and single elements."""
    dtype = FLOATS[name]
    a, b = mx.array(random(16, 24)).astype(dtype), mx.array(random(8, 24, seed=6)).astype(dtype)
    metal.settings(check=True)
    outputs = {"C": ((16, 8), mx.float32), "D": ((16, 8), mx.float32)}
    c, d = snippet(MATRIX, {"A": a, "B": b}, outputs, 64, 32, template=[("T", dtype)])
    expected = np.array(a.astype(mx.float32)).astype(np.float64) @ np.array(b.astype(mx.float32)).T
    np.testing.assert_allclose(np.array(c), expected, rtol=1e-5, atol=1e-5)
    even = np.tile([1.0, 0.0], (8, 4))
    transposed = np.array(d).reshape(2, 8, 8).transpose(0, 2, 1)
    np.testing.assert_array_equal(transposed, np.array(c).reshape(2, 8, 8) + even.astype(np.float32))
    assert metal.counts["snippet"].matrix_ops == 6


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_atomics(order, metal):
    body = """
        uint i = thread_position_in_grid.x;
        atomic_fetch_add_explicit(&h[x[i] % 4], 1, memory_order_relaxed);
        atomic_fetch_max_explicit(&h[4], int(x[i]), memory_order_relaxed);
        atomic_fetch_min_explicit(&h[5], -int(x[i]), memory_order_relaxed);
        atomic_fetch_or_explicit(&h[6], 1 << (x[i] % 8), memory_order_relaxed);
        if (i == 0) atomic_exchange_explicit(&h[7], 42, memory_order_relaxed);
    """
    metal.settings(order=order, seed=3, check=True)
    x = mx.arange(1000, dtype=mx.uint32)
    (h,) = snippet(body, {"x": x}, {"h": ((8,), mx.int32)}, 1000, 250, atomic_outputs=True, init_value=0)
    assert h.tolist() == [250, 250, 250, 250, 999, -999, 255, 42]
    assert metal.counts["snippet"].atomics == 4001


def test_atomic_floats_and_compare_exchange(metal):
    body = """
        threadgroup atomic_uint taken;
        uint i = thread_position_in_threadgroup.x;
        if (i == 0) atomic_store_explicit(&taken, 0u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint expected = 0;
        if (atomic_compare_exchange_weak_explicit(&taken, &expected, i + 1, memory_order_relaxed, memory_order_relaxed))
            atomic_fetch_add_explicit(&y[1], float(i), memory_order_relaxed);
        atomic_fetch_add_explicit(&y[0], x[i], memory_order_relaxed);
    """
    x = mx.array(random(64).round(2))
    metal.settings(check=True, order="reverse")
    (y,) = snippet(body, {"x": x}, {"y": ((8,), mx.float32)}, 64, 64, atomic_outputs=True, init_value=0)
    np.testing.assert_allclose(y[0].item(), np.array(x).sum(), rtol=1e-5)
    assert y[1].item() == 63  # in reverse order the last thread comes first


def test_threadgroup_memory_and_positions_in_three_dimensions(metal):
    kernel = mx.fast.metal_kernel(
        name="positions",
        input_names=[],
        output_names=["y"],
        source="""
            threadgroup uint s[2][3][4];
            uint3 t = thread_position_in_threadgroup, g = thread_position_in_grid;
            s[t.z][t.y][t.x] = g.x + 100 * g.y + 10000 * g.z;
            threadgroup_barrier(mem_flags::mem_threadgroup);
            uint3 last = threads_per_threadgroup - 1;
            uint at = (g.z * threads_per_grid.y + g.y) * threads_per_grid.x + g.x;
            y[at] = s[last.z - t.z][last.y - t.y][last.x - t.x] + 1000000 * threadgroup_position_in_grid.x;
        """,
    )
    (y,) = kernel(
        inputs=[], grid=(6, 3, 4), threadgroup=(4, 3, 2), output_shapes=[(4, 3, 6)], output_dtypes=[mx.uint32]
    )
    z, row, x = np.meshgrid(np.arange(4), np.arange(3), np.arange(6), indexing="ij")
    group = x // 4  # the second threadgroup along x is cut to two threads
    mirrored = np.where(group == 0, 3 - x, 9 - x) + 100 * (2 - row) + 10000 * (z // 2 * 4 + 1 - z)
    assert np.array_equal(np.array(y), mirrored + 1000000 * group)
    assert metal.launches[-1].threadgroups == 4 and metal.launches[-1].threads == 72
