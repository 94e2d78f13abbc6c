"""Several answers in a conversation: one prefill, earlier turns reused, and any answer can be gone on with."""

import functools
from dataclasses import replace

import pytest

import mlx_mtp.turns
from mlx_mtp import Sampling, generate, generate_batch
from mlx_mtp.answers import answers_in
from mlx_mtp.batch_watch import Watch
from mlx_mtp.conversation import Conversation
from mlx_mtp.errors import ParameterError
from pairs import golden_pair
from ragged_requests import twelve
from scripted_guard import ScriptedGuard
from talks import check_rows, golden_text

pair_of = functools.cache(golden_pair)
SAMPLING = Sampling(temperature=1.0, seed=5)
HOW = {"max_tokens": 9, "sampling": SAMPLING}


def alone(ids: list[int], seed: int) -> list[int]:
    sampling = Sampling(temperature=1.0, seed=seed)
    return generate(pair_of("e2b"), ids, max_tokens=9, sampling=sampling, num_draft_tokens=0).tokens


@pytest.fixture
def prefilled(monkeypatch) -> list[int]:
    """Tokens forwarded by each prefill."""
    forwarded: list[int] = []
    prefill = mlx_mtp.turns.prefill

    def counted(target, kv, ids, **how):
        forwarded.append(len(ids) - how.get("start", 0))
        return prefill(target, kv, ids, **how)

    monkeypatch.setattr(mlx_mtp.turns, "prefill", counted)
    return forwarded


@pytest.mark.parametrize("chosen", [0, 2])
def test_a_conversation_goes_on_with_any_answer(chosen, prefilled):
    ids, _ = golden_text("e2b", "long")
    conversation = Conversation(pair_of("e2b"), guard=ScriptedGuard())
    first = answers_in(conversation, ids, 3, num_draft_tokens=2, **HOW)
    assert [out.tokens for out in first] == [alone(ids, seed) for seed in (5, 6, 7)]
    check_rows(conversation)
    prefilled.clear()
    longer = [*ids, *first[chosen].tokens, 3, 4]
    second = answers_in(conversation, longer, 2, num_draft_tokens=0, **HOW)
    assert prefilled == [1 + 9 + 2], "the last id of the first prompt and what is new"
    assert second[1].stats.reused_tokens == len(ids) - 1
    assert [out.tokens for out in second] == [alone(longer, seed) for seed in (5, 6)]
    again = conversation.generate([*longer, *second[0].tokens, 9], num_draft_tokens=2, **HOW)
    assert again.tokens == alone([*longer, *second[0].tokens, 9], 5)


def test_a_caller_who_raises_leaves_the_conversation_whole():
    ids, _ = golden_text("e2b", "long")
    conversation = Conversation(pair_of("e2b"), guard=ScriptedGuard())

    def stop(tokens: int) -> None:
        if tokens > 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        answers_in(conversation, ids, 3, watch=Watch(on_round=stop), num_draft_tokens=2, **HOW)
    check_rows(conversation)
    assert conversation.generate(ids, num_draft_tokens=2, **HOW).tokens == alone(ids, 5)


def test_answers_stopped_for_memory_leave_nothing():
    ids, _ = golden_text("e2b", "long")
    conversation = Conversation(pair_of("e2b"), guard=ScriptedGuard(["none", "none", "stop"]))
    outs = answers_in(conversation, ids, 3, num_draft_tokens=2, **HOW)
    assert {out.finish_reason for out in outs} == {"error"}
    assert conversation.history.nbytes == 0
    assert conversation.generate(ids, num_draft_tokens=2, **HOW).tokens == alone(ids, 5)


def test_impossible_numbers_are_refused_before_any_work(prefilled):
    conversation = Conversation(pair_of("e2b"))
    for n in (0, 65, "3"):
        with pytest.raises(ParameterError, match=r"1 \.\. 64 answers"):
            answers_in(conversation, [1, 2], n, **HOW)
    assert prefilled == []


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_four_answers_share_one_prefill(width, prefilled):
    pair, ids = pair_of("e2b"), twelve("e2b")[5].ids
    sampling = Sampling(temperature=1.0, seed=40)
    outs = generate_batch(
        pair, [ids, ids[:7]], n=4, max_batch=width, max_tokens=9, sampling=sampling, num_draft_tokens=2
    )
    assert prefilled == [len(ids), 7]
    alone = [
        generate(pair, own, max_tokens=9, sampling=replace(sampling, seed=40 + i), num_draft_tokens=0).tokens
        for own in (ids, ids[:7])
        for i in range(4)
    ]
    assert [out.tokens for out in outs] == alone
    assert [out.stats.seed for out in outs] == [40, 41, 42, 43] * 2
    assert len({tuple(out.tokens) for out in outs[:4]}) > 1


@pytest.mark.parametrize("n", [0, -3, 65, True, 1.5, "2"])
def test_impossible_numbers_of_answers_are_refused(n):
    with pytest.raises(ParameterError, match=r"1 \.\. 64 answers"):
        generate_batch(pair_of("e2b"), [[1, 2]], n=n)
