"""A real target and drafter of 12 tokens whose layers add nothing, so that each token depends only on the one before.

Logits are then a table that numpy computes exactly, while prefill, verify, choose, accept, commit and draft run as they
are. The drafter's table differs from the target's: about two drafts in three are right at temperature 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_mtp.config import FULL, SLIDING, DrafterConfig, TargetConfig, TextConfig
from mlx_mtp.conversation import prompt_counts
from mlx_mtp.drafter import Drafter, make_drafter
from mlx_mtp.layers import Tensors
from mlx_mtp.prefill import first_token, prefill
from mlx_mtp.round import Rounds
from mlx_mtp.sampling import SamplerClass, Sampling, sampler_class, sampling_arrays
from mlx_mtp.state import State, new_kv, no_drafts
from mlx_mtp.target import Target, make_target
from mlx_mtp.weights import DenseWeight

VOCAB, HIDDEN, HEAD, MLP = 12, 16, 4, 8
PROMPT = (7, 2, 7)
BUCKET = 32  # rows of K/V: enough for a dozen tokens and two rounds of drafts


@dataclass(frozen=True, slots=True)
class MarkovPair:
    """`logits[token]` are the target's logits [V] after `token`, in float64."""

    target: Target
    drafter: Drafter
    logits: np.ndarray


@dataclass(frozen=True, slots=True)
class Streams:
    """tokens [N, L] of N seeds, and how many drafts were checked and kept in all."""

    tokens: np.ndarray
    drafted: int
    accepted: int


def text_config() -> TextConfig:
    return TextConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        layer_types=(SLIDING, FULL),
        num_heads=1,
        num_kv_heads=1,
        num_global_kv_heads=1,
        head_dim=HEAD,
        global_head_dim=HEAD,
        sliding_window=16,
        num_kv_shared_layers=0,
        max_position_embeddings=512,
    )


def markov_pair(seed: int = 12, drafter_noise: float = 0.35) -> MarkovPair:
    """A pair whose drafter's head is the target's plus noise of the given size."""
    rng = np.random.default_rng(seed)
    text = text_config()
    table = rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32)
    gain = (0.4 * rng.normal(size=HIDDEN)).astype(np.float32)
    rows = table.astype(np.float64) * HIDDEN**0.5
    normed = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + text.rms_norm_eps)
    target = {
        "embed_tokens": DenseWeight(mx.array(table)),
        "norm": mx.array(gain),
        **_layers(rng, own_kv=True),
    }
    head = table + drafter_noise * rng.normal(size=table.shape).astype(np.float32)
    from_token = np.eye(HIDDEN, 2 * HIDDEN, dtype=np.float32)
    drafter = {
        "embed_tokens": DenseWeight(mx.array(head)),
        "norm": mx.array(gain),
        "pre_projection": DenseWeight(mx.array(from_token)),
        "post_projection": _matrix(rng, HIDDEN, HIDDEN),
        **_layers(rng, own_kv=False),
    }
    return MarkovPair(
        target=make_target(TargetConfig(text, "gemma4_text", (), False), target),
        drafter=make_drafter(DrafterConfig(text, "gemma4_assistant", HIDDEN, 0, 0), drafter),
        logits=(normed * gain) @ table.astype(np.float64).T,
    )


def _matrix(rng: np.random.Generator, outputs: int, inputs: int) -> DenseWeight:
    return DenseWeight(mx.array(rng.normal(size=(outputs, inputs)).astype(np.float32)))


def _layers(rng: np.random.Generator, *, own_kv: bool) -> Tensors:
    """Two layers that attend and project as ever, and whose outputs are multiplied by zero."""
    tensors: Tensors = {}
    for i in range(2):
        at, inputs = f"layers.{i}.", ("q", "k", "v") if own_kv else ("q",)
        for name in inputs:
            tensors[f"{at}self_attn.{name}_proj"] = _matrix(rng, HEAD, HIDDEN)
        for name in ("q_norm", "k_norm") if own_kv else ("q_norm",):
            tensors[f"{at}self_attn.{name}"] = mx.ones((HEAD,))
        tensors[f"{at}self_attn.o_proj"] = DenseWeight(mx.zeros((HIDDEN, HEAD)))
        tensors[f"{at}mlp.gate_proj"] = _matrix(rng, MLP, HIDDEN)
        tensors[f"{at}mlp.up_proj"] = _matrix(rng, MLP, HIDDEN)
        tensors[f"{at}mlp.down_proj"] = DenseWeight(mx.zeros((HIDDEN, MLP)))
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            tensors[f"{at}{name}_layernorm"] = mx.ones((HIDDEN,))
        tensors[f"{at}layer_scalar"] = mx.ones((1,))
    return tensors


def decode_streams(
    pair: MarkovPair, setting: Sampling, *, k: int, seeds: Sequence[int], length: int
) -> Streams:
    """At least `length` tokens after PROMPT for every seed, all rows of one batch, in rounds of k drafts."""
    sampler = sampler_class([setting])
    state = _start(pair.target, setting, sampler, seeds)
    texts = [[token] for token in state.last.tolist()]
    rounds = Rounds(pair.target, pair.drafter, compiled=False)
    state = rounds.first_drafts(state, k=k, bucket=BUCKET, sampler=sampler)
    drafted = accepted = 0
    while min(map(len, texts)) < length:
        state = state._replace(active=mx.array([len(text) < length for text in texts]))
        pending = state.drafts.shape[1]
        state, tokens, n = rounds(state, k=k, bucket=BUCKET, sampler=sampler)
        mx.eval(state, tokens, n)
        for text, new, kept in zip(texts, tokens.tolist(), n.tolist(), strict=True):
            text.extend(new[: kept + 1])
            drafted, accepted = drafted + pending * (kept >= 0), accepted + max(kept, 0)
    return Streams(np.array([text[:length] for text in texts]), drafted, accepted)


def _start(target: Target, setting: Sampling, sampler: SamplerClass, seeds: Sequence[int]) -> State:
    """The state after PROMPT once per seed, each with its own first token."""
    batch = len(seeds)
    kv = list(new_kv(target, BUCKET))
    hidden = prefill(target, kv, PROMPT)
    arrays = sampling_arrays(setting, VOCAB)
    counts = prompt_counts(PROMPT, VOCAB) if setting.penalises else None
    state = State(
        kv=tuple((mx.repeat(keys, batch, axis=0), mx.repeat(values, batch, axis=0)) for keys, values in kv),
        length=mx.full((batch,), len(PROMPT), mx.int32),
        last=mx.zeros((batch,), mx.uint32),
        hidden=mx.repeat(hidden, batch, axis=0),
        drafts=no_drafts(batch),
        seed=mx.array(list(seeds), mx.uint32),
        sampling={name: mx.repeat(value, batch, axis=0) for name, value in arrays.items()},
        counts=None if counts is None else mx.repeat(counts, batch, axis=0),
        active=mx.array([True] * batch),
    )
    token, valid = first_token(target, state, sampler)
    if state.counts is not None:
        generated = (token[:, None] == mx.arange(VOCAB, dtype=mx.uint32)).astype(mx.int32)
        state = state._replace(counts=mx.stack([state.counts[:, 0], generated], axis=1))
    return state._replace(last=token, active=valid)
