"""Which operations a loaded target and drafter are made of: one name for all that have the same shape and format.

The names are what the chooser's table, the self-test's and the race's persisted results have in common.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.config import FULL, SLIDING, TextConfig
from mlx_mtp.drafter import Drafter
from mlx_mtp.layers import Experts, Layer
from mlx_mtp.quantization import QuantFormat
from mlx_mtp.target import Target
from mlx_mtp.weights import DenseWeight, QuantizedWeight, Weight

PROJECT, EXPERTS, ATTEND, ATTEND_TILED = "project", "experts", "attend", "attend_tiled"
HEAD_CHOOSE, CENTROID_CHOOSE = "head_choose", "centroid_choose"
NORM_ROTATE, ADD_NORM = "norm_rotate", "add_norm"


@dataclass(frozen=True, slots=True)
class Operation:
    """What a kernel computes, in which sizes, on which format.

    shape: project and head_choose (K, N); experts (H, width of an expert, experts, top_k); attend and attend_tiled
    (heads, kv_heads, head_dim, window or 0); centroid_choose (H, clusters, tokens of one, top_k); norm_rotate
    (head_dim); add_norm (H). format: of the weights, then the activations' type.
    """

    name: str
    shape: tuple[int, ...]
    format: str

    def __str__(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape))}, {self.format}"


class AttentionShape(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    dtype: mx.Dtype

    @property
    def group(self) -> int:
        """Query heads that share a K/V head."""
        return self.heads // self.kv_heads


class Projected(NamedTuple):
    """A matrix with the type of the rows it is multiplied with."""

    weight: Weight
    dtype: mx.Dtype


class Routed(NamedTuple):
    """The experts of one layer with the type of their rows."""

    experts: Experts
    dtype: mx.Dtype


class Clustered(NamedTuple):
    """A drafter's clustered head with the type of its rows."""

    centroids: Weight
    members: mx.array
    top_k: int
    table: Weight
    dtype: mx.Dtype


class HeadSize(NamedTuple):
    """Heads that are normed and rotated."""

    head_dim: int
    dtype: mx.Dtype


class RowSize(NamedTuple):
    """Rows that are normed and added."""

    width: int
    dtype: mx.Dtype


# One example of what an Operation stands for.
Subject = Projected | Routed | AttentionShape | Clustered | HeadSize | RowSize


def operations_of(target: Target, drafter: Drafter | None) -> dict[Operation, Subject]:
    """Every operation of the pair's passes that a kernel may compute, once each, with an example."""
    dtype = target.dtype
    subjects: list[tuple[str, Subject]] = [
        (PROJECT, Projected(weight, dtype)) for weight in _projected(target, drafter)
    ]
    subjects += [
        (EXPERTS, Routed(layer.experts, dtype)) for layer in target.layers if layer.experts is not None
    ]
    own = attention_shapes(target.text, target.text, dtype)
    subjects += [(ATTEND, shape) for shape in own.values()]
    subjects += [(NORM_ROTATE, HeadSize(shape.head_dim, dtype)) for shape in own.values()]
    subjects.append((ADD_NORM, RowSize(target.text.hidden_size, dtype)))
    # In a prefill the last layer with K/V of its own, and those after it, compute one row only.
    tiled = set(target.text.layer_types[: target.text.first_shared_layer - 1])
    subjects += [(ATTEND_TILED, shape) for kind, shape in own.items() if kind in tiled]
    subjects.append((HEAD_CHOOSE, Projected(target.embedding, dtype)))
    if drafter is not None:
        theirs = attention_shapes(target.text, drafter.text, dtype)
        subjects += [(ATTEND, shape) for shape in theirs.values()]
        subjects += [(NORM_ROTATE, HeadSize(shape.head_dim, dtype)) for shape in theirs.values()]
        subjects.append((ADD_NORM, RowSize(drafter.text.hidden_size, dtype)))
        subjects.append(head_of(drafter, dtype))
    found: dict[Operation, Subject] = {}
    for name, subject in subjects:
        found.setdefault(operation_of(name, subject), subject)
    return found


def operation_of(name: str, subject: Subject) -> Operation:
    """The name of what one example stands for."""
    if isinstance(subject, Projected):
        outputs, inputs = subject.weight.shape
        form = format_of(subject.weight)
        shape: tuple[int, ...] = (inputs, outputs)
    elif isinstance(subject, Routed):
        experts = subject.experts
        count, width, hidden = experts.gate.shape
        forms = [format_of(weight) for weight in (experts.router, experts.gate, experts.up, experts.down)]
        form = forms[1] if len(set(forms[1:])) == 1 else ", ".join(forms[1:])
        form += f", router {forms[0]}"
        shape = (hidden, width, count, experts.top_k)
    elif isinstance(subject, Clustered):
        form = f"{format_of(subject.centroids)}, table {format_of(subject.table)}"
        shape = (subject.centroids.shape[1], *subject.members.shape, subject.top_k)
    elif isinstance(subject, HeadSize):
        form, shape = "heads", (subject.head_dim,)
    elif isinstance(subject, RowSize):
        form, shape = "rows", (subject.width,)
    else:
        form, shape = "K/V", (*subject[:3], subject.window or 0)
    return Operation(name, shape, f"{form}, {_name(subject.dtype)}")


def head_of(drafter: Drafter, dtype: mx.Dtype) -> tuple[str, Subject]:
    """How the drafter's head chooses a token."""
    head = drafter.centroid_head
    if head is None:
        return HEAD_CHOOSE, Projected(drafter.embedding, dtype)
    return CENTROID_CHOOSE, Clustered(head.centroids, head.members, head.top_k, drafter.embedding, dtype)


def format_of(weight: Weight) -> str:
    if isinstance(weight, DenseWeight):
        return _name(weight.dtype)
    assert isinstance(weight, QuantizedWeight)
    return str(QuantFormat(weight.bits, weight.group_size, weight.mode))


def attention_shapes(target: TextConfig, reader: TextConfig, dtype: mx.Dtype) -> dict[str, AttentionShape]:
    """How `reader`'s heads look at the target's K/V, by attention type."""
    windows = {SLIDING: target.sliding_window, FULL: None}
    return {
        kind: AttentionShape(
            reader.num_heads, reader.kv_heads_of(kind), reader.head_dim_of(kind), window, dtype
        )
        for kind, window in windows.items()
    }


def _projected(target: Target, drafter: Drafter | None) -> Iterator[Weight]:
    """Every matrix that `kernels.project` multiplies by, repetitions included."""
    yield target.embedding
    if target.per_layer is not None:
        yield target.per_layer.projection
    for layer in target.layers:
        yield from _of_layer(layer)
    if drafter is None:
        return
    yield from (drafter.pre_projection, drafter.post_projection)
    yield drafter.embedding if drafter.centroid_head is None else drafter.centroid_head.centroids
    for layer in drafter.layers:
        yield from _of_layer(layer)


def _of_layer(layer: Layer) -> Iterator[Weight]:
    yield layer.q_proj
    yield from (weight for weight in (layer.k_proj, layer.v_proj) if weight is not None)
    yield from (layer.o_proj, layer.gate_proj, layer.up_proj, layer.down_proj)
    if layer.experts is not None:
        yield layer.experts.router
    if layer.per_layer_input is not None:
        yield from (layer.per_layer_input.gate, layer.per_layer_input.projection)


def _name(dtype: mx.Dtype) -> str:
    """mlx.core.bfloat16 -> bfloat16."""
    return str(dtype).rpartition(".")[2]
