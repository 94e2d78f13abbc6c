"""Logits that name no token end a reply with "error", and nothing of it stays in the cache."""

import functools
import math
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_mtp import generate, generate_batch
from mlx_mtp.conversation import Conversation
from mlx_mtp.pair import Pair
from mlx_mtp.round import Rounds
from mlx_mtp.sampling import Sampling
from pairs import golden_pair
from talks import golden_text

pair_of = functools.cache(golden_pair)
NOTHING = dict.fromkeys(range(256), -math.inf)


def with_nan_at(pair: Pair, token: int) -> Pair:
    """A pair whose target computes NaN from where `token` is read on."""
    table = pair.target.per_layer.table
    spoiled = mx.where(mx.arange(table.shape[0])[:, None] == token, mx.nan, table.weight)
    per_layer = replace(pair.target.per_layer, table=replace(table, weight=spoiled))
    target = replace(pair.target, per_layer=per_layer)
    return replace(pair, target=target, rounds=Rounds(target, pair.drafter, compiled=False))


@pytest.mark.parametrize("k", [0, 3, 6])
@pytest.mark.parametrize("at", [0, 1, 4, 8])
def test_nan_in_mid_stream(k, at):
    ids, text = golden_text("e2b", "long")
    assert text[at] not in ids + text[:at]
    conversation = Conversation(with_nan_at(pair_of("e2b"), text[at]))
    out = conversation.generate(ids, max_tokens=20, num_draft_tokens=k)
    # A pass in which the token is only a draft is lost as a whole: its NaN values times weights of 0 are NaN.
    assert out.finish_reason == "error"
    assert out.tokens == text[: len(out.tokens)] and at - k < len(out.tokens) <= at + 1
    assert conversation.history.rows == 0
    again = conversation.generate(ids, max_tokens=max(at, 1), num_draft_tokens=0)
    assert (again.tokens, again.finish_reason) == (text[: max(at, 1)], "length")
    assert again.stats.reused_tokens == 0


def test_nan_in_the_prompt():
    ids, _ = golden_text("e2b", "long")
    conversation = Conversation(with_nan_at(pair_of("e2b"), ids[-1]))
    out = conversation.generate(ids, max_tokens=20, num_draft_tokens=3)
    assert (out.tokens, out.finish_reason, out.text) == ([], "error", "")
    assert conversation.history.rows == 0
    shorter = [token for token in ids if token != ids[-1]]
    again = conversation.generate(shorter, max_tokens=4, num_draft_tokens=3)
    assert again.tokens == generate(pair_of("e2b"), shorter, max_tokens=4, num_draft_tokens=0).tokens


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(seed=1), Sampling(top_k=5, seed=1)])
@pytest.mark.parametrize("k", [0, 3])
def test_no_token_is_allowed(sampling, k):
    ids, text = golden_text("31b", "long")
    conversation = Conversation(pair_of("31b"))
    out = conversation.generate(
        ids, max_tokens=9, sampling=replace(sampling, logit_bias=NOTHING), num_draft_tokens=k
    )
    assert (out.tokens, out.finish_reason) == ([], "error")
    assert conversation.generate(ids, max_tokens=5, num_draft_tokens=k).tokens == text[:5]


def test_one_token_is_allowed():
    ids, _ = golden_text("31b", "long")
    bias = {token: value for token, value in NOTHING.items() if token != 9}
    for sampling in (Sampling(temperature=0.0), Sampling(seed=3)):
        out = generate(pair_of("31b"), ids, max_tokens=6, sampling=replace(sampling, logit_bias=bias))
        assert (out.tokens, out.finish_reason) == ([9] * 6, "length")


@pytest.mark.parametrize("k", [0, 3])
def test_a_broken_row_leaves_its_neighbours_alone(k):
    ids, text = golden_text("e2b", "long")
    clean, spoiled = [77, 78, 79], [77, text[4], 79]
    pair = with_nan_at(pair_of("e2b"), text[4])
    outs = generate_batch(pair, [clean, spoiled, ids], max_tokens=12, num_draft_tokens=k)
    assert outs[0].tokens == generate(pair, clean, max_tokens=12, num_draft_tokens=k).tokens
    assert (outs[1].tokens, outs[1].finish_reason) == ([], "error")
    assert outs[2].finish_reason == "error" and outs[2].tokens == text[: len(outs[2].tokens)]


def test_a_row_without_any_allowed_token_in_a_batch():
    ids, text = golden_text("31b", "long")
    greedy = Sampling(temperature=0.0)
    outs = generate_batch(
        pair_of("31b"),
        [ids, ids],
        max_tokens=8,
        sampling=[replace(greedy, logit_bias=NOTHING), greedy],
        num_draft_tokens=3,
    )
    assert (outs[0].tokens, outs[0].finish_reason) == ([], "error")
    assert (outs[1].tokens, outs[1].finish_reason) == (text[:8], "length")
