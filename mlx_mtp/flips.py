"""Where two texts part: was it rounding? Both paths are teacher-forced and their numbers compared."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_mtp.conversation import prompt_counts
from mlx_mtp.pair import Pair
from mlx_mtp.prefill import prefill
from mlx_mtp.sampling import Sampling, adjusted_logits, fold_seed, gumbel, sampler_class, sampling_arrays
from mlx_mtp.state import KeysValues, bucket_for, capacity_for, new_kv
from mlx_mtp.target import logits_of
from mlx_mtp.verify import verify


@dataclass(frozen=True, slots=True)
class Flip:
    """The first token at which two texts differ, `index` counted from the start of the reply.

    gap: how far the worse of the two tokens lies below the best score, with MTP off; difference: the largest change of
    a scaled logit between the two paths. Two texts may part by rounding only where gap <= 2 * difference.
    """

    index: int
    off_token: int
    on_token: int
    gap: float
    difference: float

    @property
    def legitimate(self) -> bool:
        return self.gap <= 2 * self.difference


def first_flip(
    pair: Pair, ids: list[int], off: list[int], on: list[int], sampling: Sampling, rows: int
) -> Flip | None:
    """Compare the texts after prompt `ids` played without drafts and in passes of about `rows` rows."""
    index = next((i for i, (a, b) in enumerate(zip(off, on, strict=False)) if a != b), None)
    if index is None:
        return None
    common = off[:index]
    plain, blocks = (
        _adjusted(pair, ids, common, forced_logits(pair, ids, common, rows=m)[-1], sampling)
        for m in (1, rows)
    )
    finite = np.isfinite(plain) & np.isfinite(blocks)
    shortfall = _shortfall(plain, len(ids) + index, sampling)
    return Flip(
        index=index,
        off_token=off[index],
        on_token=on[index],
        gap=float(max(shortfall[off[index]], shortfall[on[index]])),
        difference=float(np.abs(plain[finite] - blocks[finite]).max()),
    )


def forced_logits(pair: Pair, ids: list[int], tokens: list[int], *, rows: int) -> mx.array:
    """Logits [len(tokens) + 1, V] after the prompt and after each of `tokens`, in passes of exactly `rows` rows."""
    target = pair.target
    kv_list = list(new_kv(target, capacity_for(len(ids) + len(tokens) + rows)))
    parts = [logits_of(target, prefill(target, kv_list, ids))[0]]
    kv: KeysValues = tuple(kv_list)
    del kv_list
    for done in range(0, len(tokens), rows):
        block = tokens[done : done + rows]
        padded = mx.array([block + [0] * (rows - len(block))], mx.uint32)
        start = len(ids) + done
        bucket = bucket_for(start + rows)
        hidden, kv = verify(target, padded, kv, mx.array([start], mx.int32), bucket=bucket)
        parts.append(logits_of(target, hidden)[0, : len(block)])
        mx.eval(kv, parts[-1])
    return mx.concatenate(parts)


def _adjusted(
    pair: Pair, ids: list[int], tokens: list[int], logits: mx.array, sampling: Sampling
) -> np.ndarray:
    """Logits [V] of one position -> with penalties, bias and temperature, float32."""
    vocab = pair.target.text.vocab_size
    sampler = sampler_class([sampling])
    generated = prompt_counts(tokens, vocab)[:, 0] if tokens else mx.zeros((1, vocab), mx.int32)
    counts = mx.stack([prompt_counts(ids, vocab)[:, 0], generated], axis=1)[:, None]
    arrays = sampling_arrays(sampling, vocab)
    adjusted = adjusted_logits(logits[None, None].astype(mx.float32), arrays, sampler, None, counts)
    return np.array(adjusted[0, 0]) / np.float32(sampling.temperature or 1.0)


def _shortfall(scaled: np.ndarray, position: int, sampling: Sampling) -> np.ndarray:
    """How far each token [V] is from being chosen: below the best score, or beyond an edge of the filters."""
    if sampling.temperature == 0:
        return scaled.max() - scaled
    seed = mx.array([fold_seed(sampling.seed or 0)], mx.uint32)
    names = mx.arange(scaled.size, dtype=mx.uint32)[None, None]
    noise = np.array(gumbel(seed, mx.array([[position]], mx.int32), names)[0, 0])
    outside = _beyond_filters(scaled, sampling)
    scores = scaled + noise
    return np.where(outside > 0, outside, scores[outside == 0].max() - scores)


def _beyond_filters(scaled: np.ndarray, sampling: Sampling) -> np.ndarray:
    """0 for tokens that top-k, top-p and min-p keep, else the smallest change of logits that could let them in."""
    order = np.argsort(-scaled, kind="stable")
    ranked = scaled[order].astype(np.float64)
    beyond = np.zeros_like(ranked)
    kept = np.ones(ranked.size, bool)
    if 0 < sampling.top_k < ranked.size:
        kept[sampling.top_k :] = False
        beyond = np.where(kept, 0.0, ranked[sampling.top_k - 1] - ranked)
    probs = np.where(kept, np.exp(ranked - ranked[0]), 0.0)
    probs /= probs.sum()
    if sampling.top_p < 1:
        before = np.cumsum(probs) - probs
        beyond = np.maximum(beyond, np.where(before < sampling.top_p, 0.0, before - sampling.top_p))
    if sampling.min_p > 0:
        floor = ranked[0] + np.log(sampling.min_p)
        beyond = np.maximum(beyond, np.where(ranked >= floor, 0.0, floor - ranked))
    out = np.empty_like(beyond)
    out[order] = beyond
    return out
