"""The sampling rule written a second time, in plain numpy and float64, for tests to compare with."""

import numpy as np

from mlx_mtp.sampling import Sampling

MASK = np.uint64(0xFFFFFFFF)


def reference_hash(seed: np.ndarray, position: np.ndarray, token: np.ndarray) -> np.ndarray:
    """pcg3d in 64-bit words cut to 32 after every step -> uint32, broadcast over the inputs."""
    words = [np.asarray(w).astype(np.int64).astype(np.uint64) & MASK for w in (seed, position, token)]
    x, y, z = ((w * np.uint64(1664525) + np.uint64(1013904223)) & MASK for w in words)
    x = (x + y * z) & MASK
    y = (y + z * x) & MASK
    z = (z + x * y) & MASK
    x, y, z = (w ^ (w >> np.uint64(16)) for w in (x, y, z))
    return ((x + y * z) & MASK).astype(np.uint32)


def reference_gumbel(seed: np.ndarray, position: np.ndarray, token: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise from the hash, in float64."""
    uniform = (reference_hash(seed, position, token).astype(np.float64) + 0.5) * 2.0**-32
    return -np.log(-np.log1p(-uniform))


def reference_adjusted(
    logits: np.ndarray, setting: Sampling, in_prompt: np.ndarray, generated: np.ndarray
) -> np.ndarray:
    """logits [N, V] and token counts [N, V] -> logits after penalties and bias."""
    logits = np.asarray(logits, np.float64)
    penalty = np.where(logits > 0, 1 / setting.repetition_penalty, setting.repetition_penalty)
    logits = np.where(in_prompt + generated > 0, logits * penalty, logits)
    logits = logits - setting.frequency_penalty * generated - setting.presence_penalty * (generated > 0)
    for token, bias in (setting.logit_bias or {}).items():
        logits[..., token] += bias
    return logits


def reference_law(logits: np.ndarray, setting: Sampling) -> np.ndarray:
    """Adjusted logits [N, V] -> the probability of each token under temperature, top-k, top-p and min-p, by a sort."""
    logits = np.asarray(logits, np.float64)
    if setting.temperature == 0:
        return np.eye(logits.shape[-1])[logits.argmax(-1)]
    order = np.argsort(-logits, axis=-1, kind="stable")
    ranked = np.take_along_axis(logits, order, axis=-1) / setting.temperature
    kept = np.ones(ranked.shape, bool)
    if setting.top_k:
        kept &= np.arange(ranked.shape[-1]) < setting.top_k
    probs = _softmax(np.where(kept, ranked, -np.inf))
    before = np.cumsum(probs, axis=-1) - probs
    if setting.top_p < 1:
        kept &= before < setting.top_p
    kept &= probs >= setting.min_p * probs[..., :1]
    law = np.empty_like(probs)
    np.put_along_axis(law, order, _softmax(np.where(kept, ranked, -np.inf)), axis=-1)
    return law


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
