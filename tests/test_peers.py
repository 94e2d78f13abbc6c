"""What bench/peers.py makes of its arms' runs: texts compared, host work counted, runs that disagree refused."""

import json
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_mtp.round import Rounds
from pairs import GOLDEN
from talks import golden_text

ROOT = Path(__file__).resolve().parent.parent


def process(tokens, seconds, rounds=4, accepted=4, host=None):
    """What one process of an arm prints, with one run of one prompt."""
    run = {"tokens": [tokens], "seconds": seconds, "rounds": rounds, "accepted": accepted}
    return {"versions": {"mlx": "0"}, "runs": [run], "host": host}


def test_figures_of_an_arm(bench):
    peers = bench("peers")
    text = [[5, 6, 7, 8, 9]]
    own = [process(text[0], 0.008), process(text[0], 0.010), process(text[0], 0.009)]
    found = peers.figures_of("ours MTP", own, text, timed=4)
    assert found["text"] == "equal" and found["host, a round"] is None
    assert found["ms a token"]["median"] == 2.25 and found["tokens a second"] == 444.4
    assert found["ms a round"] == 2.25 and found["tokens a round"] == 1.0
    with pytest.raises(SystemExit, match="different tokens from run to run"):
        peers.figures_of("ours MTP", [*own, process([5, 6, 7, 8, 1], 0.009)], text, timed=4)
    peer = peers.figures_of("mlx-lm plain", [process([5, 6, 7, 8, 1], 0.009), *own], text, timed=4)
    assert peer["text"] == "differs from run to run", "also where the last run is the reference's text"
    assert peers.ratios_of({"ours plain": found, "mlx-lm plain": peer}) == {}


def test_ratios_are_of_equal_texts_only(bench):
    peers = bench("peers")
    text = [[5, 6, 7]]
    figures = {
        name: peers.figures_of(name, [process(own, seconds)], text, timed=2)
        for name, own, seconds in (
            ("ours plain", [5, 6, 7], 0.004),
            ("ours MTP", [5, 6, 7], 0.002),
            ("mlx-lm plain", [5, 6, 7], 0.008),
            ("mlx-vlm MTP", [5, 9, 7], 0.001),
        )
    }
    assert figures["mlx-vlm MTP"]["text"] == "differs in 1 of 1, first in reply 1 from token 2 on"
    assert peers.ratios_of(figures) == {
        "ours plain / mlx-lm plain, ms a token": 0.5,
        "ours MTP / ours plain, ms a token": 0.5,
        "ours MTP / mlx-lm plain, ms a token": 0.25,
    }


def test_calls_that_wait_and_dispatch_are_counted_inside_the_spans(bench):
    watching = bench("peer_watch").watching
    original = mx.eval
    clock = bench("peer_arm").Clock()
    with watching() as watch:
        mx.eval(mx.ones(3))  # outside: prefill
        clock.start()
        for _ in range(2):
            x = mx.ones(3) + 1
            mx.async_eval(x)
            assert x.tolist() == [2, 2, 2] and x.sum().item() == 6
        clock.stop()
        mx.synchronize()
    assert mx.eval is original
    found = watch.summary(clock.spans, clock.processor_s, rounds=2)
    assert found["dispatches"] == 1 and found["syncs"] == 2
    assert 0 < found["host ms"] == found["build ms"]
    assert found["host ms"] + found["dispatch ms"] + found["wait ms"] <= 1e3 * clock.seconds / 2


def test_host_time_is_processor_time_outside_the_calls(bench):
    peer_watch = bench("peer_watch")
    watch = peer_watch.Watch(
        [
            peer_watch.Call("build", 0.0, 0.5, 0.2),
            peer_watch.Call("async_eval", 0.5, 0.9, 0.1),
            peer_watch.Call("tolist", 0.9, 1.0, 0.01),
            peer_watch.Call("eval", 2.0, 3.0, 1.0),  # outside
        ]
    )
    found = watch.summary([(0.0, 1.0)], 0.5, rounds=1)
    assert {what: round(value, 6) for what, value in found.items()} == {
        "host ms": 390,
        "build ms": 200,
        "dispatch ms": 400,
        "wait ms": 100,
        "dispatches": 1,
        "syncs": 1,
    }


def test_our_arm_writes_the_golden_text_and_is_watched(bench, monkeypatch, tmp_path, capsys):
    peer_arm, ours = bench("peer_arm"), bench("peer_ours")
    monkeypatch.setattr(ours, "Rounds", partial(Rounds, compiled=False))
    ids, text = golden_text("31b", "short")
    folder = GOLDEN / "31b"
    job = peer_arm.Job(str(folder / "target"), str(folder / "drafter"), [ids], 20, 3, 0, 2, True, True)
    monkeypatch.setattr(sys, "argv", ["arm", str(peer_arm.write_job(job, tmp_path / "job.json"))])
    peer_arm.run_arm(ours.open_arm, ("mlx",), ours.WATCHING)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [run["tokens"] for run in printed["runs"]] == [[list(text[:20])]] * 2
    run, host = printed["runs"][0], printed["host"]
    assert run["rounds"] + run["accepted"] >= 19 and run["accepted"] > 0
    assert host["dispatches"] == 2, "tokens and K/V, then drafts"
    assert 0 < host["build ms"] < host["host ms"]


def test_an_arm_with_fewer_tokens_is_refused(bench):
    peer_arm = bench("peer_arm")
    job = peer_arm.Job("", "", [[1, 2]], 3, 0, 0, 1, True, False)
    with pytest.raises(SystemExit, match="2 tokens came, 3 were asked for"):
        peer_arm.play_all(lambda ids, clock: peer_arm.Reply([4, 5], 1, 0), job)
