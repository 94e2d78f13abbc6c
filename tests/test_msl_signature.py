"""The text that we compile is the text that MLX generates: byte for byte, as its own tracing prints it."""

import mlx.core as mx
import pytest

from msl.arguments import read_input
from msl.signature import KernelText, signature

HEADER = "// what all kernels share\n"
FACTS = "o[thread_position_in_grid.x] = a[0] * s[0] + a_shape[0] + a_strides[0] + a_ndim;"
ATTRIBUTES = "p[thread_index_in_threadgroup] = y[0]; q[0] = x + simdgroups_per_threadgroup + y_shape[0];"
CASES = {  # inputs, outputs: name -> shape, dtype; template; body; atomic outputs
    "facts and a small input": (
        {"a": ((4, 16), mx.float16), "s": ((2,), mx.float32)},
        {"o": ((4, 16), mx.float16)},
        [("T", mx.float16), ("N", 3), ("B", True)],
        FACTS,
        False,
    ),
    "a scalar, two outputs": (
        {"x": ((), mx.int32), "y": ((8,), mx.bfloat16)},
        {"p": ((8,), mx.bfloat16), "q": ((3,), mx.uint32)},
        [],
        ATTRIBUTES,
        False,
    ),
    "atomic outputs, a negative argument": (
        {"x": ((9,), mx.bool_)},
        {"p": ((8,), mx.float32)},
        [("W", -2)],
        "p[0] = 1;",
        True,
    ),
    "no inputs": ({}, {"p": ((8,), mx.int8), "r": ((8,), mx.complex64)}, [], "p[0] = 1;", False),
    "a fact inside a longer word": (
        {"x": ((9,), mx.uint8)},
        {"y": ((9,), mx.uint64)},
        [("F", False)],
        "int max_shape = 1; y[0] = threads_per_grid.x;",
        False,
    ),
}


def as_mlx_prints_it(case, capfd) -> str:
    inputs, outputs, template, body, atomic = case
    kernel = mx.fast.metal_kernel(
        name="golden",
        input_names=list(inputs),
        output_names=list(outputs),
        source=body,
        header=HEADER,
        atomic_outputs=atomic,
    )

    def launch(*arrays):
        return tuple(
            kernel(
                inputs=list(arrays),
                template=template,
                grid=(8, 1, 1),
                threadgroup=(8, 1, 1),
                output_shapes=[shape for shape, _ in outputs.values()],
                output_dtypes=[dtype for _, dtype in outputs.values()],
                verbose=True,
            )
        )

    graph: list[object] = []
    mx.export_function(graph.append, launch, *[mx.zeros(*given) for given in inputs.values()])
    printed = capfd.readouterr().out
    return printed.split("```\n", 1)[1].rsplit("\n```", 1)[0]


@pytest.mark.parametrize("name", CASES)
def test_the_text_is_what_mlx_generates(name, capfd):
    inputs, outputs, template, body, atomic = CASES[name]
    text = KernelText("golden", tuple(inputs), tuple(outputs), body, HEADER, atomic)
    types = [read_input(mx.zeros(*given), True).type for given in inputs.values()]
    named = [(key, value if isinstance(value, int) else str(value).split(".")[-1]) for key, value in template]
    dtypes = [str(dtype).split(".")[-1] for _, dtype in outputs.values()]
    ours = signature(text, types, dtypes, named).text
    assert ours == as_mlx_prints_it(CASES[name], capfd)
