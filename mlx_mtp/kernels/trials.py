"""The same rows in every company: what a kernel's result must be near to, and what must not change a bit of it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_mtp.kernels.head_trials import choose_rows, head_rows, why_other_tokens
from mlx_mtp.kernels.operations import (
    ATTEND,
    ATTEND_TILED,
    CENTROID_CHOOSE,
    HEAD_CHOOSE,
    AttentionShape,
    Clustered,
    HeadSize,
    Projected,
    Routed,
    RowSize,
    Subject,
)
from mlx_mtp.kernels.specimens import name_of, normal, sight_of
from mlx_mtp.kernels.table import project
from mlx_mtp.layers import Rope, Rotation

Op = Callable[..., mx.array]  # a kernel or its reference, called as a pass calls it

EPS = 1e-6
KEYS = 600  # of a full buffer: more than two partitions
WRAPPED = 40  # positions by which a ring has gone round
# What a unit in the last place may be of a value: the reference and the kernel round once each.
LAST_PLACE = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


class Arrangement(NamedTuple):
    """A call on several rows, and which row of the trial each row of its result is."""

    what: str
    run: Callable[[Op], mx.array]
    rows: tuple[int, ...]


class Trial(NamedTuple):
    """`alone(op, row)` gives one row's result [1, N]; `why_far(got, want)` says what is wrong with all of them."""

    alone: Callable[[Op, int], mx.array]
    arrangements: tuple[Arrangement, ...]  # all rows at once first
    why_far: Callable[[mx.array, mx.array], str | None]


def trial_of(name: str, subject: Subject, sizes: Sequence[int]) -> Trial | None:
    """Calls on 1 row and on each of `sizes` rows, in other places of a batch, on other buffers; None: nobody knows."""
    if name in (HEAD_CHOOSE, CENTROID_CHOOSE) and isinstance(subject, Projected | Clustered):
        return _heads(subject, sizes)
    if isinstance(subject, Projected):
        return _products(subject, sizes)
    if isinstance(subject, Routed):
        return _mixtures(subject, sizes)
    if isinstance(subject, RowSize):
        return _additions(subject, sizes)
    if isinstance(subject, HeadSize):
        return _rotations(subject, sizes)
    if isinstance(subject, AttentionShape) and name in (ATTEND, ATTEND_TILED):
        return _attention(subject, sizes) if name == ATTEND else _chunks(subject, sizes)
    return None


def why_far(got: mx.array, want: mx.array, slack: float = 1e-4) -> str | None:
    """What is wrong with a result, None where it is near: within a unit in the last place and `slack` of its row's
    largest value. NaN is near nothing."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"has {got.dtype} {got.shape} instead of {want.dtype} {want.shape}"
    with mx.stream(mx.cpu):
        exact = want.astype(mx.float32)
        allowed = _unit(want.dtype) * mx.abs(exact)
        allowed = allowed + slack * mx.abs(exact).max(axis=-1, keepdims=True)
        off = mx.abs(got.astype(mx.float32) - exact)
        wrong = int(mx.sum(mx.logical_not(off <= allowed)))
        if not wrong:
            return None
        worst = float((off / allowed).max())
    return f"{wrong} of {got.size} values are wrong, by up to {worst:.3g} times what rounding allows"


def _products(subject: Projected, sizes: Sequence[int]) -> Trial:
    weight, count = subject.weight, max(sizes)
    x = normal((count, weight.shape[1]), subject.dtype, seed=101)
    arranged = _at_once(sizes, lambda op, m: op(weight, x[:m]))
    places = _shuffled(count)
    arranged.append(Arrangement("in another order", lambda op: op(weight, x[mx.array(places)]), places))
    half = count // 2
    batch = x[: 2 * half].reshape(2, half, -1)
    arranged.append(
        Arrangement("as a batch of 2", lambda op: _flat(op(weight, batch)), tuple(range(2 * half)))
    )
    return Trial(lambda op, i: op(weight, x[i : i + 1]), tuple(arranged), why_far)


def _mixtures(subject: Routed, sizes: Sequence[int]) -> Trial:
    experts, count = subject.experts, max(sizes)
    x = _decided_rows(subject, count)

    def call(op: Op, rows: mx.array) -> mx.array:
        return op(experts, rows, EPS, project)

    arranged = _at_once(sizes, lambda op, m: call(op, x[:m]))
    places = _shuffled(count)
    arranged.append(Arrangement("in another order", lambda op: call(op, x[mx.array(places)]), places))
    alike = (0,) * count
    arranged.append(Arrangement("all rows alike", lambda op: call(op, x[mx.array(alike)]), alike))
    # Gated values and weights are rounded too, each by at most half a unit in the last place.
    slack = 2 * _unit(subject.dtype) + 1e-4
    return Trial(lambda op, i: call(op, x[i : i + 1]), tuple(arranged), partial(why_far, slack=slack))


def _decided_rows(subject: Routed, count: int) -> mx.array:
    """Rows [count, H] whose best experts are clear of the others: no rounding of a score chooses another one."""
    experts = subject.experts
    pool = normal((8 * count, experts.gate.shape[-1]), subject.dtype, seed=102)
    with mx.stream(mx.cpu):
        normed = mx.fast.rms_norm(pool, experts.router_norm, EPS).astype(mx.float32)
        scores = mx.sort(normed @ _dense(experts.router).swapaxes(-1, -2), axis=-1)
        best, next_best = scores[:, -experts.top_k], scores[:, -experts.top_k - 1 :][:, 0]
        clear = best - next_best - 4 * _unit(subject.dtype) * mx.abs(scores).max(axis=-1)
        chosen = mx.argsort(-clear)[:count]
        mx.eval(chosen)
    return pool[chosen]


def _dense(weight: Any) -> mx.array:
    """[N, K] in float32."""
    return weight.rows(mx.arange(weight.shape[0])).astype(mx.float32)


def _attention(shape: AttentionShape, sizes: Sequence[int]) -> Trial:
    count, span = max(sizes), KEYS if shape.window is None else shape.window + WRAPPED
    span += count
    queries = normal((1, shape.heads, count, shape.head_dim), shape.dtype, seed=103)
    table = normal((2, 2, shape.kv_heads, span, shape.head_dim), shape.dtype, seed=104)  # (K, V), members
    begin = span - count
    held = (span if shape.window is None else shape.window + count) + 16

    def call(op: Op, low: int, high: int, held: int = held, members: Sequence[int] = (0,)) -> mx.array:
        rows, bucket = high - low, held - 8
        first = mx.array([begin + low - 7 * member for member in members], mx.int32)
        keys, values = (_laid_out(part[mx.array(list(members))], shape, held) for part in table)
        asked = mx.concatenate([queries[:, :, low:high]] * len(members))
        return op(asked, keys, values, sight_of(shape, first, rows, held, bucket))

    def in_batch(op: Op) -> mx.array:
        return call(op, 0, count, members=(1, 0))[count:]

    everything = tuple(range(count))
    arranged = _at_once(sizes, lambda op, m: call(op, 0, m))
    arranged.append(Arrangement("in a batch of 2", in_batch, everything))
    arranged.append(Arrangement("in longer buffers", lambda op: call(op, 0, count, held + 24), everything))
    return Trial(lambda op, i: call(op, i, i + 1), tuple(arranged), why_far)


def _laid_out(rows: mx.array, shape: AttentionShape, held: int) -> mx.array:
    """Rows of all positions [B, kv_heads, P, D] as a buffer of `held`; what it does not hold yet is NaN."""
    batch, heads, span, dim = rows.shape
    buffer = mx.full((batch, heads, held, dim), mx.nan, rows.dtype)
    positions = mx.arange(span)[-held:]
    buffer[:, :, positions % held if shape.window is not None else positions] = rows[:, :, -len(positions) :]
    return buffer


def _chunks(shape: AttentionShape, sizes: Sequence[int]) -> Trial:
    count, before = max(sizes), KEYS if shape.window is None else shape.window + WRAPPED
    queries = normal((1, shape.heads, count, shape.head_dim), shape.dtype, seed=105)
    keys, values = normal(
        (2, 1, shape.kv_heads, before + count, shape.head_dim), shape.dtype, seed=106
    )  # from position 0 on
    spare = 0 if shape.window is None else before - shape.window + 1

    def call(op: Op, low: int, high: int, skipped: int = 0) -> mx.array:
        asked = queries[:, :, low:high]
        return op(asked, keys[:, :, skipped:], values[:, :, skipped:], before + low, skipped, shape.window)

    arranged = _at_once(sizes, lambda op, m: call(op, 0, m))
    later = tuple(range(count // 2, count))
    arranged.append(
        Arrangement("from the middle on", lambda op: call(op, later[0], count, spare // 2), later)
    )
    return Trial(lambda op, i: call(op, i, i + 1), tuple(arranged), why_far)


def _rotations(subject: HeadSize, sizes: Sequence[int]) -> Trial:
    """Two heads a row, and their values; a row's result is all of it."""
    count, dim = max(sizes), subject.head_dim
    raw, values = normal((2, count, 2, dim), subject.dtype, seed=109)
    gain = 1 + 0.1 * normal((dim,), subject.dtype, seed=110)
    rope = Rope(10_000.0 ** (-mx.arange(dim // 2) / (dim // 2)))
    rotation = rope.at(KEYS, count)

    def call(op: Op, rows: Sequence[int], batch: int = 1) -> mx.array:
        at = mx.array(list(rows))
        turned = Rotation(*(part[0, at].reshape(batch, -1, *part.shape[2:]) for part in rotation))
        heads, own_values = (part[at].reshape(batch, -1, 2, dim) for part in (raw, values))
        both = op(heads, gain, turned, EPS, own_values)
        return mx.concatenate([part.reshape(len(at), -1) for part in both], axis=-1)

    arranged = _at_once(sizes, lambda op, m: call(op, range(m)))
    places, paired = _shuffled(count), tuple(range(count // 2 * 2))
    arranged.append(Arrangement("in another order", lambda op: call(op, places), places))
    arranged.append(Arrangement("as a batch of 2", lambda op: call(op, paired, 2), paired))
    # Rounded after the norm, after the gain and after the rotation, which adds two of them.
    slack = _unit(subject.dtype) + 1e-4
    return Trial(lambda op, i: call(op, [i]), tuple(arranged), partial(why_far, slack=slack))


def _additions(subject: RowSize, sizes: Sequence[int]) -> Trial:
    """Of each row what is added, what is scaled and what is normed again."""
    count, width, dtype = max(sizes), subject.width, subject.dtype
    x, y = normal((2, count, width), dtype, seed=111)
    gain, then = 1 + 0.1 * normal((2, width), dtype, seed=112)
    scalar = mx.array([0.6], dtype)

    def call(op: Op, rows: Sequence[int]) -> mx.array:
        own_x, own_y = (part[mx.array(list(rows))] for part in (x, y))
        made = [op(own_x, own_y, gain, EPS), op(own_x, own_y, gain, EPS, scalar=scalar)]
        parts = [made[0][0], made[1][0], *op(own_x, own_y, gain, EPS, then=then)]
        return mx.concatenate(parts, axis=-1)

    arranged = _at_once(sizes, lambda op, m: call(op, range(m)))
    places = _shuffled(count)
    arranged.append(Arrangement("in another order", lambda op: call(op, places), places))
    # Rounded after the norm, each gain, the addition and the scalar.
    slack = _unit(dtype) + 1e-4
    return Trial(lambda op, i: call(op, [i]), tuple(arranged), partial(why_far, slack=slack))


def _heads(subject: Projected | Clustered, sizes: Sequence[int]) -> Trial:
    count, is_clustered = max(sizes), isinstance(subject, Clustered)
    x = head_rows(subject, count)

    def call(op: Op, rows: Sequence[int], batch: int = 1) -> mx.array:
        return choose_rows(op, subject, x, rows, len(rows) if is_clustered else batch)

    arranged = _at_once(sizes, lambda op, m: call(op, range(m)))
    places, paired = _shuffled(count), tuple(range(count // 2 * 2))
    arranged.append(Arrangement("in another order", lambda op: call(op, places), places))
    arranged.append(Arrangement("as a batch of 2", lambda op: call(op, paired, 2), paired))
    return Trial(lambda op, i: call(op, [i]), tuple(arranged), why_other_tokens)


def _at_once(sizes: Sequence[int], run: Callable[[Op, int], mx.array]) -> list[Arrangement]:
    """`run(op, m)` takes the first m rows; the most first."""

    def of(rows: int) -> Arrangement:
        return Arrangement(f"{rows} rows at once", lambda op: run(op, rows), tuple(range(rows)))

    return [of(rows) for rows in sorted(sizes, reverse=True)]


def _shuffled(count: int) -> tuple[int, ...]:
    order = mx.random.permutation(count, key=mx.random.key(107))
    return tuple(int(place) for place in order)


def _flat(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])


def _unit(dtype: mx.Dtype) -> float:
    return LAST_PLACE[name_of(dtype)]
