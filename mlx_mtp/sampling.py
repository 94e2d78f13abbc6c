"""Which token: per-row settings, and noise that depends only on seed, absolute position and token id.

A token is the argmax of its filtered logit plus Gumbel noise. Because the noise at a position is fixed, the drafter,
the verify pass and plain decoding draw the same token from the same logits, whatever the number of drafts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_mtp.errors import ParameterError

MAX_CANDIDATES = 64


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy, top_k 0 and top_p 1 are off, seed None is random."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0.0, 100.0)
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise ParameterError(
                f"top_k must be a whole number >= 0, got {self.top_k!r:.60}; use 0 to turn it off"
            )
        _check_number("top_p", self.top_p, 0.0, 1.0, above_low=True)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above_low=True)
        _check_number("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check_number("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool)):
            raise ParameterError(
                f"seed must be a whole number or None, got {self.seed!r:.60}; leave it out for a random one"
            )

    @property
    def penalises(self) -> bool:
        return bool(self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty)


def _check_number(name: str, value: float, low: float, high: float, *, above_low: bool = False) -> None:
    inside = isinstance(value, int | float) and low <= value <= high  # false for NaN
    if not inside or (above_low and value == low):
        bracket = "(" if above_low else "["
        raise ParameterError(
            f"{name} must be in {bracket}{low:g}, {high:g}], got {value!r:.60}; choose a value in that range"
        )


@dataclass(frozen=True, slots=True)
class SamplerClass:
    """What a batch needs computed; part of the compile key. A row's token does not depend on the others' needs."""

    greedy: bool
    candidates: bool  # every sampled row has top_k in 1 .. MAX_CANDIDATES
    top_k: bool
    top_p: bool
    min_p: bool
    penalties: bool
    bias: bool

    @property
    def decided_by_best(self) -> bool:
        """Whether the MAX_CANDIDATES largest logits are all that a choice depends on."""
        return (self.greedy or self.candidates) and not self.penalties and not self.bias


def sampler_class(rows: list[Sampling]) -> SamplerClass:
    """The cheapest class that serves all rows of a batch."""
    drawn = [row for row in rows if row.temperature > 0]
    return SamplerClass(
        greedy=not drawn,
        candidates=bool(drawn) and all(1 <= row.top_k <= MAX_CANDIDATES for row in drawn),
        top_k=any(row.top_k for row in drawn),
        top_p=any(row.top_p < 1 for row in drawn),
        min_p=any(row.min_p > 0 for row in drawn),
        penalties=any(row.penalises for row in rows),
        bias=any(row.logit_bias for row in rows),
    )


def sampling_arrays(row: Sampling, vocab_size: int, *, with_bias: bool = False) -> dict[str, mx.array]:
    """One row's settings as arrays with a leading axis of 1; `bias` [1, V] only where some row has one."""
    arrays = {
        "temperature": mx.array([row.temperature], mx.float32),
        "top_k": mx.array([min(row.top_k, vocab_size) or vocab_size], mx.int32),
        "top_p": mx.array([row.top_p], mx.float32),
        "min_p": mx.array([row.min_p], mx.float32),
        "repetition": mx.array([row.repetition_penalty], mx.float32),
        "presence": mx.array([row.presence_penalty], mx.float32),
        "frequency": mx.array([row.frequency_penalty], mx.float32),
    }
    if with_bias or row.logit_bias:
        arrays["bias"] = mx.array(dense_bias(row.logit_bias or {}, vocab_size))[None]
    return arrays


def dense_bias(logit_bias: Mapping[int, float], vocab_size: int) -> np.ndarray:
    """{token id: bias} -> float32 [V]; ids outside the vocabulary are refused."""
    bias = np.zeros(vocab_size, np.float32)
    for token, value in logit_bias.items():
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ParameterError(
                f"logit_bias ids must be in 0 .. {vocab_size - 1}, got {token!r:.60}; remove that entry"
            )
        # A whole number that no float32 holds would overflow below; an infinity is a float and stays one.
        too_large = isinstance(value, int) and abs(value) >= 2**127
        if not isinstance(value, int | float) or value != value or too_large:
            raise ParameterError(
                f"logit_bias values must be numbers, got {str(value)[:40]} for id {token}; correct that entry"
            )
        bias[token] = value
    return bias


def fold_seed(seed: int) -> int:
    """Any whole number -> 32 bits; negative seeds and seeds of 64 bits and more are folded, not refused."""
    seed &= (1 << 64) - 1
    return (seed ^ (seed >> 32)) & 0xFFFFFFFF


def choose(
    logits: mx.array,
    positions: mx.array,
    seed: mx.array,
    sampling: dict[str, mx.array],
    sampler: SamplerClass,
    *,
    ids: mx.array | None = None,
    counts: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """logits [B, M, N], positions [B, M] of the tokens drawn -> tokens [B, M] uint32, valid [B, M] bool.

    ids [B, M, N] name the candidates where they are not 0 .. V-1; counts [B, M, 2, V] (prompt, generated) are needed
    with penalties. A row is not valid if it has a NaN or +inf, or nothing above -inf, to choose from.
    """
    logits = adjusted_logits(logits.astype(mx.float32), sampling, sampler, ids, counts)
    index = mx.argmax(logits, axis=-1)
    if not sampler.greedy:
        drawn = _draw(logits, positions, seed, sampling, sampler, ids)
        index = mx.where(sampling["temperature"][:, None] > 0, drawn, index)
    index = index[..., None]
    # The maximum is NaN if any logit is, +inf if one is, -inf if all are: filters would hide all three.
    valid = mx.isfinite(logits.max(axis=-1))
    token = index if ids is None else mx.take_along_axis(ids, index, axis=-1)
    return token[..., 0].astype(mx.uint32), valid


def adjusted_logits(
    logits: mx.array,
    sampling: dict[str, mx.array],
    sampler: SamplerClass,
    ids: mx.array | None,
    counts: mx.array | None,
) -> mx.array:
    """Penalties, then bias. Repetition counts prompt and output, presence and frequency the output only."""
    per_row = {name: sampling[name][:, None, None] for name in ("repetition", "presence", "frequency")}
    if sampler.penalties:
        assert counts is not None, "a batch with penalties carries counts"
        in_prompt, generated = counts[..., 0, :], counts[..., 1, :]
        if ids is not None:
            in_prompt, generated = (mx.take_along_axis(c, ids, axis=-1) for c in (in_prompt, generated))
        penalty = mx.where(logits > 0, 1 / per_row["repetition"], per_row["repetition"])
        logits = mx.where(in_prompt + generated > 0, logits * penalty, logits)
        logits = logits - per_row["frequency"] * generated - per_row["presence"] * (generated > 0)
    if sampler.bias:
        bias = mx.broadcast_to(sampling["bias"][:, None], (*logits.shape[:2], sampling["bias"].shape[-1]))
        logits = logits + (bias if ids is None else mx.take_along_axis(bias, ids, axis=-1))
    return logits


def _draw(
    logits: mx.array,
    positions: mx.array,
    seed: mx.array,
    sampling: dict[str, mx.array],
    sampler: SamplerClass,
    ids: mx.array | None,
) -> mx.array:
    """Adjusted logits [B, M, N] -> index [B, M] of the drawn candidate."""
    temperature = sampling["temperature"]
    scaled = logits / mx.where(temperature > 0, temperature, 1.0)[:, None, None]
    if sampler.candidates:
        order = best_candidates(scaled, min(MAX_CANDIDATES, scaled.shape[-1]))
        kept = keep_sorted(mx.take_along_axis(scaled, order, axis=-1), sampling, sampler)
        names = order if ids is None else mx.take_along_axis(ids, order, axis=-1)
        best = mx.argmax(kept + gumbel(seed, positions, names), axis=-1)
        return mx.take_along_axis(order, best[..., None], axis=-1)[..., 0]
    names = mx.arange(scaled.shape[-1], dtype=mx.uint32)[None, None] if ids is None else ids
    return mx.argmax(keep_unsorted(scaled, sampling, sampler) + gumbel(seed, positions, names), axis=-1)


def best_candidates(logits: mx.array, count: int) -> mx.array:
    """Indices [B, M, count] of the largest logits, largest first, lower index first on ties.

    The best `count` values lie in the `count` groups with the largest maxima, so only those are sorted.
    """
    size = logits.shape[-1]
    width = 64
    groups = size // width
    if groups <= 2 * count or size % width:
        return mx.argsort(-logits, axis=-1)[..., :count]
    maxima = logits.reshape(*logits.shape[:-1], groups, width).max(axis=-1)
    chosen = mx.sort(best_candidates(maxima, count), axis=-1)  # ascending, so that ties keep the order of ids
    indices = (chosen[..., None] * width + mx.arange(width, dtype=chosen.dtype)).flatten(-2)
    within = mx.argsort(-mx.take_along_axis(logits, indices, axis=-1), axis=-1)[..., :count]
    return mx.take_along_axis(indices, within, axis=-1)


def keep_sorted(scaled: mx.array, sampling: dict[str, mx.array], sampler: SamplerClass) -> mx.array:
    """Descending candidates [B, M, C] with those outside top-k, top-p and min-p set to -inf."""
    rank = mx.arange(scaled.shape[-1], dtype=mx.int32)
    kept = mx.where(rank < sampling["top_k"][:, None, None], scaled, -mx.inf)
    probs = mx.softmax(kept, axis=-1, precise=True)
    if sampler.top_p:
        before = mx.cumsum(probs, axis=-1) - probs
        # A row that leaves top_p at 1 keeps its tail even where the sum rounds to 1 before the end.
        limit = sampling["top_p"][:, None, None]
        kept = mx.where((before < limit) | (limit >= 1), kept, -mx.inf)
    if sampler.min_p:
        kept = mx.where(probs >= sampling["min_p"][:, None, None] * probs[..., :1], kept, -mx.inf)
    return kept


def keep_unsorted(scaled: mx.array, sampling: dict[str, mx.array], sampler: SamplerClass) -> mx.array:
    """Logits [B, M, N] with those outside top-k, top-p and min-p set to -inf, by threshold search instead of a sort."""
    kept = scaled
    if sampler.top_k:
        limit = sampling["top_k"][:, None, None].astype(mx.float32)
        kept = mx.where(_first_until(kept, mx.ones_like(kept), limit), kept, -mx.inf)
    if sampler.top_p or sampler.min_p:
        probs = mx.softmax(kept, axis=-1, precise=True)
        peak = probs.max(axis=-1, keepdims=True)
    if sampler.top_p:
        limit = sampling["top_p"][:, None, None]
        kept = mx.where(_first_until(kept, probs, limit) | (limit >= 1), kept, -mx.inf)
    if sampler.min_p:
        kept = mx.where(probs >= sampling["min_p"][:, None, None] * peak, kept, -mx.inf)
    return kept


def _first_until(logits: mx.array, weight: mx.array, limit: mx.array) -> mx.array:
    """True where the weights ranked before an entry (larger logit, or equal and lower id) sum to less than `limit`.

    Fixed halvings over the ordered bits of the logits find the value at which the sum crosses the limit.
    """
    keys = _ordered_bits(logits)
    low = keys.min(axis=-1, keepdims=True).astype(mx.int64) - 1
    high = keys.max(axis=-1, keepdims=True).astype(mx.int64)
    for _ in range(33):  # invariant: weight above `high` < limit; `low` fails or lies below every key
        middle = (low + high) // 2
        above = mx.where(keys > middle, weight, 0.0).sum(axis=-1, keepdims=True)
        enough = above < limit
        low, high = mx.where(enough, low, middle), mx.where(enough, middle, high)
    above = mx.where(keys > high, weight, 0.0).sum(axis=-1, keepdims=True)
    tied = keys == high
    before_in_tie = mx.cumsum(mx.where(tied, weight, 0.0), axis=-1) - weight
    return (keys > high) | (tied & (above + before_in_tie < limit))


def _ordered_bits(x: mx.array) -> mx.array:
    """float32 -> int32 with the same order."""
    bits = x.view(mx.int32)
    return mx.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


def gumbel(seed: mx.array, positions: mx.array, ids: mx.array) -> mx.array:
    """seed [B], positions [B, M], ids [B or 1, M or 1, N] -> standard Gumbel noise [B, M, N], float32.

    v = (h + 1/2) / 2^32 is never 0. Where it rounds to 1 (3e-8) it is kept below, at a noise of -2.8: -inf could not be
    told from a filtered token where only one is left, and -log(-log(v)) would give +inf and choose by rounding.
    """
    bits = hash_bits(seed[:, None, None], positions[..., None], ids)
    uniform = mx.minimum((bits.astype(mx.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -mx.log(-mx.log1p(-uniform))


def hash_bits(seed: mx.array, position: mx.array, token: mx.array) -> mx.array:
    """pcg3d of (seed, position, token), broadcast -> uint32. Jarzynski and Olano, JCGT 9(3), 2020."""
    x, y, z = (v.astype(mx.uint32) * 1664525 + 1013904223 for v in (seed, position, token))
    x = x + y * z
    y = y + z * x
    z = z + x * y
    x, y, z = (v ^ (v >> 16) for v in (x, y, z))
    return x + y * z
