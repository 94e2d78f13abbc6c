"""The graph that MLX would trace on Metal, traced on any machine: stand-ins for what its CPU backend spells out.

Where Metal's own conditions hold (MLX 0.32, backend/metal/scaled_dot_product_attention.cpp and fast.cpp), an operation
becomes one opaque kernel while the round is traced, and gets its name on Metal afterwards. Nothing is evaluated.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp import exactness_graph
from mlx_mtp.exactness_compare import Compared, compare
from mlx_mtp.exactness_graph import Graph, Node, trace, trace_passes
from mlx_mtp.sampling import SamplerClass
from mlx_mtp.target import Target

STOCK = "custom_kernel_stock_"
VECTOR_DIMS = (64, 96, 128, 192, 256)
VECTOR_ROWS = 8
VECTOR_PRODUCT = 32  # rows times query heads a K/V head


def traces_on_metal(target: Target, sampler: SamplerClass, patch: pytest.MonkeyPatch) -> Compared:
    """What comparing the traces of a round would give on a Mac."""

    def renamed(*args: Any) -> Graph:
        graph = trace(*args)
        return replace(graph, nodes=tuple(_on_metal(node) for node in graph.nodes))

    with patch.context() as inside, stand_ins(inside):
        inside.setattr(exactness_graph, "trace", renamed)
        return compare(trace_passes(target, sampler))


def _on_metal(node: Node) -> Node:
    name = str(node.arguments[0]) if node.op == "CustomKernel" else ""
    if not name.startswith(STOCK):
        return node
    return replace(node, op=name.removeprefix(STOCK).partition("__")[0], arguments=())


@contextmanager
def stand_ins(patch: pytest.MonkeyPatch) -> Iterator[None]:
    spelt_out = mx.fast.scaled_dot_product_attention

    def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
        return opaque("RMSNorm", [x, weight], x.shape, x.dtype)

    def dequantize(w: mx.array, scales: mx.array, biases: mx.array | None, **how: Any) -> mx.array:
        shape = (*w.shape[:-1], w.shape[-1] * 32 // how["bits"])
        return opaque("Quantize", [w, scales, biases], shape, how.get("dtype") or scales.dtype)

    def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array) -> mx.array:
        rows, per_kv_head = q.shape[2], q.shape[1] // k.shape[1]
        if q.shape[-1] in VECTOR_DIMS and rows <= VECTOR_ROWS and rows * per_kv_head <= VECTOR_PRODUCT:
            return opaque("ScaledDotProductAttention", [q, k, v, mask], q.shape, q.dtype)
        return spelt_out(q, k, v, scale=scale, mask=mask)

    patch.setattr(mx.fast, "rms_norm", rms_norm)
    patch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    patch.setattr(mx, "dequantize", dequantize)
    yield


def opaque(name: str, inputs: Sequence[mx.array | None], shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """One node that stands for a kernel of MLX's own; it can be traced, not run."""
    given = [array for array in inputs if array is not None]
    kernel = mx.fast.metal_kernel(
        name=f"stock_{name}_",
        input_names=[f"in{i}" for i in range(len(given))],
        output_names=["out"],
        source="out[0] = 0;",
    )
    (out,) = kernel(
        inputs=given,
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[tuple(shape)],
        output_dtypes=[dtype],
    )
    return out
