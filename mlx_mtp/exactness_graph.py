"""The graph of a round on a target, traced for several sizes of the pass: what exactness is derived from.

Nothing is evaluated and no device is needed: MLX hands over each operation with its arguments, shapes and constants
(`mx.export_function` with a callback, MLX 0.32).
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_mtp.round import play_round
from mlx_mtp.sampling import SamplerClass, sampling_arrays
from mlx_mtp.sampling import Sampling as SamplingSettings
from mlx_mtp.state import MAX_DRAFT_TOKENS, State, kv_shapes
from mlx_mtp.target import Target

MAX_ROWS = MAX_DRAFT_TOKENS + 1


class Value(NamedTuple):
    """An array between two operations."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype


@dataclass(frozen=True, slots=True)
class Node:
    """One operation; `op` is MLX's name of the primitive, `arguments` its settings in MLX's own order."""

    op: str
    arguments: tuple[Any, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """The operations of one round in an order in which they can run, and the arrays that were there before it."""

    nodes: tuple[Node, ...]
    constants: Mapping[str, mx.array]

    def by_op(self) -> dict[str, list[Node]]:
        found: dict[str, list[Node]] = defaultdict(list)
        for node in self.nodes:
            found[node.op].append(node)
        return found

    def counts(self) -> Counter[str]:
        return Counter(node.op for node in self.nodes)


@dataclass(frozen=True, slots=True)
class PassSize:
    """What must not change a row's bits: the size of the pass it is computed in, and that of the buffers."""

    rows: int  # M: the last token and its drafts
    batch: int = 1
    bucket: int = 256
    capacity: int = 1024


BASE = PassSize(rows=5)
VARIED: Mapping[str, PassSize] = {
    "rows": replace(BASE, rows=6),
    "batch": replace(BASE, batch=2),
    "bucket": replace(BASE, bucket=512),
    "capacity": replace(BASE, capacity=1280),
}
# Plain decoding, the shortest pass of several rows, the first beyond MLX's vector kernels, and the longest one.
OTHER_ROWS = (1, 2, 9, MAX_ROWS)


class Traces(NamedTuple):
    """Graphs of the same round: at `BASE`, with one size changed, and at other numbers of rows."""

    base: Graph
    varied: Mapping[str, Graph]
    by_rows: Mapping[int, Graph]


def trace_passes(target: Target, sampler: SamplerClass) -> Traces:
    """All the graphs that `exactness_rules` compares."""
    return Traces(
        base=trace(target, sampler, BASE),
        varied={what: trace(target, sampler, size) for what, size in VARIED.items()},
        by_rows={rows: trace(target, sampler, replace(BASE, rows=rows)) for rows in OTHER_ROWS},
    )


def trace(target: Target, sampler: SamplerClass, size: PassSize) -> Graph:
    """The graph of a round that verifies size.rows - 1 drafts and makes none: one pass, and the choice of tokens."""
    state = _state(target, sampler, size)
    names = sorted(state.sampling)
    arrays = [*(buffer for both in state.kv for buffer in both), *_others(state, names)]

    def play(*given: mx.array) -> list[mx.array]:
        kv = tuple(zip(given[: 2 * len(state.kv) : 2], given[1 : 2 * len(state.kv) : 2], strict=True))
        rest = list(given[2 * len(state.kv) :])
        counts = rest.pop() if state.counts is not None else None
        fields = dict(zip(("length", "last", "hidden", "drafts", "seed", "active"), rest, strict=False))
        before = State(kv=kv, sampling=dict(zip(names, rest[6:], strict=True)), counts=counts, **fields)
        after, tokens, n = play_round(target, None, before, k=0, bucket=size.bucket, sampler=sampler)
        return [*(buffer for both in after.kv for buffer in both), after.hidden, after.last, tokens, n]

    records: list[dict[str, Any]] = []
    mx.export_function(records.append, play, *arrays)
    return _graph(records)


def _others(state: State, names: Sequence[str]) -> list[mx.array]:
    """The arrays of a state without K/V, in the order in which `trace` takes them apart."""
    own = [state.length, state.last, state.hidden, state.drafts, state.seed, state.active]
    counts = [] if state.counts is None else [state.counts]
    return [*own, *(state.sampling[name] for name in names), *counts]


def _state(target: Target, sampler: SamplerClass, size: PassSize) -> State:
    """A state of lazy zeros, which nobody evaluates."""
    text, batch = target.text, size.batch
    settings = sampling_arrays(SamplingSettings(), text.vocab_size, with_bias=sampler.bias)
    return State(
        kv=tuple(
            (mx.zeros(shape, target.dtype), mx.zeros(shape, target.dtype))
            for shape in kv_shapes(text, batch, size.capacity)
        ),
        length=mx.zeros((batch,), mx.int32),
        last=mx.zeros((batch,), mx.uint32),
        hidden=mx.zeros((batch, 1, text.hidden_size), target.dtype),
        drafts=mx.zeros((batch, size.rows - 1), mx.uint32),
        seed=mx.zeros((batch,), mx.uint32),
        sampling={name: mx.zeros((batch, *a.shape[1:]), a.dtype) for name, a in settings.items()},
        counts=mx.zeros((batch, 2, text.vocab_size), mx.int32) if sampler.penalties else None,
        active=mx.zeros((batch,), mx.bool_),
    )


def _graph(records: Sequence[dict[str, Any]]) -> Graph:
    nodes, constants = [], {}
    for record in records:
        if record["type"] == "constants":
            constants.update(record["constants"])
        elif record["type"] == "primitive":
            nodes.append(
                Node(
                    record["name"],
                    tuple(record["arguments"]),
                    tuple(Value(name, tuple(shape), dtype) for name, shape, dtype in record["inputs"]),
                    tuple(Value(name, tuple(shape), dtype) for name, shape, dtype in record["outputs"]),
                )
            )
    return Graph(tuple(nodes), constants)
