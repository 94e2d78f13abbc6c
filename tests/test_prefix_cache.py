"""Requests that begin like earlier ones prefill only what is new, and their texts are those of cold runs."""

import random
import time
from collections.abc import Sequence

import pytest

from engines import alone, engine_on, ids_of, pair_of, sampled, words
from mlx_mtp.conversation import make_request
from talks import MODEL_TURN

WITHIN_S = 120.0
USER_TURN = [4, *(19 + byte for byte in b"user\n")]
END = [5, 19 + 10]  # <turn|> and a line break
CONTEXT = 12_288


def agent_loop(engine, *, requests: int, grown_to: int, variant: str = "e2b") -> None:
    """A client without a memory: it resends all, the reply in other words (thoughts dropped), and a tool's answer."""
    pair = pair_of(variant, CONTEXT)
    step = grown_to // requests
    history = [2, *USER_TURN, *words(0, step - 40), *END]
    before = 0
    for i in range(requests):
        ids = [*history, *MODEL_TURN]
        request = {"max_tokens": 16, "sampling": sampled(i)}
        out = engine.submit(ids, **request, num_draft_tokens=(0, 2, "auto")[i % 3]).result(WITHIN_S)
        assert out.tokens == alone(ids, variant, CONTEXT, **request), i
        # All of the last request's prompt up to where its model turn opened, at least.
        assert out.stats.reused_tokens >= before, (i, out.stats.reused_tokens, before)
        boundary = make_request(pair, ids).boundaries[-1]
        assert boundary == len(history)
        before = boundary
        history = [*ids, *out.tokens[3:], *END, *USER_TURN, *words(i + 1, step - 40), *END]
    assert before > 0.9 * grown_to


def test_a_short_agent_loop():
    with engine_on(max_context=CONTEXT) as engine:
        agent_loop(engine, requests=5, grown_to=1500)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["e2b", "31b", "a4b"])
def test_an_agent_loop_of_twenty_requests_to_8k_tokens(variant):
    with engine_on(variant, max_context=CONTEXT) as engine:
        agent_loop(engine, requests=20, grown_to=8192, variant=variant)


def test_a_reply_that_is_resent_as_it_was_is_not_prefilled_again():
    with engine_on() as engine:
        ids = ids_of(count=60)
        for i in range(4):
            out = engine.submit(ids, max_tokens=20, sampling=sampled(i), num_draft_tokens=3).result(WITHIN_S)
            assert out.tokens == alone(ids, max_tokens=20, sampling=sampled(i))
            assert out.stats.reused_tokens == (0 if i == 0 else len(ids) - 6)
            ids = [*ids, *out.tokens, *words(i, 5)]


def test_edits_equal_cold_runs():
    """Going back to any turn, with another text or another seed, in any order."""
    with engine_on(max_context=2048) as engine:
        turns = [[2]]
        for i in range(6):
            turns.append([*turns[-1], *USER_TURN, *words(i, 30), *END, *MODEL_TURN])
            out = engine.submit(turns[-1], max_tokens=12, sampling=sampled(i)).result(WITHIN_S)
            turns[-1] = [*turns[-1], *out.tokens, *END]
        order = random.Random(3)
        for i in range(12):
            at = order.randrange(6)
            ids = [*turns[at], *USER_TURN, *words(order.choice([at, 100 + i]), 30), *END, *MODEL_TURN]
            request = {"max_tokens": 12, "sampling": sampled(i), "num_draft_tokens": i % 4}
            out = engine.submit(ids, **request).result(WITHIN_S)
            assert out.tokens == alone(ids, max_context=2048, **request), (i, at)
            if at:
                assert out.stats.reused_tokens > 0, (i, at)


def test_a_conversation_with_edits_equals_cold_runs():
    from mlx_mtp import Engine, Sampling, generate, load

    pair, greedy = load("demo"), Sampling(temperature=0.0)
    with Engine(pair) as engine:
        chat = engine.conversation("You are terse.", sampling=greedy, max_tokens=24)

        def check(handle) -> None:
            out = handle.result(WITHIN_S)
            said = chat.messages
            assert said[-1] == {"role": "assistant", "content": out.text}
            cold = generate(pair, said[:-1], sampling=greedy, max_tokens=24)
            assert out.tokens == cold.tokens

        check(chat.say("What is MLX?"))
        check(chat.say("What is a drafter?"))
        check(chat.regenerate())
        check(chat.edit(0, "What is a round?"))
        assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
        check(chat.say("And a window?"))
        chat.undo()
        assert len(chat.messages) == 3
        check(chat.edit(-1, "What is a token?"))
        assert len(chat.messages) == 3


def test_a_shared_beginning_is_kept_from_the_second_request_on():
    """Rings cannot be rewound to where requests part: the second keeps them there, the third starts from there."""
    beginning = [2, *words(7, 300)]
    with engine_on(max_context=2048) as engine:
        reused = []
        for i in range(4):
            ids = [*beginning, *words(50 + i, 80)]
            out = engine.submit(ids, max_tokens=6, sampling=sampled(i)).result(WITHIN_S)
            assert out.tokens == alone(ids, max_context=2048, max_tokens=6, sampling=sampled(i))
            reused.append(out.stats.reused_tokens)
    assert reused[:2] == [0, 0]
    assert reused[2:] == [301, 301]


def test_a_system_prompt_is_kept_from_the_first_request_on():
    system = [2, 4, *words(8, 200), *END]
    with engine_on(max_context=2048) as engine:
        reused = []
        for i in range(3):
            ids = [*system, *USER_TURN, *words(60 + i, 80), *END, *MODEL_TURN]
            out = engine.submit(ids, max_tokens=6, sampling=sampled(i)).result(WITHIN_S)
            assert out.tokens == alone(ids, max_context=2048, max_tokens=6, sampling=sampled(i))
            reused.append(out.stats.reused_tokens)
    assert reused == [0, len(system), len(system)] or reused == [0, len(system), len(system) + len(USER_TURN)]


def test_requests_at_once_share_a_beginning_too():
    system = [2, 4, *words(9, 200), *END]
    prompts = [[*system, *USER_TURN, *words(70 + i, 20 + 9 * i), *END, *MODEL_TURN] for i in range(6)]
    with engine_on(max_context=2048, max_batch=3) as engine:
        handles = [engine.submit(ids, max_tokens=20, sampling=sampled(i)) for i, ids in enumerate(prompts)]
        outs = [handle.result(WITHIN_S) for handle in handles]
    for i, (ids, out) in enumerate(zip(prompts, outs, strict=True)):
        assert out.tokens == alone(ids, max_context=2048, max_tokens=20, sampling=sampled(i)), i
    assert all(out.stats.reused_tokens >= len(system) for out in outs[1:])


@pytest.mark.parametrize("ends", ["stop", "cancel"])
def test_rows_of_a_batch_are_kept_as_they_ended(ends):
    """Whatever ended a row while others ran on, what is kept of it are the rows of its tokens."""
    with engine_on(max_context=1024, max_batch=3) as engine:
        # Two of them, or the batch would be narrowed at once.
        other, third = (engine.submit(ids_of(start=i), max_tokens=500, num_draft_tokens=3) for i in range(2))
        ids = ids_of(start=7, count=70)
        text = alone(ids, max_context=1024, max_tokens=60, sampling=sampled(1))
        handle = engine.submit(
            ids,
            max_tokens=300,
            sampling=sampled(1),
            num_draft_tokens=3,
            stop=_text_of(text[20:24]) if ends == "stop" else (),
        )
        tokens: list[int] = []
        for chunk in handle:
            tokens += chunk.tokens
            if ends == "cancel" and len(tokens) > 20:
                handle.cancel()
        assert tokens == text[: len(tokens)] and len(tokens) < 60
        rounds = other.stats.rounds
        while other.stats.rounds < rounds + 60:  # so many that a row which went on would have lost its window
            time.sleep(0.01)
        more = engine.submit([*ids, *tokens], max_tokens=20, sampling=sampled(1), num_draft_tokens=2)
        out = more.result(WITHIN_S)
        assert tokens + out.tokens == alone(
            ids, max_context=1024, max_tokens=len(tokens) + 20, sampling=sampled(1)
        )
        assert out.stats.reused_tokens == len(ids) + len(tokens) - 1
        assert not other.is_done and not third.is_done


def _text_of(tokens: Sequence[int]) -> str:
    return pair_of().prompt_format.tokenizer.decode(list(tokens))


def test_without_a_budget_nothing_is_kept():
    with engine_on(prefix_budget=0) as engine:
        for _ in range(2):
            out = engine.submit(ids_of(count=40), max_tokens=6).result(WITHIN_S)
            assert out.stats.reused_tokens == 0
        assert engine.status.cached_bytes == 0
