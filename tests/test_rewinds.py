"""Conversations that go on, repeat, rewind and are edited: every reply equals a cold run's, whatever was reused."""

import functools
import random
from typing import Any

import pytest

import mlx_mtp.prefill
from mlx_mtp.conversation import Conversation
from mlx_mtp.pair import Pair
from mlx_mtp.state import ring_rows
from pairs import golden_pair
from talks import MODEL_TURN, check_rows, golden_text, take

pair_of = functools.cache(golden_pair)
REPLY = 9


@functools.lru_cache(maxsize=256)
def cold_reply(variant: str, ids: tuple[int, ...]) -> list[int]:
    """Plain decoding without anything reused."""
    return Conversation(pair_of(variant)).generate(list(ids), max_tokens=REPLY, num_draft_tokens=0).tokens


def user_turn(random_tokens: random.Random, length: int) -> list[int]:
    """Some text and the opening of the model's turn."""
    return [random_tokens.randrange(20, 256) for _ in range(length)] + MODEL_TURN


def ask(conversation: Conversation, variant: str, ids: list[int], k: int) -> tuple[list[int], int]:
    """A reply that equals the cold one; -> it and how many tokens were reused."""
    out = conversation.generate(ids, max_tokens=REPLY, num_draft_tokens=k)
    assert out.tokens == cold_reply(variant, tuple(ids))
    check_rows(conversation)
    return out.tokens, out.stats.reused_tokens


def talk(conversation: Conversation, variant: str, turns: int, k: int, seed: int = 3) -> list[list[int]]:
    """A conversation of so many turns; -> the prompts."""
    rng, prompts, ids = random.Random(seed), [], []
    for _ in range(turns):
        ids = ids + user_turn(rng, 14)
        prompts.append(ids)
        ids = ids + ask(conversation, variant, ids, k)[0]
    assert len(ids) > 2 * ring_rows(conversation.pair.target.text)
    return prompts


@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_regenerate_undo_and_edit_start_at_the_last_model_turn(variant):
    conversation = Conversation(pair_of(variant))
    prompts = talk(conversation, variant, 5, 3)
    opening = [len(ids) - len(MODEL_TURN) for ids in prompts]
    for k in (3, 0, 6):  # MTP turned off and on between replies
        assert ask(conversation, variant, prompts[4], k)[1] == opening[4]
    assert ask(conversation, variant, prompts[3], 3)[1] == opening[3]
    assert ask(conversation, variant, prompts[4], 3)[1] == opening[3] + len(MODEL_TURN) + REPLY - 1
    # An edit inside the last user turn: the model's turn before it is the nearest place to start from.
    edited = [*prompts[4][:-8], 77, *prompts[4][-7:]]
    assert ask(conversation, variant, edited, 3)[1] == opening[3]
    # An edit in the first turn leaves nothing.
    assert ask(conversation, variant, [77, *edited[1:]], 3)[1] == 0


def test_the_template_may_drop_the_start_of_a_reply():
    """Gemma's template leaves thoughts out of history, so the next prompt departs at the reply's first token."""
    conversation, rng = Conversation(pair_of("e2b")), random.Random(11)
    ids = user_turn(rng, 70)
    for _ in range(3):
        reply, _ = ask(conversation, "e2b", ids, 3)
        opening = len(ids) - len(MODEL_TURN)
        ids = ids + reply[2:] + user_turn(rng, 5)
        assert conversation.history.reusable(ids) == opening


def test_nothing_is_prefilled_twice_while_the_text_only_grows():
    conversation, rng = Conversation(pair_of("12b")), random.Random(2)
    ids, whole = user_turn(rng, 3), 0
    for turn in range(9):
        reply, reused = ask(conversation, "12b", ids, (0, 3, 6)[turn % 3])
        assert reused == whole
        whole = len(ids) + len(reply) - 1
        ids = ids + reply + user_turn(rng, 3)
    assert len(ids) > 3 * ring_rows(conversation.pair.target.text)


@pytest.mark.parametrize("k", [0, 6])
def test_before_the_ring_wraps_every_prefix_is_whole(k):
    pair, ids = pair_of("31b"), golden_text("31b", "long")[0]
    conversation = Conversation(pair)
    for length, reused in ((5, 0), (4, 3), (1, 0), (3, 1)):
        assert ask(conversation, "31b", ids[:length], k)[1] == reused


def test_a_chunk_that_was_half_written_is_not_trusted(monkeypatch):
    """Some layers' rings lost the window before it, others did not."""
    conversation, rng = Conversation(pair_of("31b")), random.Random(9)
    ids = [rng.randrange(20, 256) for _ in range(90)]
    reply, _ = ask(conversation, "31b", ids, 3)
    run_layer, layers = mlx_mtp.prefill.run_layer, iter(range(4))

    def stopping_layer(*args: Any) -> Any:
        if next(layers, None) is None:
            raise Stopped
        return run_layer(*args)

    longer = ids + reply + [rng.randrange(20, 256) for _ in range(60)]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(mlx_mtp.prefill, "run_layer", stopping_layer)
        take(conversation, longer, chunks=1)
    assert ask(conversation, "31b", [*ids, *reply, 77], 3)[1] == 0


def test_checkpoints_of_another_text_are_gone():
    """A text that departs early and grows past them must not come back to their rings."""
    conversation, rng = Conversation(pair_of("e2b")), random.Random(8)
    first = user_turn(rng, 50)
    reply, _ = ask(conversation, "e2b", first, 3)
    ask(conversation, "e2b", first + reply + user_turn(rng, 20), 3)
    other = first[:40] + user_turn(rng, 90)
    assert ask(conversation, "e2b", other, 3)[1] == 0
    assert ask(conversation, "e2b", [*other[:110], 77], 3)[1] == 0


def test_a_checkpoint_budget_of_one():
    """Rings over budget are dropped, the newest kept: older turns start cold, and stay right."""
    conversation = Conversation(pair_of("e2b"))
    conversation.history._checkpoint_bytes = 1
    prompts = talk(conversation, "e2b", 4, 3)
    assert len(conversation.history._checkpoints) == 1
    assert ask(conversation, "e2b", prompts[1], 3)[1] == 0
    assert ask(conversation, "e2b", prompts[1], 6)[1] == len(prompts[1]) - len(MODEL_TURN)


class Stopped(Exception):
    pass


def stop_at_once(done: int, total: int) -> None:
    raise Stopped


def test_a_checkpoint_remembers_the_dead_rows_in_its_rings():
    """A cancelled reply leaves dead rows; a checkpoint soon after holds them, and so does the ring restored from it."""
    conversation, rng = Conversation(pair_of("e2b")), random.Random(5)
    ids = user_turn(rng, 60)
    reply = take(conversation, ids, chunks=3, max_tokens=60, num_draft_tokens=15)
    whole = len(ids) + len(reply) - 1
    longer = ids + reply + MODEL_TURN
    ask(conversation, "e2b", longer, 3)
    with pytest.raises(Stopped):
        take(conversation, longer, chunks=1, on_progress=stop_at_once)
    check_rows(conversation)
    ask(conversation, "e2b", [*longer[: whole - 20], 77], 3)


@pytest.mark.parametrize("variant, seed, budget", [("e2b", 1, 2**30), ("31b", 2, 1), ("e4b", 3, 100_000)])
def test_a_random_walk(variant, seed, budget):
    check_random_walk(pair_of(variant), variant, seed, budget, steps=12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 112))
def test_long_random_walks(seed):
    check_random_walk(pair_of("e2b"), "e2b", seed, (2**30, 50_000, 1)[seed % 3], steps=80)


def check_random_walk(pair: Pair, variant: str, seed: int, budget: int, *, steps: int) -> None:
    """Ask, go on, repeat, rewind, edit, cancel and interrupt a prefill in any order."""
    rng = random.Random(seed)
    conversation = Conversation(pair, chunk=rng.choice((5, 16, 64)))
    conversation.history._checkpoint_bytes = budget
    asked, ids, wraps = [], user_turn(rng, 40), 0
    for _ in range(steps):
        k = rng.choice((0, 3, 6, 15))
        move = rng.choice(("reply", "reply", "reply", "cancel", "interrupt"))
        if move == "interrupt":
            interrupt_prefill(conversation, ids, rng, k)
            reply = []
        elif move == "cancel":
            reply = take(conversation, ids, chunks=rng.randint(1, 3), max_tokens=40, num_draft_tokens=k)
            assert reply[:REPLY] == cold_reply(variant, tuple(ids))[: len(reply)]
            check_rows(conversation)
        else:
            reply, _ = ask(conversation, variant, ids, k)
        wraps += conversation.history.rows > ring_rows(pair.target.text)
        asked.append((ids, reply))
        ids = next_prompt(rng, asked)
    assert wraps > steps // 4


def interrupt_prefill(conversation: Conversation, ids: list[int], rng: random.Random, k: int) -> None:
    """Between two chunks, or between two layers of one."""
    left = rng.randint(0, 2 if (between_chunks := rng.random() < 0.5) else 30)
    run_layer = mlx_mtp.prefill.run_layer

    def stop_sooner_or_later() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Stopped

    def on_progress(done: int, total: int) -> None:
        if between_chunks:
            stop_sooner_or_later()

    def stopping_layer(*args: Any) -> Any:
        if not between_chunks:
            stop_sooner_or_later()
        return run_layer(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlx_mtp.prefill, "run_layer", stopping_layer)
        try:
            take(conversation, ids, chunks=1, max_tokens=3, num_draft_tokens=k, on_progress=on_progress)
        except Stopped:
            pass
    check_rows(conversation)


def next_prompt(rng: random.Random, asked: list[tuple[list[int], list[int]]]) -> list[int]:
    """What somebody might ask next, given every prompt and reply so far."""
    ids, reply = asked[-1]
    move = rng.choice(("go on", "go on", "drop", "drop", "same", "earlier", "shorter", "edit"))
    if len(ids) > 180:
        return user_turn(rng, rng.randint(1, 30))
    if move in ("go on", "drop"):
        return ids + reply[rng.randint(0, 2) if move == "drop" else 0 :] + user_turn(rng, rng.randint(1, 25))
    if move == "earlier":
        return rng.choice(asked)[0]
    if move == "shorter":
        return ids[: rng.randint(1, len(ids))]
    if move == "edit":
        at = rng.randrange(max(0, len(ids) - 40), len(ids))
        return [*ids[:at], rng.randrange(20, 256), *ids[at + 1 :]]
    return ids
