"""The order of events in decoding: build the next round while this one runs, read this one, dispatch the next."""

import importlib
from itertools import pairwise
from pathlib import Path

import pytest

import mlx_mtp.decode
from pairs import golden_pair
from talks import golden_text

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def round_trace(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("round_trace")


@pytest.mark.parametrize("drafts", [0, 3])
def test_each_round_is_built_ahead_then_the_last_is_read_then_it_is_dispatched(round_trace, drafts):
    pair, (ids, _) = golden_pair("31b"), golden_text("31b", "short")
    parts = round_trace.rounds_of(round_trace.trace(pair, ids, tokens=16, drafts=drafts))
    assert tuple(event.stage for event in parts[0]) == round_trace.START
    assert tuple(event.stage for event in parts[-1]) == round_trace.END
    assert len(parts) >= 5 and all(tuple(e.stage for e in part) == round_trace.ROUND for part in parts[1:-1])
    events = [event for part in parts for event in part]
    assert all(a.end <= b.begin for a, b in pairwise(events))
    assert len(round_trace.timeline(parts)) == len(events)


def test_another_wait_in_a_round_is_seen(round_trace, monkeypatch):
    pair, (ids, _) = golden_pair("31b"), golden_text("31b", "short")
    sound = mlx_mtp.decode._dispatch

    def look_first(built):
        built.tokens.tolist()
        sound(built)

    monkeypatch.setattr(mlx_mtp.decode, "_dispatch", look_first)
    with pytest.raises(ValueError, match="expected wait for drafts, build ahead, dispatch"):
        round_trace.rounds_of(round_trace.trace(pair, ids, tokens=16, drafts=3))


def test_building_after_reading_is_seen(round_trace):
    late = (*round_trace.START, "read", "wait for drafts", "build ahead", "dispatch", *round_trace.END)
    events = [round_trace.Event(stage, i, i + 1) for i, stage in enumerate(late)]
    with pytest.raises(ValueError, match="part 2 goes read, wait for drafts, build ahead, dispatch"):
        round_trace.rounds_of(events)
