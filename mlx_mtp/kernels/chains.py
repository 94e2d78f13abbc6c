"""Dependent chains of one operation, as a pass makes them: each link waits for the one before it.

A chain walks through copies of the weights, more bytes than a chip's caches keep. Between two links stands one small
operation, which all arms of a race pay alike.
"""

import math
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import mlx.core as mx

from mlx_mtp.attention import attend, attend_tiled
from mlx_mtp.kernels.head_trials import CAP, GREEDY
from mlx_mtp.kernels.operations import (
    ADD_NORM,
    ATTEND,
    ATTEND_TILED,
    CENTROID_CHOOSE,
    EXPERTS,
    HEAD_CHOOSE,
    NORM_ROTATE,
    PROJECT,
    AttentionShape,
    Clustered,
    HeadSize,
    Projected,
    Routed,
    RowSize,
    Subject,
)
from mlx_mtp.kernels.specimens import Description, bytes_of, normal, sight_of, specimen
from mlx_mtp.kernels.table import project
from mlx_mtp.kernels.trials import EPS, Op
from mlx_mtp.layers import Rope, add_norm, mixture, norm_rotate
from mlx_mtp.sampling import choose, sampler_class, sampling_arrays
from mlx_mtp.weights import Weight

LINKS = 16
LONG_LINKS = 4  # of operations with more bytes than a chip's caches
LARGEST_COPY = 32 << 20  # bytes: of larger matrices fewer columns are timed
WALKED = 256 << 20  # bytes of all copies
MOST_COPIES = 8
ROTATED_HEADS = 8
CONTEXT = 2048  # positions before the rows, where attention has no window

Chain = Callable[[Op], mx.array]


def chain_of(name: str, description: Description, rows: int) -> Chain:
    """A function that builds the chain with a given kernel or stock operation, lazily."""
    copies = _copies(name, description)
    links = LONG_LINKS if len(copies) == 1 else LINKS
    subject = copies[0]
    if isinstance(subject, AttentionShape):
        return _attention(name, subject, rows, links)
    if isinstance(subject, RowSize):
        return _additions(subject, rows)
    if isinstance(subject, HeadSize):
        return _rotations(subject, rows)
    x = normal((rows, _width(subject)), subject.dtype, seed=201)
    link = _head_link if name in (HEAD_CHOOSE, CENTROID_CHOOSE) else _row_link
    mx.eval(x)

    def build(op: Op) -> mx.array:
        after = x
        for copy in islice(cycle(copies), links):
            after = link(op, copy, after)
        return after

    return build


def stock_of(name: str) -> Op:
    """What a pass calls where no kernel of ours is used."""
    return STOCK[name]


def _copies(name: str, description: Description) -> list[Subject]:
    columns = None
    if name == PROJECT:
        whole = bytes_of(description)
        n = description["weight"]["shape"][0]
        columns = max(64, n * LARGEST_COPY // whole) if whole > LARGEST_COPY else None
    count = min(MOST_COPIES, math.ceil(WALKED / max(1, bytes_of(description, columns))))
    return [specimen(description, seed=300 + 10 * i, columns=columns) for i in range(count)]


def _width(subject: Projected | Routed | Clustered) -> int:
    if isinstance(subject, Routed):
        return int(subject.experts.gate.shape[-1])
    weight = subject.weight if isinstance(subject, Projected) else subject.centroids
    return weight.shape[1]


def _row_link(op: Op, subject: Subject, x: mx.array) -> mx.array:
    """Rows that need the last result."""
    if isinstance(subject, Routed):
        return x + op(subject.experts, x, EPS, project)
    assert isinstance(subject, Projected), "attention has a chain of its own"
    return x + op(subject.weight, x)[:, :1]


def _head_link(op: Op, subject: Subject, x: mx.array) -> mx.array:
    """Each row chosen for as one of M, or as the only one of its member where there are clusters."""
    is_clustered = isinstance(subject, Clustered)
    batch = x.shape[0] if is_clustered else 1
    hidden = x.reshape(batch, -1, x.shape[-1])
    positions = mx.broadcast_to(mx.arange(hidden.shape[1], dtype=mx.int32), hidden.shape[:2])
    sampling = {key: mx.repeat(array, batch, axis=0) for key, array in sampling_arrays(GREEDY, 1).items()}
    head: tuple[Any, ...] = subject[:4] if isinstance(subject, Clustered) else (subject[0], CAP)
    seed = mx.zeros((batch,), mx.uint32)
    tokens, _ = op(*head, hidden, positions, seed, sampling, sampler_class([GREEDY]))
    return x + (tokens.reshape(-1, 1) < 0).astype(x.dtype)


def _attention(name: str, shape: AttentionShape, rows: int, links: int) -> Chain:
    """Rows behind CONTEXT positions, or behind a whole window."""
    before = CONTEXT if shape.window is None else shape.window
    held = before + rows
    queries = normal((1, rows, shape.heads, shape.head_dim), shape.dtype, seed=202).transpose(0, 2, 1, 3)
    one = 2 * held * shape.kv_heads * shape.head_dim * shape.dtype.size
    count = min(MOST_COPIES, math.ceil(WALKED / one))
    size = (1, shape.kv_heads, held, shape.head_dim)
    buffers = [[normal(size, shape.dtype, seed=210 + 2 * i + j) for j in range(2)] for i in range(count)]
    sight = sight_of(shape, mx.array([before], mx.int32), rows, held, held)
    mx.eval(queries, buffers, sight.first, sight.mask)
    links = links if name == ATTEND else LONG_LINKS

    def build(op: Op) -> mx.array:
        asked = queries
        for keys, values in islice(cycle(buffers), links):
            if name == ATTEND:
                out = op(asked, keys, values, sight)
            else:
                out = op(asked, keys, values, before, 0, shape.window)
            asked = queries + out.reshape(1, rows, shape.heads, shape.head_dim).transpose(0, 2, 1, 3)
        return asked

    return build


def _rotations(subject: HeadSize, rows: int) -> Chain:
    """Keys and values of a layer with ROTATED_HEADS of them."""
    raw, values = normal((2, 1, rows, ROTATED_HEADS, subject.head_dim), subject.dtype, seed=203)
    gain = normal((subject.head_dim,), subject.dtype, seed=204)
    half = subject.head_dim // 2
    rotation = Rope(10_000.0 ** (-mx.arange(half) / half)).at(CONTEXT, rows)
    mx.eval(raw, values, gain, rotation)

    def build(op: Op) -> mx.array:
        keys = raw
        for _ in range(LINKS):
            keys, normed = op(keys, gain, rotation, EPS, values)
            keys = keys + normed
        return keys

    return build


def _additions(subject: RowSize, rows: int) -> Chain:
    """As a layer has them: one normed again, one scaled."""
    x = normal((rows, subject.width), subject.dtype, seed=205)
    gain = normal((subject.width,), subject.dtype, seed=206)
    scalar = mx.array([0.5], subject.dtype)
    mx.eval(x, gain, scalar)

    def build(op: Op) -> mx.array:
        after = x
        for _ in range(LINKS):
            after, normed = op(after, x, gain, EPS, then=gain)
            after, _ = op(after, normed, gain, EPS, scalar=scalar)
        return after

    return build


def _stock_head(weight: Weight, cap: float | None, hidden: mx.array, *how: Any) -> tuple[mx.array, mx.array]:
    logits = weight.project(hidden)
    return choose(logits if cap is None else mx.tanh(logits / cap) * cap, *how)


def _stock_clusters(
    centroids: Weight, members: mx.array, top_k: int, table: Weight, row: mx.array, *how: Any
) -> tuple[mx.array, mx.array]:
    """As `drafter.draft_logits` has it."""
    best = mx.argpartition(centroids.project(row), kth=-top_k, axis=-1)[..., -top_k:]
    ids = members[best].reshape(*row.shape[:2], -1)
    return choose((table.rows(ids) @ row[..., None])[..., 0], *how, ids=ids)


STOCK: dict[str, Op] = {
    PROJECT: project,
    EXPERTS: mixture,
    ATTEND: attend,
    ATTEND_TILED: attend_tiled,
    NORM_ROTATE: norm_rotate,  # type: ignore[dict-item]
    ADD_NORM: add_norm,  # type: ignore[dict-item]
    HEAD_CHOOSE: _stock_head,  # type: ignore[dict-item]  # two arrays
    CENTROID_CHOOSE: _stock_clusters,  # type: ignore[dict-item]
}
