"""Traces of the same round at several sizes -> one verdict an operation: what changes between them, and what it means.

Operations are paired by name and order of appearance, where two graphs hold equally many of them.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.exactness_graph import BASE, Graph, Node, Traces, Value
from mlx_mtp.exactness_rules import RULES, Here, Setting, element, judge, moves, quantizes

SMALL = 4096  # values of a constant that is compared; larger ones are weights
MOVED = frozenset(op for op, rule in RULES.items() if rule is moves)
PLAIN = frozenset(op for op, rule in RULES.items() if rule in (moves, element, quantizes))
GRAPH = "graph"  # the name under which differences between whole graphs are listed


@dataclass(frozen=True, slots=True)
class OpVerdict:
    """Operations of one kind for which the same holds; `invariant` is None where no rule knows them.

    count: in a pass of 5 rows, or of the size that `reason` names.
    """

    op: str
    count: int
    invariant: bool | None
    reason: str


class Compared(NamedTuple):
    """Traces, and what differs from the base graph, by (operation, which of them): sizes of the pass that are to blame.

    others: in words, graphs that compute numbers by other operations.
    """

    traces: Traces
    lengths: Mapping[tuple[str, int], frozenset[str]]
    shapes: Mapping[tuple[str, int], frozenset[str]]
    constants: Mapping[tuple[str, int], frozenset[str]]
    others: tuple[str, ...]


def verdicts_of(compared: Compared, here: Here) -> tuple[OpVerdict, ...]:
    """Every operation of the round, those that break invariance first, then the unknown ones."""
    traces = compared.traces
    found: Counter[tuple[str, bool | None, str]] = Counter()
    for key, count in _judged(traces.base, here, compared).items():
        found[key] += count
    for rows, graph in traces.by_rows.items():
        for (op, invariant, reason), count in _judged(graph, here, compared).items():
            # What longer or shorter passes have more of is another set of operations, listed in `others`.
            if (op, invariant, reason) not in found and invariant is not True:
                found[op, invariant, f"{reason} (in a pass of {_counted(rows)})"] += count
    for reason in compared.others:
        found[GRAPH, False, reason] += 1
    order = {False: 0, None: 1, True: 2}
    rows_ = [OpVerdict(op, count, invariant, reason) for (op, invariant, reason), count in found.items()]
    return tuple(sorted(rows_, key=lambda row: (order[row.invariant], -row.count, row.op)))


def _judged(graph: Graph, here: Here, compared: Compared) -> Counter[tuple[str, bool | None, str]]:
    found: Counter[tuple[str, bool | None, str]] = Counter()
    roots, in_base = _fixed(graph), compared.traces.base.counts()
    for op, nodes in graph.by_op().items():
        paired = len(nodes) == in_base[op]
        for i, node in enumerate(nodes):
            key = (op, i if paired else -1)  # of which nothing is known
            changed = compared.constants.get(key)
            if changed:
                found[op, False, f"a constant that changes with {', '.join(sorted(changed))}"] += 1
                continue
            setting = Setting(
                here,
                varies=compared.lengths.get(key, frozenset()),
                resized=compared.shapes.get(key, frozenset()),
                fixed=len(node.inputs) > 1 and node.inputs[1].name in roots,
            )
            invariant, reason = judge(node, setting)
            found[op, invariant, reason] += 1
    return found


def _fixed(graph: Graph) -> set[str]:
    """Names of arrays that are constants, or made from constants alone."""
    fixed = set(graph.constants)
    for node in graph.nodes:
        if node.op in PLAIN and node.inputs and all(value.name in fixed for value in node.inputs):
            fixed.update(value.name for value in node.outputs)
    return fixed


def compare(traces: Traces) -> Compared:
    """Pair the base graph with each of those in which one size changed."""
    lengths: dict[tuple[str, int], set[str]] = {}
    shapes: dict[tuple[str, int], set[str]] = {}
    constants: dict[tuple[str, int], set[str]] = {}
    others = [*traces.varied.items(), *(("rows", graph) for graph in traces.by_rows.values())]
    for what, graph in others:
        for key, one, other in _pairs(traces.base, graph):
            if reduced_length(one) != reduced_length(other):
                lengths.setdefault(key, set()).add(what)
            if one.outputs[0].shape != other.outputs[0].shape:
                shapes.setdefault(key, set()).add(what)
        for key in _changed_constants(traces.base, graph):
            constants.setdefault(key, set()).add(what)
    found = [{key: frozenset(names) for key, names in kind.items()} for kind in (lengths, shapes, constants)]
    return Compared(traces, found[0], found[1], found[2], tuple(_others(traces)))


def _pairs(base: Graph, other: Graph) -> Iterator[tuple[tuple[str, int], Node, Node]]:
    others = other.by_op()
    for op, nodes in base.by_op().items():
        if len(others.get(op, ())) == len(nodes):
            for i, (one, two) in enumerate(zip(nodes, others[op], strict=True)):
                yield (op, i), one, two


def _changed_constants(base: Graph, other: Graph) -> set[tuple[str, int]]:
    """Operations that read small constants of other values: numbers, or the key of noise.

    Indices and sizes may change: where they lead to other numbers, lengths and shapes say so. Our kernels are told the
    number of rows.
    """
    asked: list[tuple[tuple[str, int], mx.array]] = []
    seen: dict[tuple[str, str], mx.array] = {}
    for key, one, two in _pairs(base, other):
        if one.op == "CustomKernel":
            continue
        for a, b in zip(one.inputs, two.inputs, strict=False):
            first, second = base.constants.get(a.name), other.constants.get(b.name)
            if first is None or second is None or max(first.size, second.size) > SMALL:
                continue
            if one.op == "RandomBits" or mx.issubdtype(a.dtype, mx.inexact):
                if (a.name, b.name) not in seen:
                    seen[a.name, b.name] = mx.array_equal(first, second, equal_nan=True)
                asked.append((key, seen[a.name, b.name]))
    mx.eval(list(seen.values()))
    return {key for key, equal in asked if not equal.item()}


def _others(traces: Traces) -> Iterator[str]:
    """Graphs that compute numbers by other operations than the base graph."""
    base = _computing(traces.base)
    for what, graph in [
        *traces.varied.items(),
        *((_counted(n), g) for n, g in traces.by_rows.items()),
    ]:
        own = _computing(graph)
        if own != base:
            more = ", ".join(f"{count} {op} more" for op, count in sorted((own - base).items()))
            less = ", ".join(f"{count} {op} fewer" for op, count in sorted((base - own).items()))
            name = f"with another {what}" if what in traces.varied else f"at {what}"
            yield f"other operations {name} than at {BASE.rows} rows: {', '.join(filter(None, (more, less)))}"


def _counted(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


def _computing(graph: Graph) -> Counter[str]:
    """Operations from numbers to numbers; our own kernels launch as many as they like."""
    return Counter(
        node.op
        for node in graph.nodes
        if node.op not in MOVED
        and node.op != "CustomKernel"
        and _any_numbers(node.inputs)
        and _any_numbers(node.outputs)
    )


def _any_numbers(values: Sequence[Value]) -> bool:
    return any(mx.issubdtype(value.dtype, mx.inexact) for value in values)


def reduced_length(node: Node) -> int | None:
    """How many values an operation brings together in one, None where it takes them one by one."""
    if not node.inputs:
        return None
    shape = node.inputs[0].shape
    if node.op in ("Matmul", "AddMM", "QuantizedMatmul", "GatherMM", "GatherQMM") or node.op in LAST_AXIS:
        return shape[-1]
    if node.op == "Reduce":
        return math.prod(shape[axis] for axis in node.arguments[1])
    if node.op in AXIS_ARGUMENT:
        return shape[node.arguments[AXIS_ARGUMENT[node.op]]]
    if node.op == "ScaledDotProductAttention":
        return node.inputs[1].shape[-2]
    return None


LAST_AXIS = ("Softmax", "LogSumExp", "RMSNorm", "LayerNorm")
AXIS_ARGUMENT = {"Scan": 1, "ArgReduce": 1, "ArgPartition": 1, "Partition": 1, "ArgSort": 0, "Sort": 0}
