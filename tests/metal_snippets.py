"""Small Metal kernels for the tests of the runner: a body, inputs and outputs, one call."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx


def snippet(
    body: str,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, tuple[tuple[int, ...], mx.Dtype]],
    threads: int,
    group: int = 32,
    header: str = "",
    template: Sequence[tuple[str, Any]] = (),
    atomic_outputs: bool = False,
    init_value: float | None = None,
    ensure_row_contiguous: bool = True,
    name: str = "snippet",
) -> list[mx.array]:
    """Runs `body` by whatever is `mx.fast.metal_kernel` now: the runner, under the fixture `metal`."""
    kernel = mx.fast.metal_kernel(
        name=name,
        input_names=list(inputs),
        output_names=list(outputs),
        source=body,
        header=header,
        atomic_outputs=atomic_outputs,
        ensure_row_contiguous=ensure_row_contiguous,
    )
    return kernel(
        inputs=list(inputs.values()),
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
        grid=(threads, 1, 1),
        threadgroup=(group, 1, 1),
        template=list(template),
        init_value=init_value,
    )
