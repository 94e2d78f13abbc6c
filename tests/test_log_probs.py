"""log_probs against transformers' logits; whether anybody asks, or drafts are made, changes no token and no other."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import mlx_mtp.conversation
from goldens import golden
from kernel_pairs import on_kernels, quantised_pair
from mlx_mtp import MtpError, ParameterError, Sampling, generate
from mlx_mtp.conversation import Conversation, make_request
from mlx_mtp.log_probs import TokenLogProbs
from mlx_mtp.reply import Generation
from pairs import golden_pair

TOKENS = 16


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def replied(variant: str = "e2b", **options) -> Generation:
    return generate(golden_pair(variant), golden(variant, "long").prompt, max_tokens=TOKENS, **options)


@pytest.mark.parametrize("variant", ["e2b", "31b", "a4b"])
@pytest.mark.parametrize("k", [0, 3])
def test_they_are_transformers_own(variant, k):
    out, expected = replied(variant, num_draft_tokens=k, log_probs=5), golden(variant, "long")
    assert out.tokens == expected.new_tokens[:TOKENS] and len(out.log_probs) == TOKENS
    table = log_softmax(expected.greedy_logits[:TOKENS])
    for token, found, row in zip(out.tokens, out.log_probs, table, strict=True):
        assert abs(found.log_prob - row[token]) < 1e-3
        assert found.best[0] == (token, found.log_prob), "greedy takes the most likely"
        assert [value for _, value in found.best] == sorted((value for _, value in found.best), reverse=True)
        assert np.abs([value for _, value in found.best] - np.sort(row)[::-1][:5]).max() < 1e-3
        assert all(abs(value - row[id]) < 1e-3 for id, value in found.best)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.3, seed=4),
        Sampling(temperature=0.7, top_k=8, top_p=0.9, seed=4),
        Sampling(temperature=1.0, repetition_penalty=1.3, logit_bias={7: 5.0}, seed=4),
    ],
    ids=["drawn", "filtered", "penalised"],
)
def test_drafts_settings_and_asking_change_nothing(sampling):
    """The model's own distribution, whatever is then made of it; the same numbers with drafts and without."""
    plain = replied(sampling=sampling, num_draft_tokens=0, log_probs=2)
    drafted = replied(sampling=sampling, num_draft_tokens=3, log_probs=2)
    unasked = replied(sampling=sampling, num_draft_tokens=3)
    assert plain.tokens == drafted.tokens == unasked.tokens
    assert unasked.log_probs is None
    if mx.default_device().type == mx.cpu:  # where a row's bits depend on no other row
        assert plain.log_probs == drafted.log_probs
    for one, other in zip(plain.log_probs, drafted.log_probs, strict=True):
        assert abs(one.log_prob - other.log_prob) < 1e-4
    # The next token's distribution depends on the tokens before it alone: ask for it greedily, without settings.
    context = [*golden("e2b", "long").prompt, *plain.tokens[:9]]
    [again] = generate(golden_pair("e2b"), context, max_tokens=1, log_probs=20).log_probs
    by_id = dict(again.best)
    assert all(abs(by_id[id] - value) < 1e-4 for id, value in plain.log_probs[9].best)


def test_of_rows_decoded_together_only_those_that_ask_have_them():
    from mlx_mtp.batch import generate_rows
    from mlx_mtp.policy import make_policy
    from mlx_mtp.pressure import Guard

    pair, prompt = golden_pair("e2b"), golden("e2b", "long").prompt
    sampling = Sampling(temperature=1.0)
    asked = [None, 3, None, 0]
    requests = [
        make_request(
            pair, prompt[at:], max_tokens=12 + at, sampling=replace(sampling, seed=at), log_probs=count
        )
        for at, count in enumerate(asked)
    ]
    outs = generate_rows(pair, requests, make_policy(3, has_drafter=True), Guard(), max_batch=3)
    for at, (out, count) in enumerate(zip(outs, asked, strict=True)):
        own = generate(
            pair,
            prompt[at:],
            max_tokens=12 + at,
            sampling=replace(sampling, seed=at),
            num_draft_tokens=0,
            log_probs=count,
        )
        assert out.tokens == own.tokens and (out.log_probs is None) == (count is None)
        for found, alone in zip(out.log_probs or (), own.log_probs or (), strict=True):
            assert len(found.best) == count
            assert abs(found.log_prob - alone.log_prob) < 1e-4


def test_nobody_pays_who_does_not_ask(monkeypatch):
    def never(*words: object) -> None:
        pytest.fail("the head was run for log_probs that nobody asked for")

    pair, prompt = golden_pair("e2b"), golden("e2b", "short").prompt
    found = generate(pair, prompt, max_tokens=4, log_probs=0).log_probs
    assert [type(one) for one in found] == [TokenLogProbs] * 4 and found[0].best == ()
    monkeypatch.setattr("mlx_mtp.log_probs.logits_of", never)
    assert generate(pair, prompt, max_tokens=4).log_probs is None


def test_on_our_kernels_the_fused_head_still_chooses(metal):
    """It writes no logits down, so a whole product beside it gives these; no token is another for that."""
    stock = quantised_pair("31b")
    pair = on_kernels(stock)
    assert pair.target.kernels.head_choose is not None
    prompt, asked = list(range(20, 33)), {"max_tokens": 3, "num_draft_tokens": 1}
    unasked = generate(pair, prompt, **asked)
    found = generate(pair, prompt, log_probs=2, **asked)
    own = generate(stock, prompt, log_probs=2, **asked)
    assert found.tokens == unasked.tokens == own.tokens
    for ours, theirs in zip(found.log_probs, own.log_probs, strict=True):
        assert abs(ours.log_prob - theirs.log_prob) < 1e-3
        assert [id for id, _ in ours.best] == [id for id, _ in theirs.best]


@pytest.mark.parametrize("count", [-1, 21, True, 1.0, "5"])
def test_what_is_no_number_of_alternatives_is_refused(count):
    with pytest.raises(ParameterError, match="log_probs"):
        make_request(golden_pair("e2b"), [5, 6], log_probs=count)


def test_a_reply_can_be_made_to_begin_with_given_tokens():
    """They are prefilled like a prompt, are text of the reply, and are none of its drawn tokens."""
    pair, (prompt, text) = (
        golden_pair("e2b"),
        (golden("e2b", "long").prompt, golden("e2b", "long").new_tokens),
    )
    conversation = Conversation(pair)
    whole = conversation.generate(prompt, max_tokens=20)
    begun = conversation.generate(prompt, max_tokens=12, begin_with=text[:8], log_probs=1)
    assert begun.text == whole.text and begun.tokens == whole.tokens[8:20]
    assert len(begun.log_probs) == 12 and begun.stats.prompt_tokens == len(prompt) + 8
    again = conversation.generate([*prompt, *text[:8], *begun.tokens], max_tokens=4)
    assert again.tokens == text[20:24] and again.stats.reused_tokens == len(prompt) + 19
    with pytest.raises(MtpError, match="must be 0 to"):
        make_request(pair, prompt, begin_with=[10**6])
    assert mlx_mtp.conversation.make_request(pair, prompt).begin_with == ()
