"""Rows of a batch join when others have ended, and each text is that of its solo run."""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import pytest

import mlx_mtp.batch_slots
import mlx_mtp.decode
import mlx_mtp.prefill
import mlx_mtp.turns
from mlx_mtp import generate_batch
from mlx_mtp.batch import generate_rows
from mlx_mtp.batch_choice import WidthChooser
from mlx_mtp.batch_watch import Watch
from mlx_mtp.batch_width import CALM_ROUNDS, LOOK_ROUNDS, MAX_BATCH
from mlx_mtp.conversation import Request
from mlx_mtp.errors import ParameterError
from mlx_mtp.policy import make_policy
from mlx_mtp.pressure import STOPPED
from mlx_mtp.reply import Generation
from mlx_mtp.round_times import RoundTimes
from ragged_requests import LENGTHS, STARTS, pair_of, refusing, solo, together, twelve
from scripted_guard import ScriptedGuard
from talks import with_characters, with_eos


@pytest.fixture
def batches(monkeypatch) -> list[list[int]]:
    """The requests' lengths in each run of rounds, as (tokens left of each row)."""
    runs: list[list[int]] = []
    decode = mlx_mtp.batch_slots.decode

    def watched(rounds, cell, rows: Sequence, *rest, **until):
        runs.append([row.max_tokens for row in rows])
        return decode(rounds, cell, rows, *rest, **until)

    monkeypatch.setattr(mlx_mtp.batch_slots, "decode", watched)
    return runs


SLOW = [("e2b", 0), ("e2b", 2), ("e4b", 1), ("12b", 4), ("31b", "auto"), ("a4b", 2), ("a4b", "auto")]


@pytest.mark.parametrize(
    "variant, k",
    [
        ("e2b", "auto"),
        ("31b", 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_twelve_ragged_requests_through_width_four(variant, k, batches):
    outs = together(twelve(variant), k, variant=variant)
    assert [out.tokens for out in outs] == solo(variant)
    assert [out.stats.generation_tokens for out in outs] == list(LENGTHS)
    assert {out.finish_reason for out in outs} == {"length"}
    assert len(batches[0]) == 4 and max(map(len, batches)) == 4
    joins = sum(1 for run in batches[1:] if any(left in LENGTHS[4:] for left in run))
    assert joins >= 5, "rows joined one by one"
    assert len(batches[-1]) < 4, "and rows that have ended are not computed for ever"


def at_phase(request: Request, others: list[Request], phase: int) -> list[Request]:
    """The others, the first of which ends `phase` tokens into the second, so that `request` joins there."""
    return [replace(others[0], max_tokens=phase), others[1], request]


@pytest.mark.parametrize(
    "k, phases",
    [
        (4, range(1, 14, 3)),
        pytest.param(0, range(1, 14), marks=pytest.mark.slow),
        pytest.param(4, range(1, 14), marks=pytest.mark.slow),
    ],
)
def test_a_row_joins_at_every_phase_of_another(k, phases):
    """Joining before, at and after each round of a row of twelve tokens changes neither text."""
    requests = twelve("e2b")
    first, long, joining = requests[2], replace(requests[5], max_tokens=12), requests[8]
    plain = solo("e2b")
    for phase in phases:
        outs = together(at_phase(joining, [first, long], phase), k, width=2)
        assert outs[0].tokens == plain[2][:phase], phase
        assert outs[1].tokens == plain[5][:12], phase
        assert outs[2].tokens == plain[8], phase


class ScriptedWidth(WidthChooser):
    """Another width at each look."""

    def __init__(self, *widths: int):
        super().__init__(RoundTimes(), lambda k: 1.0, most=8)
        self.left: list[int] = []
        self.width, *self.widths = widths

    def look(self, left: int) -> int:
        self.left.append(left)
        self.width = self.widths.pop(0) if self.widths else self.width
        return self.width


def test_the_width_changes_while_rows_run(batches):
    """Wider at once, narrower as rows end; each text stays its own."""
    chooser = ScriptedWidth(2, 6, 1)
    outs = together(twelve("e2b"), 2, width=chooser)
    assert [out.tokens for out in outs] == solo("e2b")
    widths = [len(run) for run in batches]
    assert widths[0] == 2 and max(widths) == 6 and widths[-1] == 1
    assert chooser.left == sorted(chooser.left, reverse=True) and chooser.left[0] > 6
    rounds = sum(max(lengths) for lengths in batches)
    assert len(chooser.left) <= rounds // LOOK_ROUNDS


def test_a_batch_without_a_width_tries_what_pays(batches):
    pair, requests = pair_of("e2b"), twelve("e2b")[:9]
    prompts, sampling = [one.ids for one in requests], [one.sampling for one in requests]
    outs = generate_batch(pair, prompts, max_tokens=6, sampling=sampling, num_draft_tokens=0)
    for out, text in zip(outs, solo("e2b"), strict=False):
        assert out.tokens[: len(text)] == text[:6] and len(out.tokens) == 6
    assert max(len(run) for run in batches) <= 8
    for goal in ("speed", "", None):
        with pytest.raises(ParameterError, match="throughput"):
            generate_batch(pair, prompts, goal=goal)


def test_width_one_is_one_after_another(batches):
    outs = together(twelve("e2b")[:5], 2, width=1)
    assert [out.tokens for out in outs] == solo("e2b")[:5]
    assert {len(run) for run in batches} == {1}


def test_a_stop_string_makes_room_and_the_row_writes_no_more(batches):
    """Rounds know nothing of stop strings: the row is left out by the batch."""
    pair = with_characters(pair_of("e2b"))
    requests = twelve("e2b")[:4]
    text = solo("e2b")[3]
    stopped = replace(requests[3], stop=("".join(chr(256 + token) for token in text[4:6]),))
    policy = make_policy(2, has_drafter=True)
    outs = generate_rows(pair, [stopped, requests[2], requests[0]], policy, ScriptedGuard(), max_batch=2)
    assert (outs[0].finish_reason, len(outs[0].text)) == ("stop", 4)
    assert [outs[1].tokens, outs[2].tokens] == [solo("e2b")[2], solo("e2b")[0]]
    assert len(batches) >= 2 and LENGTHS[0] in batches[1], "the third joined when the first had stopped"


def test_a_row_that_stopped_and_keeps_its_place_is_inactive(monkeypatch):
    """Nobody takes its place, for want of memory: the next run of rounds leaves it out."""
    started: list[list[bool]] = []
    decode = mlx_mtp.batch_slots.decode

    def watched(rounds, cell, *rest, **until):
        started.append(cell.peek().active.tolist())
        return decode(rounds, cell, *rest, **until)

    monkeypatch.setattr(mlx_mtp.batch_slots, "decode", watched)
    text = solo("e2b")[3]
    stopped = replace(twelve("e2b")[3], stop=("".join(chr(256 + token) for token in text[4:6]),))
    requests = [stopped, *(twelve("e2b")[i] for i in (2, 10, 0))]
    guard = ScriptedGuard(admits=refusing(3))
    pair = with_characters(pair_of("e2b"))
    outs = generate_rows(pair, requests, make_policy(0, has_drafter=True), guard, max_batch=3)
    assert [out.tokens for out in outs[1:]] == [solo("e2b")[i] for i in (2, 10, 0)]
    assert started[:2] == [[True, True, True], [False, True, True]]


def test_an_eos_inside_a_block_makes_room():
    text = solo("e2b")[2]
    eos = next(token for token in text[5:] if token not in text[:5])
    pair = with_eos(pair_of("e2b"), eos)
    requests = [twelve("e2b")[i] for i in (2, 3, 0, 5)]
    outs = generate_rows(pair, requests, make_policy(4, has_drafter=True), ScriptedGuard(), max_batch=2)
    for out, i in zip(outs, (2, 3, 0, 5), strict=True):
        whole = solo("e2b")[i]
        assert out.tokens == (whole[: whole.index(eos) + 1] if eos in whole else whole)


def test_a_row_that_ends_with_its_first_token_advances_no_more(monkeypatch):
    """It has no room for more: its next rows would lie beyond its buffers."""
    lengths: list[list[int]] = []
    record = mlx_mtp.decode.Ledger.record

    def watched(ledger, built, **how):
        lengths.append(built.state.length.tolist())
        return record(ledger, built, **how)

    monkeypatch.setattr(mlx_mtp.decode.Ledger, "record", watched)
    together([twelve("e2b")[i] for i in (1, 2, 5)], 2)
    whole = [row for row in lengths if len(row) == 3]  # until the second has ended
    assert {row[0] for row in whole} == {STARTS[1]} and len(whole) > 2


def test_each_reply_is_handed_over_when_it_ends():
    ended: list[int] = []
    outs = {}

    def on_done(index: int, out: Generation) -> None:
        ended.append(index)
        outs[index] = out

    counts: list[int] = []
    whole = together(twelve("e2b"), 0, watch=Watch(on_done=on_done, on_round=counts.append))
    assert sorted(ended) == list(range(12)) and ended[0] == 1 and ended != sorted(ended)
    assert [outs[i].tokens for i in range(12)] == [out.tokens for out in whole] == solo("e2b")
    assert counts == sorted(counts) and counts[-1] == sum(LENGTHS)


def test_a_caller_who_raises_ends_the_batch():
    def on_round(tokens: int) -> None:
        if tokens > 10:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        together(twelve("e2b"), 2, watch=Watch(on_round=on_round))
    assert [out.tokens for out in together(twelve("e2b")[:3], 2)] == solo("e2b")[:3]


def test_memory_makes_it_narrower_and_that_is_said_once(batches):
    notes: list[str] = []
    guard = ScriptedGuard(admits=refusing(2, 3, 5))
    outs = together(twelve("e2b")[:7], 2, guard=guard, watch=Watch(on_note=notes.append))
    assert [out.tokens for out in outs] == solo("e2b")[:7]
    assert len(batches[0]) == 2
    assert len(notes) == 1 and "2 rows at a time" in notes[0] and "4 asked for" in notes[0]


def test_rows_put_aside_join_again_while_others_run(batches):
    guard = ScriptedGuard(["none"] * 8 + ["shrink"] + ["none"] * 5 + ["shrink"])
    outs = together(twelve("e2b")[:7], 2, guard=guard)
    assert [out.tokens for out in outs] == solo("e2b")[:7]
    assert min(map(len, batches)) < 4


def test_a_batch_widens_again_when_memory_is_there(batches):
    requests = [replace(twelve("e2b")[i], max_tokens=CALM_ROUNDS + 30) for i in (0, 2, 4, 6)]
    outs = together(requests, 0, width=2, guard=ScriptedGuard(["none"] * 5 + ["shrink"]))
    assert [len(run) for run in batches[:3]] == [2, 1, 2]
    whole = together(requests, 0, width=4)
    assert [out.tokens for out in outs] == [out.tokens for out in whole]


def test_one_that_never_fits_ends_alone():
    """Where replies are handed over one by one nothing is raised for one of them."""
    done: dict[int, Generation] = {}
    guard = ScriptedGuard(admits=refusing(0))
    together(twelve("e2b")[:4], 2, guard=guard, watch=Watch(on_done=done.__setitem__))
    assert done[0].finish_reason == "error" and "it does not fit" in (done[0].note or "")
    assert [done[i].tokens for i in (1, 2, 3)] == solo("e2b")[1:4]


def test_a_row_that_failed_at_once_and_keeps_its_place_holds_up_nobody(batches, monkeypatch):
    """Nobody takes its place, for want of memory: rounds go on without it, and it is told of once."""
    logits, calls = mlx_mtp.prefill.logits_of, []

    def broken(target, hidden):
        calls.append(1)
        return logits(target, hidden) * (mx.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(mlx_mtp.prefill, "logits_of", broken)
    requests = [twelve("e2b")[i] for i in (2, 10, 6, 0)]
    outs = together(requests, 0, width=3, guard=ScriptedGuard(admits=refusing(3)))
    assert (outs[2].finish_reason, outs[2].tokens) == ("error", [])
    assert [outs[i].tokens for i in (0, 1, 3)] == [solo("e2b")[i] for i in (2, 10, 0)]
    assert len(batches) <= 4, "each run of rounds goes on until a row ends"


def test_stopping_ends_rows_that_wait_too():
    outs = together(twelve("e2b"), 2, guard=ScriptedGuard(["none"] * 7 + ["stop"]))
    assert {out.note for out in outs if out.finish_reason == "error"} == {STOPPED}
    for out, whole in zip(outs, solo("e2b"), strict=True):
        assert out.tokens == whole[: len(out.tokens)]
    assert outs[-1].tokens == []


def test_no_round_is_played_for_nothing_when_rows_join(monkeypatch):
    """Rounds end where a row does; one more may be under way only when the batch gets narrower at its end."""
    counts = {"dispatched": 0, "read": 0}
    dispatch, record = mlx_mtp.decode._dispatch, mlx_mtp.decode.Ledger.record

    def dispatched(built):
        counts["dispatched"] += 1
        dispatch(built)

    def read(ledger, built, **how):
        counts["read"] += 1
        return record(ledger, built, **how)

    monkeypatch.setattr(mlx_mtp.decode, "_dispatch", dispatched)
    monkeypatch.setattr(mlx_mtp.decode.Ledger, "record", read)
    together([twelve("e2b")[i] for i in (0, 2, 4, 6, 8)], 2, width=2)
    assert counts["read"] > 20 and counts["dispatched"] <= counts["read"] + 1


@pytest.mark.parametrize("width", [0, -1, MAX_BATCH + 1, True, 2.0, "4"])
def test_impossible_widths_are_refused(width):
    with pytest.raises(ParameterError, match=rf"1 \.\. {MAX_BATCH} rows"):
        generate_batch(pair_of("e2b"), [[1, 2]], max_batch=width)
