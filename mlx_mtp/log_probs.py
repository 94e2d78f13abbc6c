"""How likely the model held each token of a reply, for requests that ask: beside the rounds, which stay as they are.

The probabilities are the model's own: softmax of its logits, before penalties, bias, temperature and filters. They are
computed from the hidden rows of a round that is played as it would be without anybody asking.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import mlx.core as mx

from mlx_mtp.errors import ParameterError
from mlx_mtp.sampling import best_candidates
from mlx_mtp.target import Target, logits_of

MOST_ALTERNATIVES = 20


@dataclass(frozen=True, slots=True)
class TokenLogProbs:
    """Natural logarithm of a token's probability, and those of the most likely tokens in its place, (id, log_prob)."""

    log_prob: float
    best: tuple[tuple[int, float], ...] = ()  # the most likely first; the token itself may be among them


class LogProbRows(NamedTuple):
    """Of the rows that ask, on the device: `rows` says which of the batch's they are."""

    rows: tuple[int, ...]
    chosen: mx.array  # [R, M]
    ids: mx.array  # [R, M, count], count >= 1
    best: mx.array  # [R, M, count]


def check_log_probs(count: int | None) -> int | None:
    """`count` if so many alternatives can be asked for, None for no log_probs; ParameterError otherwise."""
    is_count = isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= MOST_ALTERNATIVES
    if count is not None and not is_count:
        raise ParameterError(
            f"log_probs is a number of alternatives, 0 .. {MOST_ALTERNATIVES}, or None, got {count!r:.40}; "
            "0 gives those of the reply's own tokens alone"
        )
    return count


def log_prob_rows(
    target: Target, hidden: mx.array, tokens: mx.array, asked: Sequence[int | None]
) -> LogProbRows | None:
    """Post-norm hidden [B, M, H] and the tokens [B, M] chosen from it -> log_probs of the rows that ask, lazily.

    asked: for each row how many alternatives, None for no log_probs. One more pass through the head, in float32 from
    the logits on, for those rows alone; None where no row asks.
    """
    rows = tuple(b for b, count in enumerate(asked) if count is not None)
    if not rows:
        return None
    count = max(1, *(asked[b] or 0 for b in rows))  # never none: GPUs get no operation on nothing
    at = mx.array(rows, mx.int32)
    logits = logits_of(target, mx.take(hidden, at, axis=0)).astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    own = mx.take(tokens, at, axis=0)[..., None]
    ids = best_candidates(logits, min(count, logits.shape[-1]))
    chosen = (mx.take_along_axis(logits, own, axis=-1) - total)[..., 0]
    return LogProbRows(rows, chosen, ids, mx.take_along_axis(logits, ids, axis=-1) - total)


def read_log_probs(found: LogProbRows, asked: Sequence[int | None]) -> dict[int, tuple[TokenLogProbs, ...]]:
    """What `log_prob_rows` gave -> by row of the batch, those of each of its tokens; waits for the device."""
    chosen = cast(list[list[float]], found.chosen.tolist())
    ids, best = (
        cast(list[list[list[int]]], found.ids.tolist()),
        cast(list[list[list[float]]], found.best.tolist()),
    )
    return {
        b: tuple(
            TokenLogProbs(own, tuple(zip(names, values, strict=True))[: asked[b]])
            for own, names, values in zip(chosen[r], ids[r], best[r], strict=True)
        )
        for r, b in enumerate(found.rows)
    }
