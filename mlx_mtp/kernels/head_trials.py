"""Rows that a head chooses tokens for, in every company; a row's result is two tokens: the best one, and one drawn."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_mtp.kernels.operations import Clustered, Projected
from mlx_mtp.kernels.specimens import normal
from mlx_mtp.sampling import MAX_CANDIDATES, Sampling, sampler_class, sampling_arrays

CAP = 30.0
GREEDY, DRAWN = Sampling(temperature=0.0), Sampling(temperature=1.0, top_k=MAX_CANDIDATES, top_p=0.95)
BEFORE = 1000  # positions before the first row's
DRAWN_ALIKE = 0.75  # share of draws that rounding must leave as the reference has them


def head_rows(subject: Projected | Clustered, count: int) -> mx.array:
    """Rows [count, H] whose best token is clear of the next, so that no rounding makes another the best."""
    table = subject.weight if isinstance(subject, Projected) else subject.centroids
    pool = normal((8 * count, table.shape[1]), subject.dtype, seed=108)
    with mx.stream(mx.cpu):
        dense = table.rows(mx.arange(table.shape[0])).astype(mx.float32)
        scores = mx.sort(pool.astype(mx.float32) @ dense.swapaxes(-1, -2), axis=-1)
        kept = 1 if isinstance(subject, Projected) else subject.top_k
        clear = scores[:, -kept] - scores[:, -kept - 1 :][:, 0]
        chosen = mx.argsort(-clear)[:count]
        mx.eval(chosen)
    return pool[chosen]


def choose_rows(
    op: Callable[..., Any], subject: Projected | Clustered, x: mx.array, rows: Sequence[int], batch: int
) -> mx.array:
    """Rows `rows` of x [R, H] as `batch` members of equally many rows each -> their tokens [len(rows), 2] uint32."""
    hidden = x[mx.array(list(rows))].reshape(batch, -1, x.shape[-1])
    positions = mx.array([BEFORE + row for row in rows], mx.int32).reshape(batch, -1)
    seed = mx.full((batch,), 77, mx.uint32)
    head: tuple[Any, ...] = (subject.weight, CAP) if isinstance(subject, Projected) else subject[:4]
    tokens = []
    for settings in (GREEDY, DRAWN if _can_draw(subject) else GREEDY):
        arrays = sampling_arrays(settings, 1)
        sampling = {name: mx.repeat(array, batch, axis=0) for name, array in arrays.items()}
        token, valid = op(*head, hidden, positions, seed, sampling, sampler_class([settings]))
        tokens.append(mx.where(valid, token, 2**32 - 1).astype(mx.uint32).reshape(-1))
    return mx.stack(tokens, axis=-1)


def why_other_tokens(got: mx.array, want: mx.array) -> str | None:
    """What is wrong with tokens [R, 2], None where the best ones are the reference's and so are most of the drawn."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"has {got.dtype} {got.shape} instead of {want.dtype} {want.shape}"
    alike = mx.mean(got == want, axis=0)
    best, drawn = float(alike[0]), float(alike[1])
    if best < 1:
        return f"{1 - best:.0%} of the best tokens are not the reference's"
    return None if drawn >= DRAWN_ALIKE else f"{1 - drawn:.0%} of the drawn tokens are not the reference's"


def _can_draw(subject: Projected | Clustered) -> bool:
    """Whether there are as many tokens as a draw has candidates."""
    if isinstance(subject, Projected):
        return subject.weight.shape[0] >= MAX_CANDIDATES
    return subject.top_k * subject.members.shape[1] >= MAX_CANDIDATES
