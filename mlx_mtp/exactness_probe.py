"""Bitwise comparisons on this machine: a row's bits in passes of 1 to 17 rows, by operation and in whole passes.

The operations are the ones that a pass calls, through its `Kernels`, on the target's own weights.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.config import FULL, SLIDING
from mlx_mtp.exactness_rules import Measured
from mlx_mtp.kernels.operations import (
    ADD_NORM,
    ATTEND,
    EXPERTS,
    NORM_ROTATE,
    PROJECT,
    AttentionShape,
    HeadSize,
    Projected,
    Routed,
    operations_of,
)
from mlx_mtp.prefill import prefill
from mlx_mtp.sampling import Sampling, sampler_class, sampling_arrays
from mlx_mtp.state import MAX_DRAFT_TOKENS, KeysValues, new_kv, ring_rows
from mlx_mtp.target import Target, logits_of
from mlx_mtp.verify import sights_of, verify

ROWS = tuple(range(1, 18))
FEWER_ROWS = (1, 2, 3, 5, 8, 9, 16, 17)  # for matrices of many megabytes, most of all the head
LARGE = 2**24  # weights
PROMPT_ROWS = 24
SPLITS = ((1,) * (MAX_DRAFT_TOKENS + 1), (2,) * 8, (5, 4, 4, 3), (MAX_DRAFT_TOKENS + 1,))
LONG_BUCKETS = (256, 512)


def measure(target: Target) -> Measured:
    """Compare every kind of operation that a pass of the target calls; some seconds for a large model on a CPU."""
    products: dict[tuple[int, int], bool] = {}
    attention: dict[int, bool] = {}
    mixture: bool | None = None
    rotation: bool | None = None
    addition: bool | None = None
    for operation, subject in operations_of(target, None).items():
        if operation.name == PROJECT:
            assert isinstance(subject, Projected)
            size = (operation.shape[0], operation.shape[1])
            products[size] = products.get(size, True) and _product_is_equal(target, subject)
        elif operation.name == EXPERTS:
            assert isinstance(subject, Routed)
            mixture = (mixture is not False) and _mixture_is_equal(target, subject)
        elif operation.name == ATTEND:
            assert isinstance(subject, AttentionShape)
            equal = _attention_is_equal(target, subject)
            attention[subject.head_dim] = attention.get(subject.head_dim, True) and equal
        elif operation.name == NORM_ROTATE:
            assert isinstance(subject, HeadSize)
            rotation = (rotation is not False) and _rotation_is_equal(target, subject)
        elif operation.name == ADD_NORM:
            addition = _addition_is_equal(target)
    choice = None if target.kernels.head_choose is None else _choice_is_equal(target)
    return Measured(products, attention, _masked_is_equal(target.dtype), mixture, choice, rotation, addition)


def _product_is_equal(target: Target, subject: Projected) -> bool:
    columns, depth = subject.weight.shape
    sizes = FEWER_ROWS if columns * depth > LARGE else ROWS
    x = _normal((ROWS[-1], depth), subject.dtype, 1)
    return _prefixes_are_equal([target.kernels.project(subject.weight, x[:rows]) for rows in sizes])


def _mixture_is_equal(target: Target, subject: Routed) -> bool:
    x = _normal((ROWS[-1], subject.experts.gate.shape[-1]), subject.dtype, 2)
    kernels, eps = target.kernels, target.text.rms_norm_eps
    return _prefixes_are_equal(
        [kernels.experts(subject.experts, x[:rows], eps, kernels.project) for rows in ROWS]
    )


def _rotation_is_equal(target: Target, subject: HeadSize) -> bool:
    """Two heads of each row, and their values."""
    dim, eps = subject.head_dim, target.text.rms_norm_eps
    raw, values = (_normal((1, ROWS[-1], 2, dim), subject.dtype, seed) for seed in (8, 9))
    gain = _normal((dim,), subject.dtype, 10)
    kinds = {target.text.head_dim_of(kind): kind for kind in target.ropes}
    passes = []
    for rows in ROWS:
        rotation = target.ropes[kinds[dim]].at(PROMPT_ROWS, rows)
        both = target.kernels.norm_rotate(raw[:, :rows], gain, rotation, eps, values[:, :rows])
        passes.append(mx.stack([part[0] for part in both if part is not None], axis=1))
    return _prefixes_are_equal(passes)


def _addition_is_equal(target: Target) -> bool:
    """All three ways in which a layer adds to its rows."""
    width, eps = target.text.hidden_size, target.text.rms_norm_eps
    x, y = (_normal((ROWS[-1], width), target.dtype, seed) for seed in (11, 12))
    gain, scalar = _normal((width,), target.dtype, 13), mx.array([0.6], target.dtype)
    add, passes = target.kernels.add_norm, []
    for rows in ROWS:
        own = (x[:rows], y[:rows], gain, eps)
        made = [*add(*own), *add(*own, scalar=scalar), *add(*own, then=gain)]
        passes.append(mx.concatenate([part for part in made if part is not None], axis=-1))
    return _prefixes_are_equal(passes)


def _choice_is_equal(target: Target) -> bool:
    """Tokens of 17 rows, chosen without logits in memory: greedy, and drawn from 64 candidates."""
    assert target.kernels.head_choose is not None, "the caller has looked"
    hidden = _normal((1, ROWS[-1], target.text.hidden_size), target.dtype, 7)
    positions = mx.arange(ROWS[-1], dtype=mx.int32)[None]
    for sampling in (Sampling(temperature=0.0), Sampling(temperature=1.0, top_k=64, top_p=0.95)):
        settings = sampling_arrays(sampling, target.text.vocab_size)
        chosen = [
            target.kernels.head_choose(
                target.embedding,
                target.text.final_logit_softcapping,
                hidden[:, :rows],
                positions[:, :rows],
                mx.array([11], mx.uint32),
                settings,
                sampler_class([sampling]),
            )[0][0]
            for rows in ROWS
        ]
        if not _prefixes_are_equal(chosen):
            return False
    return True


def _prefixes_are_equal(passes: Sequence[mx.array]) -> bool:
    """Passes [M, ...] over the first M rows of the same: all as in the longest one, in place and one by one."""
    longest = passes[-1]
    equal = [mx.array_equal(longest[: len(rows)], rows) for rows in passes]
    mx.eval(equal)
    return all(bool(one) for one in equal)


class _Look(NamedTuple):
    """How one pass looks at K/V: its first row (of 16), how many rows, and what must not matter."""

    first: int = 0
    rows: int = MAX_DRAFT_TOKENS + 1
    bucket: int = LONG_BUCKETS[0]
    batch: int = 1
    dead: float = 0.0  # what unseen slots hold


def _attention_is_equal(target: Target, shape: AttentionShape) -> bool:
    """16 rows at once against passes of every size, another bucket, a neighbour in the batch, and other dead slots."""
    all_rows = MAX_DRAFT_TOKENS + 1
    expected = _attended(target, shape, _Look())
    looks = [_Look(rows=rows) for rows in range(1, all_rows)]
    looks += [_Look(first=first, rows=1) for first in range(1, all_rows)]
    looks += [
        _Look(batch=2),
        _Look(dead=3.0),
        _Look(bucket=LONG_BUCKETS[1]),
        _Look(rows=1, bucket=LONG_BUCKETS[1]),
    ]
    equal = [
        mx.array_equal(expected[look.first : look.first + look.rows], _attended(target, shape, look))
        for look in looks
    ]
    mx.eval(equal)
    return all(bool(one) for one in equal)


def _attended(target: Target, shape: AttentionShape, look: _Look) -> mx.array:
    """Rows [rows, heads * D] of the last batch member; K/V hold 16 rows beyond a ring that has gone round once."""
    text, all_rows = target.text, MAX_DRAFT_TOKENS + 1
    kind = SLIDING if shape.window is not None else FULL
    ring = ring_rows(text)
    start = ring + 7 if kind == SLIDING else LONG_BUCKETS[0] - all_rows
    rows = ring if kind == SLIDING else 2 * LONG_BUCKETS[1]
    queries = _normal((1, all_rows, shape.heads, shape.head_dim), shape.dtype, 3).transpose(0, 2, 1, 3)
    buffers = [_normal((1, shape.kv_heads, rows, shape.head_dim), shape.dtype, seed) for seed in (4, 5)]
    unseen = _unseen(start, all_rows, rows, shape.window)
    queries, *buffers = (
        mx.concatenate([_normal(array.shape, shape.dtype, 6)] * (look.batch - 1) + [array])
        for array in (
            queries,
            *(mx.where(unseen, look.dead, buffer).astype(shape.dtype) for buffer in buffers),
        )
    )
    position = mx.array([start + look.first] * look.batch, mx.int32)
    sight = sights_of(text, text, position, look.rows, look.bucket)[kind]
    own = queries[:, :, look.first : look.first + look.rows]
    out = target.kernels.attend(own, buffers[0], buffers[1], sight)
    return out.reshape(look.batch, look.rows, -1)[-1]


def _masked_is_equal(dtype: mx.Dtype) -> bool:
    """A softmax over 256 keys against the same with 256 more that are masked, for 1 to 17 rows."""
    short, long = LONG_BUCKETS
    scores = _normal((ROWS[-1], short), dtype, 8)
    lowest = mx.full((ROWS[-1], long - short), mx.finfo(dtype).min, dtype)
    padded = mx.concatenate([scores, lowest], axis=-1)
    passes = [mx.softmax(padded[:rows], axis=-1, precise=True)[:, :short] for rows in ROWS]
    return _prefixes_are_equal([*passes, mx.softmax(scores, axis=-1, precise=True)])


def _unseen(start: int, count: int, rows: int, window: int | None) -> mx.array:
    """[rows, 1] True where no row from position `start` on sees the slot."""
    seen = range(0 if window is None else start - window + 1, start + count)
    slots = {position % rows for position in seen}
    return mx.array([slot not in slots for slot in range(rows)])[:, None]


def _normal(shape: Sequence[int], dtype: mx.Dtype, seed: int) -> mx.array:
    return mx.random.normal(list(shape), key=mx.random.key(seed)).astype(dtype)


def rows_are_invariant(target: Target) -> bool:
    """Whether logits and K/V of 16 rows are bitwise equal in passes of 1, 2, 3-5 and 16 rows, in two buckets and as
    one of two rows of a batch.
    """
    vocab = target.text.vocab_size
    ids = [(i * 7919 + 3) % vocab for i in range(PROMPT_ROWS + MAX_DRAFT_TOKENS + 1)]
    expected = rows_in_passes(target, ids, SPLITS[0], bucket=256, batch=1)
    others = [(split, 256, 1) for split in SPLITS[1:]] + [(SPLITS[0], 512, 1), (SPLITS[2], 256, 2)]
    return all(
        bool(mx.array_equal(expected, rows_in_passes(target, ids, split, bucket=bucket, batch=batch)))
        for split, bucket, batch in others
    )


def rows_in_passes(
    target: Target, ids: list[int], split: tuple[int, ...], *, bucket: int, batch: int
) -> mx.array:
    """Logits [16, V] of the ids after the prompt, in passes of the sizes in `split`; the last of `batch` equal rows."""
    kv_list = list(new_kv(target, 512))
    prefill(target, kv_list, ids[:PROMPT_ROWS])
    kv: KeysValues = tuple((mx.repeat(k, batch, axis=0), mx.repeat(v, batch, axis=0)) for k, v in kv_list)
    done, logits = PROMPT_ROWS, []
    for rows in split:
        tokens = mx.array([ids[done : done + rows]] * batch, mx.uint32)
        hidden, kv = verify(target, tokens, kv, mx.array([done] * batch, mx.int32), bucket=bucket)
        logits.append(logits_of(target, hidden)[-1])
        done += rows
    out = mx.concatenate(logits)
    mx.eval(out)
    return out
