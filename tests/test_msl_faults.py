"""Kernels broken on purpose, each beside a twin that is right: the runner refuses the one and runs the other."""

import mlx.core as mx
import pytest

from metal_snippets import snippet
from msl import CompileError, Fault

THREADS = 64
OUTPUT = {"y": ((THREADS,), mx.float32)}
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
REVERSE = """
    threadgroup float s[64];
    uint i = thread_position_in_threadgroup.x;
    s[i] = x[i];
    {barrier}
    y[i] = s[63 - i];
"""
REWRITE = """
    threadgroup float s[64];
    uint i = thread_position_in_threadgroup.x;
    s[i] = x[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float v = s[63 - i];
    {barrier}
    s[i] = v;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = s[i];
"""
SCALED = """
    y[i] = x[i];
    {barrier}
    y[i] = y[63 - i] * 2;
"""
WITHIN_SIMDGROUP = """
    threadgroup float s[64];
    uint i = thread_position_in_threadgroup.x;
    s[i] = x[i];
    {barrier}
    y[i] = s[i ^ 1];
"""
I = "uint i = thread_position_in_grid.x;\n"  # noqa: E741
BROKEN = {  # what is wrong: (broken, its twin, what the fault says)
    "no barrier between write and read": (
        REVERSE.format(barrier=""),
        REVERSE.format(barrier=BARRIER),
        "race|uninit",
    ),
    "only a simdgroup's barrier": (
        REVERSE.format(barrier="simdgroup_barrier(mem_flags::mem_threadgroup);"),
        REVERSE.format(barrier=BARRIER),
        "race: read of threadgroup memory.* written by thread",
    ),
    "a barrier of no memory": (
        REVERSE.format(barrier="threadgroup_barrier(mem_flags::mem_none);"),
        REVERSE.format(barrier=BARRIER),
        "race: read of threadgroup memory",
    ),
    "a barrier of device memory only": (
        REVERSE.format(barrier="threadgroup_barrier(mem_flags::mem_device);"),
        REVERSE.format(barrier=BARRIER),
        "race: read of threadgroup memory",
    ),
    "no barrier between read and write": (
        REWRITE.format(barrier=""),
        REWRITE.format(barrier=BARRIER),
        "race: write of threadgroup memory.* read by thread",
    ),
    "a simd operation taken for a barrier": (
        WITHIN_SIMDGROUP.format(barrier="simd_sum(1.0f);"),
        WITHIN_SIMDGROUP.format(barrier="simdgroup_barrier(mem_flags::mem_threadgroup);"),
        "race: read of threadgroup memory",
    ),
    "device memory behind a barrier of threadgroup memory": (
        I
        + "uint j = i;\n"
        + SCALED.format(barrier=BARRIER).replace("y[i] = y[63 - i] * 2", "float v = y[63 - j]; y[i] = v"),
        I
        + "y[i] = x[i];\nthreadgroup_barrier(mem_flags::mem_device);\nfloat v = y[63 - i];\n"
        + "threadgroup_barrier(mem_flags::mem_device);\ny[i] = v;",
        "race: read of y",
    ),
    "two threadgroups write one place": (
        I + "y[i] = 0; y[i % 32] = x[i];",
        I + "y[i] = x[i];",
        "race: write of y",
    ),
    "another threadgroup's output behind a barrier": (
        I + "y[i] = x[i];\nthreadgroup_barrier(mem_flags::mem_device);\nif (i >= 32) y[i] += y[i - 32];",
        I + "y[i] = x[i];\nthreadgroup_barrier(mem_flags::mem_device);\nif (i >= 32) y[i] += x[i - 32];",
        "race: read of y|race: write of y|uninitialised read of y",
    ),
    "a read behind the end": (
        I + "y[i] = x[i + 1];",
        I + "y[i] = x[min(i + 1, 63u)];",
        "out of bounds: read of 4",
    ),
    "a write behind the end": (
        I + "y[i] = 0; y[i + 1] = 0;",
        I + "y[i] = x[i];",
        "out of bounds: write of 4",
    ),
    "a read before the start": (
        I + "y[i] = x[int(i) - 1];",
        I + "y[i] = x[max(int(i) - 1, 0)];",
        "out of bounds: read",
    ),
    "an index beyond a thread's own array": (
        I + "float a[4] = {0, 1, 2, 3}; y[i] = a[i % 5];",
        I + "float a[4] = {0, 1, 2, 3}; y[i] = a[i % 4];",
        "array index out of bounds at line",
    ),
    "an input written": (
        I + "((device float*)x)[i] = 1; y[i] = 0;",
        I + "y[i] = x[i];",
        "write to input x",
    ),
    "threadgroup memory never written": (
        "threadgroup float s[64];\n" + I + f"if (i < 32) s[i] = x[i];\n{BARRIER}\ny[i] = s[63 - i];",
        "threadgroup float s[64];\n" + I + f"s[i] = x[i];\n{BARRIER}\ny[i] = s[63 - i];",
        "uninitialised read of threadgroup memory",
    ),
    "an output added to before it was written": (
        I + "y[i] += x[i];",
        I + "y[i] = 0; y[i] += x[i];",
        "uninitialised read of y",
    ),
    "a barrier that some have left": (
        I + f"if (i >= 50) return;\n{BARRIER}\ny[i] = x[i];",
        I + f"{BARRIER}\nif (i < 50) y[i] = x[i];",
        "divergent threadgroup_barrier at line .*: 50 of 64 threads .14 ended",
    ),
    "two barriers instead of one": (
        I + f"if (i < 32) {{\n{BARRIER}\n}} else {{\n{BARRIER}\n}}\ny[i] = x[i];",
        I + f"{BARRIER}\ny[i] = x[i];",
        "others wait at another barrier",
    ),
    "a simd operation under a lane's condition": (
        I + "float v = x[i];\nif (i % 2) v = simd_sum(v);\ny[i] = v;",
        I + "float v = simd_sum(x[i]);\ny[i] = i % 2 ? v : x[i];",
        "divergent simd_sum at line .*: lanes aaaaaaaa of ffffffff",
    ),
    "a simd operation that some lanes have left": (
        I + "if (i % 32 >= 16) return;\ny[i] = simd_sum(x[i]);",
        I + "float v = simd_sum(x[i]);\nif (i % 32 < 16) y[i] = v;",
        "divergent simd_sum at line .*: lanes 0000ffff of ffffffff",
    ),
    "misaligned vectors": (
        I + "y[i] = ((const device float4*)(x + 1))[i % 8].x;",
        I + "y[i] = ((const device float4*)x)[i % 8].x;",
        "misaligned access at line",
    ),
    "a shift by all bits": (
        I + "y[i] = float(1 << (i + 1));",
        I + "y[i] = float(1 << (i % 32));",
        "shift by too many bits",
    ),
    "a division by zero": (
        I + "y[i] = float(7 / int(i));",
        I + "y[i] = float(7 / int(i + 1));",
        "division by zero",
    ),
}
TWO_GROUPS = {"two threadgroups write one place": 32, "another threadgroup's output behind a barrier": 32}


def run(body: str, what: str) -> None:
    snippet(body, {"x": mx.arange(float(THREADS))}, OUTPUT, THREADS, TWO_GROUPS.get(what, THREADS))


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_refused_and_its_twin_runs(what, order, metal):
    broken, right, says = BROKEN[what]
    metal.settings(check=True, order=order, seed=11)
    with pytest.raises(Fault, match=says):
        run(broken, what)
    run(right, what)
    assert [launch.kernel for launch in metal.launches] == ["snippet"]


UNCHECKED = ["a write behind the end", "a barrier that some have left", "two barriers instead of one"]


@pytest.mark.parametrize("what", [*UNCHECKED, "a simd operation under a lane's condition"])
def test_some_faults_are_seen_without_the_checker(what, metal):
    broken, right, _ = BROKEN[what]
    with pytest.raises(Fault):
        run(broken, what)
    run(right, what)


def test_threadgroup_memory_has_a_limit(metal):
    def using(floats: int) -> None:
        run(
            f"threadgroup float s[{floats}];\n"
            + I
            + f"s[i * {floats // THREADS}] = 1; y[i] = s[i * {floats // THREADS}];",
            "",
        )

    using(8192)
    assert metal.launches[-1].threadgroup_bytes == 32768
    with pytest.raises(Fault, match="32832 bytes of threadgroup memory, at most 32768"):
        using(8208)


def test_threadgroups_have_a_limit(metal):
    x = mx.zeros((1024,))
    for group in (832, 1024):
        if group > 832:
            with pytest.raises(Fault, match="1024 threads a threadgroup, at most 832"):
                snippet(I + "y[i] = x[i];", {"x": x}, {"y": ((1024,), mx.float32)}, 1024, group)
        else:
            snippet(I + "y[i] = x[i];", {"x": x}, {"y": ((1024,), mx.float32)}, 832, group)


def test_simd_operations_need_whole_simdgroups(metal):
    with pytest.raises(Fault, match=r"simd_sum at line \d+ in a simdgroup of 8 threads"):
        snippet(I + "y[i] = simd_sum(x[i]);", {"x": mx.zeros((64,))}, OUTPUT, 40, 64)


def test_a_race_is_seen_whoever_comes_first(metal):
    """What forward order happens to get right, the checker still reports: it looks at barriers, not at values."""
    body = REVERSE.format(barrier="threadgroup_barrier(mem_flags::mem_none);")
    x = mx.arange(float(THREADS))
    (y,) = snippet(body, {"x": x}, OUTPUT, THREADS, THREADS)
    assert mx.array_equal(y, x[::-1])
    metal.settings(check=True)
    with pytest.raises(Fault, match="race"):
        snippet(body, {"x": x}, OUTPUT, THREADS, THREADS)


def test_a_fault_names_the_kernel_the_line_and_all_that_was_found(metal):
    metal.settings(check=True)
    with pytest.raises(Fault) as caught:
        run(I + "y[i] = x[i + 1];\n((device float*)x)[i] = 1;", "")
    assert str(caught.value).startswith("snippet:") and len(caught.value.faults) == 2
    assert any("x[byte 256] of 256 by thread 63 of threadgroup 0" in fault for fault in caught.value.faults)


def test_a_compile_error_names_the_line_of_the_source(metal):
    with pytest.raises(CompileError, match=r"metal:\d+:\d+: error: no member named 'q'") as caught:
        run(I + "y[i] = half4(1, 2, 3, 4).xyzz.q;", "")
    assert "y[i] = half4" in str(caught.value)
