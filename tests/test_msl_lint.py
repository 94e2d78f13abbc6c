"""What reading a kernel's text brings up: address spaces, misplaced variables, parameter traps, accumulators."""

import mlx.core as mx
import pytest

from metal_snippets import snippet

I = "uint i = thread_position_in_grid.x;\n"  # noqa: E741
TAKES = "template <typename T> inline float first(const {space}T* p) {{ return float(*p); }}\n"
STAGED = I + "threadgroup float s[4]; s[i % 4] = 1; threadgroup_barrier(mem_flags::mem_threadgroup);\n"


def run(metal, body: str, header: str = "", size: int = 64) -> None:
    snippet(body, {"x": mx.ones((size,))}, {"y": ((64,), mx.float32)}, 4, 4, header, [("R", 4)], init_value=0)


SPACES = {  # what is mixed up: (header, body, its twin's header, its twin's body)
    "a helper without an address space": (
        "inline float first(const float* p) { return *p; }\n",
        I + "y[i] = first(x + i);",
        TAKES.format(space="device "),
        I + "y[i] = first(x + i);",
    ),
    "threadgroup memory handed on as device memory": (
        TAKES.format(space="device "),
        STAGED + "y[i] = first(s + i);",
        TAKES.format(space="threadgroup "),
        STAGED + "y[i] = first(s + i);",
    ),
    "device memory handed on as threadgroup memory": (
        TAKES.format(space="threadgroup "),
        I + "y[i] = first(x + i);",
        TAKES.format(space="device "),
        I + "y[i] = first(x + i);",
    ),
    "a thread's own array handed on as device memory": (
        TAKES.format(space="device "),
        I + "float own[2] = {1, 2}; y[i] = first(own);",
        TAKES.format(space="thread "),
        I + "float own[2] = {1, 2}; y[i] = first(own);",
    ),
    "a pointer of another space": (
        "",
        STAGED + "threadgroup float* p = s; device float* q = p; y[i] = *q;",
        "",
        STAGED + "threadgroup float* p = s; threadgroup float* q = p; y[i] = *q;",
    ),
    "a cast that loses the space": (
        "",
        I + "y[i] = ((const float4*)x)[i].x;",
        "",
        I + "y[i] = ((const device float4*)x)[i].x;",
    ),
}


@pytest.mark.parametrize("what", SPACES)
def test_address_spaces_that_metal_refuses(what, metal):
    header, body, right_header, right_body = SPACES[what]
    run(metal, body, header)
    assert any(line.startswith("line ") for line in metal.lint("snippet"))
    metal.reset()
    run(metal, right_body, right_header)
    assert metal.lint("snippet") == []


def test_a_small_input_is_constant(metal):
    body = I + "const device float* p = x; y[i] = p[0];"
    run(metal, body, size=8)
    assert metal.lint("snippet") == []
    metal.reset()
    run(metal, body, size=7)
    assert len(metal.lint("snippet")) == 1 and "constant" in metal.lint("snippet")[0]


def test_what_metal_allows_is_not_complained_about(metal):
    body = (
        I
        + """
        threadgroup float4 s[4];
        s[i] = ((const device float4*)x)[i] * 2.0f;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        device float4* q = (device float4*)y;
        q[i] = s[3 - i];
        q[i] += s[i];
        q[i].x = s[i].wzyx.y + dot(q[i], s[i]) + metal::max(x[i], y[i]);
        q->yz = s[i].xy;
        threadgroup half h[64];
        simdgroup_half8x8 m;
        if (R > 4) simdgroup_load(m, h, 8);
        if (R > 4) simdgroup_store(m, h, 8);
    """
    )
    run(metal, body, "constant constexpr float table[2] = {1, 2};\nconstant constexpr int FOUR = 4;\n")
    assert metal.lint("snippet") == []


def test_threadgroup_variables_belong_in_the_kernel(metal):
    helper = "inline float f(uint i) {\n  threadgroup float s[4];\n  s[i] = 1;\n  return s[i];\n}\n"
    run(metal, I + "y[i] = f(i);", helper)
    assert metal.lint("snippet") == ["line 2: threadgroup variable outside the kernel: float s[4]"]


def test_facts_nobody_asked_for(metal):
    run(metal, I + "int max_shape = 3; y[i] = max_shape;  // not x_strides")
    lines = metal.lint("snippet")
    assert len(lines) == 2 and "`x_shape`" in lines[0] and "`x_strides`" in lines[1]
    metal.reset()
    run(metal, I + "y[i] = x_shape[0];")
    assert metal.lint("snippet") == []


HELPERS = """
template <int N> METAL_FUNC void add_products(const device float* x, thread float* sums) {
  for (int i = 0; i < N; i++) sums[i] = metal::fma(x[i], 2.0f, sums[i]);
}
METAL_FUNC void scale(thread float* w) {
  for (int i = 0; i < 8; i++) w[i] = metal::fma(w[i], 2.0f, 1.0f);
}
struct Peak {
  float most;
  float4 sums;
  METAL_FUNC void add(float x) thread {
    most = max(most, x);
    sums += x;
  }
};
template <int N> METAL_FUNC float seven(const device float* x) {
  float sums[N] = {};
  for (int k = 0; k < 3; k++) add_products<N>(x + k, sums);
  return sums[0];
}
"""
ACCUMULATORS = {
    "an array": (I + "float a[R * 2] = {}; for (int k = 0; k < 64; k++) a[k % 8] += x[k]; y[i] = a[1];", 8),
    "two dimensions and a scalar": (
        I
        + "float a[2][R] = {}, s = 0; for (int k = 0; k < 8; k++) { a[k % 2][k % 4] = fma(x[k], x[k], a[k % 2][k % 4]);"
        " s += x[k]; } y[i] = a[0][1] + s;",
        9,
    ),
    "weights unpacked in place are none": (I + "float w[8] = {}; scale(w); w[0] *= 3; y[i] = w[i];", 0),
    "integers are none": (I + "int n = 0; for (int k = 0; k < 8; k++) n += k; y[i] = n;", 0),
    "filled by a helper": (
        I + "float a[R] = {}; for (int k = 0; k < 4; k++) add_products<R>(x, a); y[i] = a[0];",
        4,
    ),
    "a helper's own beside the caller's": (
        I
        + "Peak p = {}; float s = 0; for (int k = 0; k < 4; k++) { p.add(x[k]); s += seven<7>(x); } y[i] = p.most + s;",
        5 + 1 + 7,
    ),
    "matrices hold two floats a thread": (
        "simdgroup_float8x8 a, b, c[R];\n"
        "for (int j = 0; j < R; j++) c[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);\n"
        "for (int j = 0; j < R; j++) simdgroup_multiply_accumulate(c[j], a, b, c[j]);\nsimdgroup_store(c[1], y, 8);",
        8,
    ),
    "vectors of halfs": (
        I + "half4 h = 0; for (int k = 0; k < 3; k++) h = fma(half4(x[k]), half4(2.0h), h); y[i] = h.x;",
        4,
    ),
    "a running maximum": (
        I + "float m = -INFINITY; for (int k = 0; k < 8; k++) m = max(m, x[k]); y[i] = m;",
        1,
    ),
}


@pytest.mark.parametrize("what", ACCUMULATORS)
def test_accumulators_by_declaration(what, metal):
    body, expected = ACCUMULATORS[what]
    snippet(body, {"x": mx.ones((64,))}, {"y": ((64,), mx.float32)}, 32, 32, HELPERS, [("R", 4)])
    assert metal.accumulators("snippet") == expected
