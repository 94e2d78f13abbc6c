"""The graph that MLX would run on Metal, built on any machine without evaluating anything: stand-ins and counts.

MLX's CPU backend spells out what Metal has one kernel for. While `as_on_metal` is entered these functions give one
opaque operation each, where Metal's own conditions hold, so that the graph, and what mx.compile fuses in it, is
Metal's. Conditions: MLX 0.32.4, backend/metal/scaled_dot_product_attention.cpp (use_fallback) and fast.cpp.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

OPAQUE = "Depends"  # of any inputs and outputs, and nothing fuses with it; our passes have none of their own
MARK = "AsStrided"  # nor any of these
# Operations that only describe memory anew.
VIEWS = {
    "AsStrided",
    "Broadcast",
    "BroadcastAxes",
    "ExpandDims",
    "Flatten",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "StopGradient",
    "Transpose",
    "Unflatten",
    "View",
}
VECTOR_DIMS = (64, 96, 128, 192, 256)
VECTOR_ROWS = 8
VECTOR_PRODUCT = 32  # rows times query heads a K/V head
COPY = "Copy (Reshape of a Transpose)"
NODE = re.compile(r"\{ (\d+) \[label =\"(\w+)\"")
EDGE = re.compile(r"^(\S+) -> (\S+)$")


class Graph:
    """Operations by node, and which operations each one reads.

    MLX writes an operation once for each time that its function was called, under one number: the edges that follow it
    are its own.
    """

    def __init__(self, text: str):
        self.names: dict[int, str] = {}
        made_by: dict[str, int] = {}
        reads: list[tuple[str, int]] = []
        number = ""
        for line in text.splitlines():
            if found := NODE.search(line):
                number, node = found[1], len(self.names)
                self.names[node] = found[2]
            elif edge := EDGE.match(line.strip()):
                if edge[1] == number:
                    made_by[edge[2]] = node
                elif edge[2] == number:
                    reads.append((edge[1], node))
                else:
                    raise AssertionError(
                        f"an edge belongs to the operation before it, got {line} after {number}"
                    )
        self.inputs: dict[int, list[int]] = {node: [] for node in self.names}
        for array, node in reads:
            if array in made_by:
                self.inputs[node].append(made_by[array])


def graph_of(arrays: Sequence[mx.array]) -> Graph:
    """The graph that leads to lazy arrays."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.dot"
        mx.export_to_dot(str(file), *arrays)
        return Graph(file.read_text())


def launches(graph: Graph, kernels: Sequence[str]) -> Counter[str]:
    """Operations that Metal launches, by name; each counts as one, whatever kernels MLX makes of it.

    `kernels` are the names of the opaque ones by their number. A Reshape of a Transpose is listed as COPY: it moves
    memory unless rows = 1.
    """
    found: Counter[str] = Counter()
    for node, name in graph.names.items():
        if name == "Reshape" and any(graph.names[source] == "Transpose" for source in graph.inputs[node]):
            found[COPY] += 1
        elif name == OPAQUE:
            found[kernels[number_of(graph, node)]] += 1
        elif name not in VIEWS:
            found[name] += 1
    return found


def number_of(graph: Graph, node: int) -> int:
    """Which kernel an opaque operation stands for: how many MARK operations in a row its marker is made of."""
    marks = [source for source in graph.inputs[node] if graph.names[source] == MARK]
    if len(marks) != 1:
        raise AssertionError(f"an opaque operation has one marker, got {len(marks)}")
    length = 0
    while marks:
        length += 1
        marks = graph.inputs[marks[0]]
    return length - 1


def marker(number: int) -> mx.array:
    """An array whose graph is `number` + 1 operations MARK: the only thing about an operation that a graph shows."""
    array = leaf((1,), mx.bool_)
    for _ in range(number + 1):
        array = mx.as_strided(array, (1,), (1,), 0)
    return array


def leaf(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """An evaluated array of any size that occupies no memory."""
    array = mx.broadcast_to(mx.zeros((), dtype), shape)
    mx.eval(array)
    return array


@contextmanager
def as_on_metal() -> Iterator[list[str]]:
    """Everything that Metal has a kernel for becomes one opaque operation; gives their names by number."""
    kernels: list[str] = []

    def opaque(
        name: str,
        inputs: Sequence[mx.array | None],
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        if name not in kernels:
            kernels.append(name)
        outputs = [leaf(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        # As many outputs as the kernel has: Depends gives back what it is given first.
        given = [array for array in inputs if array is not None]
        return list(mx.depends(outputs, [*given, marker(kernels.index(name))]))

    def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
        return opaque("RMSNorm", [x, weight], [x.shape], [x.dtype])[0]

    def dequantize(w: mx.array, scales: mx.array, biases: mx.array | None, **how: Any) -> mx.array:
        shape = (*w.shape[:-1], w.shape[-1] * 32 // how["bits"])
        return opaque("Dequantize", [w, scales, biases], [shape], [how["dtype"]])[0]

    def attention(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | None = None
    ) -> mx.array:
        rows, per_kv_head = q.shape[2], q.shape[1] // k.shape[1]
        if q.shape[-1] in VECTOR_DIMS and rows <= VECTOR_ROWS and rows * per_kv_head <= VECTOR_PRODUCT:
            return opaque("SDPA", [q, k, v, mask], [q.shape], [q.dtype])[0]
        return spelt_out(q, k, v, scale=scale, mask=mask)

    def metal_kernel(name: str, **_: Any) -> Callable[..., list[mx.array]]:
        def launch(**how: Any) -> list[mx.array]:
            return opaque(name, how["inputs"], how["output_shapes"], how["output_dtypes"])

        return launch

    spelt_out = mx.fast.scaled_dot_product_attention
    stand_ins = [
        (mx.fast, "rms_norm", rms_norm),
        (mx.fast, "scaled_dot_product_attention", attention),
        (mx.fast, "metal_kernel", metal_kernel),
        (mx, "dequantize", dequantize),
    ]
    real = [(module, name, vars(module)[name]) for module, name, _ in stand_ins]
    try:
        for module, name, function in stand_ins:
            setattr(module, name, function)
        yield kernels
    finally:
        for module, name, function in real:
            setattr(module, name, function)
