"""Short of memory in a batch: rows are put aside and go on later, and every text is that of its solo run."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx
import pytest

import mlx_mtp.batch_slots
import mlx_mtp.state
from mlx_mtp import generate
from mlx_mtp.batch import generate_rows
from mlx_mtp.batch_watch import Watch
from mlx_mtp.conversation import make_request, start_row
from mlx_mtp.errors import MemoryRefusal
from mlx_mtp.policy import make_policy
from mlx_mtp.pressure import STOPPED, Relief
from mlx_mtp.reply import Generation
from mlx_mtp.sampling import Sampling
from mlx_mtp.turns import History
from pairs import golden_pair
from scripted_guard import ScriptedGuard
from talks import golden_text

pair_of = functools.cache(golden_pair)
LENGTH = 16
SAMPLED = Sampling(temperature=1.0)
PENALISED = Sampling(temperature=1.0, presence_penalty=0.8, repetition_penalty=1.3, logit_bias={7: 2.0})


def prompts(variant: str) -> list[list[int]]:
    (short, _), (long, _) = golden_text(variant, "short"), golden_text(variant, "long")
    return [short, long, long[:20], long[:20]]


def settings(sampling: Sampling) -> list[Sampling]:
    return [replace(sampling, seed=seed) for seed in range(4)]


@functools.cache
def solo(variant: str, sampling: Sampling, k: int) -> list[list[int]]:
    return [
        generate(pair_of(variant), ids, max_tokens=LENGTH, sampling=own, num_draft_tokens=k).tokens
        for ids, own in zip(prompts(variant), settings(sampling), strict=True)
    ]


def together(variant: str, sampling: Sampling, k: int, guard: ScriptedGuard) -> list[Generation]:
    pair = pair_of(variant)
    requests = [
        make_request(pair, ids, max_tokens=LENGTH, sampling=own)
        for ids, own in zip(prompts(variant), settings(sampling), strict=True)
    ]
    return generate_rows(pair, requests, make_policy(k, has_drafter=True), guard)


@pytest.fixture
def batches(monkeypatch) -> list[int]:
    """How many rows each run of rounds had."""
    sizes: list[int] = []
    decode = mlx_mtp.batch_slots.decode

    def watched(rounds, cell, rows: Sequence, policy, sampler, **until):
        sizes.append(len(rows))
        return decode(rounds, cell, rows, policy, sampler, **until)

    monkeypatch.setattr(mlx_mtp.batch_slots, "decode", watched)
    return sizes


# Prefills ask three times (two rows share one), then each step does.
WHEN: list[tuple[int, list[Relief], list[int]]] = [
    (0, ["none", "none", "none", "shrink"], [4, 2, 2]),
    (3, ["none"] * 4 + ["shrink"], [4, 2, 2]),
    (3, ["none"] * 5 + ["shrink", "none", "shrink"], [4, 2, 1, 3]),
    (3, ["none"] * 3 + ["shrink"] * 9, [4, 2, 1]),
    (3, ["shrink"], [1, 3]),
]


@pytest.mark.parametrize("k, reliefs, sizes", WHEN)
@pytest.mark.parametrize(
    "variant, sampling", [("e2b", SAMPLED), ("31b", PENALISED)], ids=["plain", "penalties"]
)
def test_rows_put_aside_go_on_with_the_same_text(variant, sampling, k, reliefs, sizes, batches):
    outs = together(variant, sampling, k, ScriptedGuard(reliefs))
    assert [out.tokens for out in outs] == solo(variant, sampling, k)
    assert {(out.finish_reason, out.note) for out in outs} == {("length", None)}
    assert batches[: len(sizes)] == sizes
    assert all(out.stats.generation_tokens == LENGTH for out in outs)


def test_a_row_goes_on_after_the_tokens_it_has():
    """Only rows before its last token are prefilled, and that token is not chosen again."""
    pair, ids = pair_of("e2b"), prompts("e2b")[1]
    totals: list[int] = []
    requests = [make_request(pair, own, max_tokens=LENGTH, sampling=SAMPLED) for own in ([1, *ids], ids)]
    guard = ScriptedGuard(["none"] * 4 + ["shrink"])  # two prefills and three steps of one token each
    policy = make_policy(0, has_drafter=True)
    generate_rows(pair, requests, policy, guard, Watch(lambda done, total: totals.append(total)))
    assert totals == [len(ids) + 1, len(ids), len(ids) + 2]

    request = make_request(pair, ids, max_tokens=LENGTH, sampling=PENALISED)
    kv, hidden, _ = History(pair.target).extend([*ids, 9, 8], room=LENGTH)
    state = start_row(pair, request, kv, hidden, with_bias=True, with_counts=True, written=[9, 8, 9])
    assert (state.length.tolist(), state.last.tolist(), state.active.tolist()) == (
        [len(ids) + 2],
        [9],
        [True],
    )
    assert state.counts is not None and state.hidden is hidden
    assert (state.counts[0, 1, 8:10].tolist(), state.counts[0, 1].sum().item()) == ([1, 2], 3)
    assert state.counts[0, 0].tolist() == [ids.count(token) for token in range(256)]


def test_rows_that_ended_are_dropped_with_those_put_aside(monkeypatch, batches):
    """And nothing is asked of them any more."""
    pair, (ids, text) = pair_of("e2b"), golden_text("e2b", "long")
    kept: list[list[int]] = []
    keep_rows = mlx_mtp.batch_slots.keep_rows
    monkeypatch.setattr(
        mlx_mtp.batch_slots, "keep_rows", lambda cell, rows: (kept.append(list(rows)), keep_rows(cell, rows))
    )
    requests = [
        make_request(pair, ids, max_tokens=length, sampling=Sampling(temperature=0.0))
        for length in (3, 12, 12)
    ]
    guard = ScriptedGuard(["none"] * 6 + ["shrink"])
    outs = generate_rows(pair, requests, make_policy(0, has_drafter=True), guard)
    assert kept == [[1]] and batches == [3, 1, 1]
    assert [out.tokens for out in outs] == [text[:3], text[:12], text[:12]]


def test_narrowing_frees_the_rows():
    pair, (ids, _) = pair_of("e2b"), golden_text("e2b", "long")
    active: list[int] = []

    def measuring() -> Iterator[Relief]:
        for relief in ["none"] * 4 + ["shrink"] + ["none"] * 4:
            active.append(mx.get_active_memory())
            yield relief

    requests = [make_request(pair, ids, max_tokens=30, sampling=SAMPLED) for _ in range(16)]
    generate_rows(pair, requests, make_policy(0, has_drafter=True), ScriptedGuard(measuring()))
    base = active[0]  # after the only prefill: one row
    whole, half = active[4] - base, active[7] - base
    assert whole > 1_000_000 and half < 0.6 * whole, active


def test_stopping_keeps_a_beginning_of_every_text(batches):
    outs = together("e2b", SAMPLED, 3, ScriptedGuard(["none"] * 5 + ["shrink", "none", "stop"]))
    assert batches == [4, 2]
    for out, whole in zip(outs, solo("e2b", SAMPLED, 3), strict=True):
        assert (out.finish_reason, out.note) == ("error", STOPPED)
        assert 0 < len(out.tokens) < LENGTH and out.tokens == whole[: len(out.tokens)]
    again = together("e2b", SAMPLED, 3, ScriptedGuard())
    assert [out.tokens for out in again] == solo("e2b", SAMPLED, 3)


def refusing_calls(*refused: int):
    calls = iter(range(1000))

    def admits(needed: int) -> None:
        if next(calls) in refused:
            raise MemoryRefusal("it does not fit; shorten the prompt")

    return admits


def test_rows_that_do_not_fit_wait_for_the_others(batches):
    outs = together("e2b", SAMPLED, 3, ScriptedGuard(admits=refusing_calls(2, 4)))
    assert [out.tokens for out in outs] == solo("e2b", SAMPLED, 3)
    assert batches == [2, 1, 1]


def test_nothing_that_fits_is_refused():
    with pytest.raises(MemoryRefusal, match="it does not fit"):
        together("e2b", SAMPLED, 3, ScriptedGuard(admits=refusing_calls(0)))


def test_what_was_written_is_kept_when_the_rest_does_not_fit():
    outs = together("e2b", SAMPLED, 3, ScriptedGuard(admits=refusing_calls(2, 3)))
    assert [out.tokens for out in outs[:2]] == solo("e2b", SAMPLED, 3)[:2]
    assert [(out.tokens, out.finish_reason) for out in outs[2:]] == [([], "error")] * 2
    assert outs[3].note == "it does not fit; shorten the prompt; what was written is kept"


def test_a_prefill_given_up_stops_the_rows_that_wait():
    outs = together(
        "e2b", SAMPLED, 3, ScriptedGuard(["shrink"] + ["none"] * LENGTH * 4, admits=refusing_calls(1))
    )
    assert outs[0].tokens == solo("e2b", SAMPLED, 3)[0]
    assert {out.finish_reason for out in outs[1:]} == {"error"}


def test_admission_counts_that_joined_rows_are_copies():
    """Prefilling takes a row; joining takes all rows once more; a row that shares a prefill takes only the latter."""
    pair, (ids, _) = pair_of("e2b"), golden_text("e2b", "long")
    different = [[i, *ids[1:]] for i in (1, 2, 3)]
    requests = [make_request(pair, own, max_tokens=2) for own in [*different, different[-1]]]
    guard = ScriptedGuard()
    generate_rows(pair, requests, make_policy(0, has_drafter=True), guard)
    first, second, third, shared = guard.needed
    row = third - second
    assert row > 50_000 and second - first == 2 * row
    assert shared == 4 * row
