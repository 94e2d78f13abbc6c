"""Rows of a batch join when others have ended, and each text is that of its solo run."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import mlx_mtp.batch_slots
import mlx_mtp.decode
import mlx_mtp.turns
from mlx_mtp import generate, generate_batch
from mlx_mtp.batch import CALM_ROUNDS, LOOK_ROUNDS, MAX_BATCH, Watch, generate_rows
from mlx_mtp.batch_choice import WidthChooser
from mlx_mtp.conversation import Request, make_request, start_row
from mlx_mtp.errors import MemoryRefusal, ParameterError
from mlx_mtp.policy import make_policy
from mlx_mtp.pressure import STOPPED
from mlx_mtp.reply import Generation
from mlx_mtp.round_times import RoundTimes
from mlx_mtp.rows import add_rows, put_rows
from mlx_mtp.sampling import Sampling
from mlx_mtp.state import State, StateCell, join_rows
from mlx_mtp.turns import History
from pairs import golden_pair
from scripted_guard import ScriptedGuard
from talks import golden_text, with_characters, with_eos

pair_of = functools.cache(golden_pair)

# Twelve requests: prompts of 4 to 60 ids, replies of 1 to 40 tokens, every second greedy, two with penalties.
LENGTHS = (9, 1, 23, 40, 2, 17, 5, 31, 12, 3, 26, 8)
STARTS = (4, 60, 17, 33, 8, 50, 21, 5, 44, 12, 29, 38)


def sampling_of(i: int) -> Sampling:
    if i % 2 == 0:
        return Sampling(temperature=0.0)
    if i in (3, 9):
        return Sampling(temperature=1.0, presence_penalty=0.8, repetition_penalty=1.3, seed=i)
    return Sampling(temperature=0.9, top_p=0.95, top_k=20 * (i % 3), seed=i)


@functools.cache
def twelve(variant: str) -> list[Request]:
    ids = [*golden_text(variant, "long")[0], *golden_text(variant, "short")[0]] * 3
    return [
        make_request(pair_of(variant), ids[i : i + STARTS[i]], max_tokens=LENGTHS[i], sampling=sampling_of(i))
        for i in range(12)
    ]


@functools.cache
def solo(variant: str) -> list[list[int]]:
    """Each alone, plain."""
    return [
        generate(
            pair_of(variant),
            request.ids,
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            num_draft_tokens=0,
        ).tokens
        for request in twelve(variant)
    ]


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


def together(requests, k, *, width=4, guard=None, variant="e2b", watch=None) -> list[Generation]:
    policy = make_policy(k, has_drafter=True)
    return generate_rows(
        pair_of(variant), requests, policy, guard or ScriptedGuard(), watch or Watch(), max_batch=width
    )


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


@pytest.fixture
def prefills(monkeypatch) -> list[int]:
    """Tokens forwarded by each prefill of a whole prompt."""
    forwarded: list[int] = []
    prefill = mlx_mtp.turns.prefill

    def counted(target, kv, ids, **how):
        forwarded.append(len(ids) - how.get("start", 0))
        return prefill(target, kv, ids, **how)

    monkeypatch.setattr(mlx_mtp.turns, "prefill", counted)
    return forwarded


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_four_answers_share_one_prefill(width, prefills):
    pair, ids = pair_of("e2b"), twelve("e2b")[5].ids
    sampling = Sampling(temperature=1.0, seed=40)
    outs = generate_batch(
        pair, [ids, ids[:7]], n=4, max_batch=width, max_tokens=9, sampling=sampling, num_draft_tokens=2
    )
    assert prefills == [len(ids), 7]
    alone = [
        generate(pair, own, max_tokens=9, sampling=replace(sampling, seed=40 + i), num_draft_tokens=0).tokens
        for own in (ids, ids[:7])
        for i in range(4)
    ]
    assert [out.tokens for out in outs] == alone
    assert [out.stats.seed for out in outs] == [40, 41, 42, 43] * 2
    assert len({tuple(out.tokens) for out in outs[:4]}) > 1


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


def refusing(*refused: int):
    calls = iter(range(1000))

    def admits(needed: int) -> None:
        if next(calls) in refused:
            raise MemoryRefusal("it does not fit; shorten the prompt")

    return admits


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


def test_stopping_ends_rows_that_wait_too():
    outs = together(twelve("e2b"), 2, guard=ScriptedGuard(["none"] * 7 + ["stop"]))
    assert {out.note for out in outs if out.finish_reason == "error"} == {STOPPED}
    for out, whole in zip(outs, solo("e2b"), strict=True):
        assert out.tokens == whole[: len(out.tokens)]
    assert outs[-1].tokens == []


def states_of(variant: str, requests: list[Request]) -> list[State]:
    states = []
    for request in requests:
        kv, hidden, _ = History(pair_of(variant).target).extend(request.ids, room=request.max_tokens)
        states.append(start_row(pair_of(variant), request, kv, hidden, with_bias=False, with_counts=True))
    return states


@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_rows_put_and_added_are_those_of_one_join(variant):
    """A row of larger capacity grows the others; a smaller one is put with zeros behind it."""
    text, requests = pair_of(variant).target.text, twelve(variant)[:4]
    large = replace(requests[1], max_tokens=400)
    wanted = join_rows(text, states_of(variant, [requests[0], large, requests[3], requests[2]]))
    cell = StateCell(join_rows(text, states_of(variant, [requests[0], requests[2]])))
    put_rows(text, cell, {1: states_of(variant, [large])[0]})
    add_rows(text, cell, states_of(variant, [requests[3], requests[2]]))
    got = cell.take()
    for (_, one), (_, other) in zip(tree_flatten(got), tree_flatten(wanted), strict=True):
        assert one.shape == other.shape and mx.array_equal(one, other)


def test_a_row_is_replaced_whole_by_one_of_smaller_capacity():
    """What a broken row left in its place may be NaN, which no mask takes away."""
    text, small = pair_of("e2b").target.text, twelve("e2b")[0]
    state = join_rows(text, states_of("e2b", [replace(twelve("e2b")[1], max_tokens=400), small]))
    kv = tuple((mx.full(keys.shape, mx.nan), mx.full(values.shape, mx.nan)) for keys, values in state.kv)
    cell = StateCell(state._replace(kv=kv))
    put_rows(text, cell, {0: states_of("e2b", [small])[0]})
    for buffer in (buffer for both in cell.take().kv for buffer in both):
        assert not mx.isnan(buffer[0]).any() and mx.isnan(buffer[1]).all()


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


@pytest.mark.parametrize("n", [0, -3, 65, True, 1.5, "2"])
def test_impossible_numbers_of_answers_are_refused(n):
    with pytest.raises(ParameterError, match=r"1 \.\. 64 answers"):
        generate_batch(pair_of("e2b"), [[1, 2]], n=n)
