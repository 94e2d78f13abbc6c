"""A reply may end at any token of a round; the conversation goes on as if it had ended there by itself."""

import functools
from dataclasses import replace

import mlx.core as mx
import pytest

import mlx_mtp.decode
from mlx_mtp import generate, generate_batch
from mlx_mtp.conversation import Conversation
from mlx_mtp.decode import Built, Ledger, RowLimits
from mlx_mtp.errors import PromptError
from mlx_mtp.state import State, no_drafts
from pairs import golden_pair
from talks import check_rows, golden_rows, golden_text, take, with_characters, with_eos

POSITIONS = range(10)  # prefill's token and more than a round's at k = 6
AFTER = 4  # tokens that a continuation is compared over

pair_of = functools.cache(golden_pair)


def check_continues(conversation: Conversation, variant: str, prompt: str, end: int, k: int) -> None:
    """The conversation that has just given text[:end] forwards one token and gives the next of `text`."""
    (ids, text), expected = golden_text(variant, prompt), golden_rows(variant, prompt)
    check_rows(conversation, expected)
    conversation.pair = with_eos(conversation.pair)
    more = conversation.generate(ids + text[:end], max_tokens=AFTER, num_draft_tokens=k)
    assert more.tokens == text[end : end + AFTER]
    assert more.stats.reused_tokens == len(ids) + end - 1
    check_rows(conversation, expected)


@pytest.mark.parametrize("k", [0, 3, 6])
def test_eos_at_every_position(k):
    pair, (ids, text) = pair_of("e2b"), golden_text("e2b", "long")
    first_seen = [i for i in POSITIONS if text[i] not in text[:i]]
    assert len(first_seen) == 9, first_seen
    for i in first_seen:
        conversation = Conversation(with_eos(pair, text[i]))
        out = conversation.generate(ids, max_tokens=40, num_draft_tokens=k)
        assert (out.tokens, out.finish_reason) == (text[: i + 1], "stop"), i
        check_continues(conversation, "e2b", "long", i + 1, k)


@pytest.mark.parametrize("k", [0, 3, 6])
def test_stop_string_at_every_position(k):
    pair, (ids, text) = with_characters(pair_of("31b")), golden_text("31b", "short")
    characters = "".join(chr(256 + token) for token in text)
    for i in POSITIONS:
        long_enough = (characters[i - n : i + 1] for n in range(i + 1))
        stop = next(s for s in long_enough if characters.find(s) + len(s) == i + 1)
        conversation = Conversation(pair)
        out = conversation.generate(ids, max_tokens=40, num_draft_tokens=k, stop=["no such text", stop])
        assert (out.tokens, out.finish_reason) == (text[: i + 1], "stop"), i
        assert out.text == characters[: i + 1 - len(stop)]
        check_continues(conversation, "31b", "short", i + 1, k)


@pytest.mark.parametrize("k", [0, 3, 6])
def test_max_tokens_at_every_position(k):
    """Also: no number of drafts overshoots what is left, be it larger than all of it."""
    pair, (ids, text) = pair_of("e4b"), golden_text("e4b", "long")
    for i in POSITIONS:
        conversation = Conversation(pair)
        out = conversation.generate(ids, max_tokens=i + 1, num_draft_tokens=k)
        assert (out.tokens, out.finish_reason) == (text[: i + 1], "length"), i
        assert out.stats.generation_tokens == i + 1
        check_continues(conversation, "e4b", "long", i + 1, k)


@pytest.mark.parametrize("k", [0, 3, 6])
def test_cancel_after_every_round(k):
    pair, (ids, text) = pair_of("12b"), golden_text("12b", "long")
    for chunks in range(1, 8):
        conversation = Conversation(pair)
        tokens = take(conversation, ids, chunks=chunks, max_tokens=40, num_draft_tokens=k)
        assert len(tokens) >= chunks and tokens == text[: len(tokens)]
        check_continues(conversation, "12b", "long", len(tokens), k)


def test_rounds_in_these_tests_accept_several_drafts():
    """Otherwise no position above would lie inside a round."""
    for variant, prompt in (("e2b", "long"), ("31b", "short"), ("e4b", "long"), ("12b", "long")):
        ids, _ = golden_text(variant, prompt)
        out = generate(pair_of(variant), ids, max_tokens=40, num_draft_tokens=6)
        assert sum(out.stats.accepted_by_position[1:]) >= 5, (variant, out.stats)


@pytest.mark.parametrize("k", [0, 4])
def test_batch_rows_ending_in_different_rounds_are_their_solo_runs(k):
    ids_a, text_a = golden_text("e2b", "short")
    ids_b, text_b = golden_text("e2b", "long")
    eos = next(token for i, token in enumerate(text_a) if 5 < i and token not in text_a[:i] + text_b[:24])
    end = text_a.index(eos) + 1
    pair = with_eos(pair_of("e2b"), eos)
    prompts = [ids_a, ids_b, ids_b[:30], ids_a[:1]]
    together = generate_batch(pair, prompts, max_tokens=24, num_draft_tokens=k)
    assert len({out.stats.rounds for out in together}) > 1
    assert together[0].tokens == text_a[:end] and together[1].tokens == text_b[:24]
    for prompt, out in zip(prompts, together, strict=True):
        solo = generate(pair, prompt, max_tokens=24, num_draft_tokens=k)
        assert (out.tokens, out.finish_reason) == (solo.tokens, solo.finish_reason)


def test_an_ended_row_stands_still(monkeypatch):
    """It would otherwise run past the end of its buffers while others go on."""
    rows: list[tuple[bool, int]] = []
    dispatch = mlx_mtp.decode._dispatch

    def watched(built: mlx_mtp.decode.Built) -> None:
        dispatch(built)
        rows.append((built.state.active.tolist()[0], built.state.length.tolist()[0]))

    monkeypatch.setattr(mlx_mtp.decode, "_dispatch", watched)
    (short, text), (long, _) = golden_text("e2b", "short"), golden_text("e2b", "long")
    eos = next(token for i, token in enumerate(text) if i > 3 and token not in text[:i])
    prompts = [short, long, long]  # two go on, so that the row is not dropped
    outs = generate_batch(with_eos(pair_of("e2b"), eos), prompts, max_tokens=30, num_draft_tokens=2)
    assert outs[0].stats.rounds + 3 < outs[1].stats.rounds
    after = rows[outs[0].stats.rounds + 1 :]
    assert len(after) > 3 and len(set(after)) == 1 and after[0][0] is False


def test_a_step_ends_where_its_row_does():
    """Before any text is made of it: cut after EOS, at max_tokens, and to nothing where no choice was sound."""
    zeros = mx.zeros((4,), mx.uint32)
    length, active = mx.array([9] * 4), mx.array([True] * 4)
    state = State((), length, zeros, zeros, no_drafts(4), zeros, {}, None, active)
    limits = [
        RowLimits(2, frozenset()),
        RowLimits(9, frozenset({6})),
        RowLimits(9, frozenset({8})),
        RowLimits(9, frozenset()),
    ]
    ledger = Ledger(state, limits)
    built = Built(state, mx.array([[5, 6, 7, 8]] * 4), mx.array([3, 3, 1, -1]), 3, False)
    step = ledger.record(built, traced_meanwhile=False)
    assert step.tokens == ((5, 6), (5, 6), (5, 6), ())
    assert step.finish == ("length", "stop", None, "error")
    assert ledger.longest == 11 and not ledger.all_ended


def test_batch_rows_ending_at_a_stop_string():
    pair, (ids, text) = with_characters(pair_of("31b")), golden_text("31b", "short")
    stop = chr(256 + text[4])
    assert text[4] not in text[:4]
    outs = generate_batch(pair, [ids, ids[:-1]], max_tokens=20, num_draft_tokens=3, stop=stop)
    assert (outs[0].tokens, outs[0].finish_reason) == (text[:5], "stop")
    assert outs[1].tokens == generate(pair, ids[:-1], max_tokens=20, num_draft_tokens=3, stop=stop).tokens


@pytest.mark.parametrize("variant", ["e2b", "31b"])
@pytest.mark.parametrize("length", [1, 15, 16, 17])
def test_prompts_around_one_token_and_one_window(variant, length):
    pair, (ids, _) = pair_of(variant), golden_text(variant, "long")
    plain = generate(replace(pair, drafter=None), ids[:length], max_tokens=20, num_draft_tokens=0)
    assert len(plain.tokens) == 20
    assert generate(pair, ids[:length], max_tokens=20, num_draft_tokens=6).tokens == plain.tokens


def test_prompts_around_the_context():
    ids, text = golden_text("e2b", "long")
    pair = replace(pair_of("e2b"), max_context=len(ids) + 1)
    for k in (0, 4):
        out = generate(pair, ids, max_tokens=99, num_draft_tokens=k)
        assert (out.tokens, out.finish_reason) == (text[:1], "length")
        nearly = generate(replace(pair, max_context=len(ids) + 3), ids, max_tokens=99, num_draft_tokens=k)
        assert (nearly.tokens, nearly.finish_reason) == (text[:3], "length")
    for more in ([7], [7] * 30):
        with pytest.raises(PromptError, match=rf"{len(ids) + len(more)} tokens.*holds {len(ids) + 1}"):
            generate(pair, ids + more, max_tokens=1)


def test_more_drafts_than_tokens_left_leave_no_trace():
    ids, text = golden_text("31b", "long")
    for max_tokens in (1, 2, 3):
        conversation = Conversation(pair_of("31b"))
        out = conversation.generate(ids, max_tokens=max_tokens, num_draft_tokens=15)
        assert out.tokens == text[:max_tokens]
        assert out.stats.generation_tokens == max_tokens and out.stats.rounds < max_tokens
        check_rows(conversation)
