"""Enlarged pairs write the demo pair's texts, and what bench/auto_gain.py makes of samples."""

import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_mtp import Sampling, generate, load
from mlx_mtp.pair import Pair

ROOT = Path(__file__).parent.parent
GREEDY = Sampling(temperature=0.0)


def outcomes(pair: Pair, prompts: list[list[int]], k: int) -> list[tuple[list[int], list[int]]]:
    """Tokens, and drafts accepted by position."""
    outs = [generate(pair, ids, max_tokens=20, sampling=GREEDY, num_draft_tokens=k) for ids in prompts]
    return [(out.tokens, out.stats.accepted_by_position) for out in outs]


@pytest.mark.parametrize("experts", [0, 8])
def test_an_enlarged_pair_writes_the_same_and_its_drafts_are_as_right(bench, tmp_path, experts):
    enlarge, models = bench("enlarge"), bench("demo_models")
    size = enlarge.Size(1024, experts, 64, 2) if experts else enlarge.Size(1024)
    target = enlarge.enlarge(tmp_path, size)
    demo, large = models.load_ours("demo"), models.load_ours(str(target))
    prompts = [*models.held_out_code("demo", 1), *models.held_out_chat(demo, "demo", 1)]
    assert outcomes(large, prompts, 3) == outcomes(demo, prompts, 3)
    assert models.held_out_code(str(target), 2) == models.held_out_code("demo", 2)
    layer = large.target.layers[7]
    assert layer.gate_proj.weight.shape == (2048, 256) and (layer.experts is not None) == bool(experts)


def test_weights_that_contribute_are_seen(bench, tmp_path, monkeypatch):
    """The test above is not blind."""
    enlarge, models = bench("enlarge"), bench("demo_models")
    pad = mx.pad
    monkeypatch.setattr(mx, "pad", lambda x, widths: pad(x, widths, constant_values=mx.array(5.0)))
    target = enlarge.enlarge(tmp_path, enlarge.Size(1024))
    monkeypatch.undo()
    monkeypatch.syspath_prepend(ROOT / "bench")
    prompts = models.held_out_code("demo", 1)
    assert outcomes(load(target, dtype=mx.float32), prompts, 0) != outcomes(
        load("demo", dtype=mx.float32), prompts, 0
    )


def test_widths_for_a_size(bench):
    enlarge = bench("enlarge")
    config = json.loads((enlarge.SOURCE / "target" / "config.json").read_text())
    dense = enlarge.size_for(config, 0.8)
    assert 4 * 3 * 256 * 15 * dense.mlp == pytest.approx(0.8e9, rel=0.01) and not dense.experts
    moe = enlarge.size_for(config, 0.8, 32)
    experts = 4 * 3 * 256 * 10 * 32 * moe.expert
    assert experts + 4 * 3 * 256 * 15 * moe.mlp == pytest.approx(0.8e9, rel=0.05)
    assert experts == pytest.approx(0.53e9, rel=0.1) and moe.top_k == 4


def sample(turn: str, text: str, arm: str, seconds: float) -> dict:
    clocks = {"seconds": seconds, "processor": 2 * seconds}
    return {"turn": turn, "text": text, "arm": arm, "tokens": 11, "rounds": 5, **clocks}


def samples_of(later: float, slower: float = 0.0, passes: int = 5) -> list[dict]:
    """Two texts: best are k=2 with 2 s for code, plain with 3 s for prose; auto slower each pass."""
    seconds = {
        ("code", "plain"): 4.0,
        ("code", "k=2"): 2.0,
        ("prose", "plain"): 3.0,
        ("prose", "k=2"): 3.5,
    }
    seconds |= {(text, arm): later for text in ("code", "prose") for arm in ("auto, later", "auto, first")}
    return [
        sample(str(turn), text, arm, own + turn * slower * arm.startswith("auto"))
        for turn in range(passes)
        for (text, arm), own in seconds.items()
    ]


def test_auto_is_compared_with_each_texts_best(bench):
    found = bench("auto_gain_summary")
    samples = samples_of(2.5)
    assert found.best_fixed(samples) == {"code": "k=2", "prose": "plain"}
    assert found.milliseconds(samples)["code"]["plain"] == 400
    assert found.milliseconds(found.in_processor_time(samples))["code"]["plain"] == 800
    speed = found.speed(samples, "auto, later")
    own = speed["best for each text"]
    assert own["speed"] == pytest.approx(1.0) and own["by text"] == {"code": 0.8, "prose": 1.2}
    assert speed["plain"]["speed"] == pytest.approx(1.4) and speed["passes"] == 5
    assert own["lower"] == own["upper"] == 1.0, "texts that differ are no noise"
    assert speed["best for all texts together"]["speed"] == pytest.approx(1.1)
    noisy = found.speed(samples_of(2.0, slower=0.25), "auto, later")["best for each text"]
    assert noisy["speed"] == pytest.approx(1.0) and 5 / 6 <= noisy["lower"] < 0.96 < 1.04 < noisy["upper"]
    few = found.speed(samples_of(2.5, passes=3), "auto, later")["best for each text"]
    assert few["lower"] is None and "too few passes" in found.in_words(few)
    assert found.speed(samples_of(2.5, passes=1), "auto, later")["passes"] == 1


def test_the_best_of_many_by_luck_is_not_held_against_auto(bench):
    """Arms that are all alike but for noise, auto among them: in hindsight auto seems to lose, honestly it does not."""
    found, rng = bench("auto_gain_summary"), random.Random(1)
    arms = ["plain", *(f"k={k}" for k in range(1, 7)), "auto, later"]
    samples = [sample(str(n), "code", arm, rng.uniform(0.7, 1.3)) for n in range(200) for arm in arms]
    few = [found.speed(samples[at : at + 32], "auto, later") for at in range(0, len(samples), 32)]
    hindsight, honest = (
        statistics.mean(one[way]["speed"] for one in few)
        for way in ("best for each text, in hindsight", "best for each text")
    )
    assert hindsight < 0.95 and 0.97 < honest < 1.05


def test_a_first_text_is_compared_with_plain_decodings_first(bench):
    found = bench("auto_gain_summary")
    samples = samples_of(2.5) + [
        sample(str(n), t, "plain, first", 5.0) for n in range(5) for t in ("code", "prose")
    ]
    assert found.speed(samples, "auto, first")["plain"]["speed"] == pytest.approx(2.0)
    assert found.best_fixed(samples) == {"code": "k=2", "prose": "plain"}


def test_the_replay_follows_the_curve(bench):
    """Where drafts cost nothing and are right, and where each costs a round and none is."""
    found = bench("auto_gain_summary")
    free = found.replayed([[0.1 + 0.001 * k for k in range(9)]], {"t": [8] * 300})
    assert free["auto, later"] > 0.9 and free["rounds of 0, 1, .. drafts take plain ones"][8] == 1.08
    linear = found.replayed([[0.1 * (k + 1) for k in range(9)]], {"t": [0] * 300})
    assert 0.95 < linear["auto, first"] <= 1.0
    assert (
        found.replayed([[0.3] * 9, [0.1] * 9, [0.2] * 9], {"t": [0] * 9})[
            "rounds of 0, 1, .. drafts take plain ones"
        ]
        == [1.0] * 9
    )


def test_arms_play_the_same_text(bench):
    """Without a drafter's help, with it, and with auto from nothing; each on its own times."""
    gain, models = bench("auto_gain"), bench("demo_models")
    arms = gain.Arms(models.load_ours("demo"), 6, with_first=True)
    assert arms.names()[0] == "plain" and arms.names()[-3:] == ["auto, later", "auto, first", "plain, first"]
    (ids,) = models.held_out_code("demo", 1)
    played = [arms.play(arm, "code", ids, "1") for arm in ("plain", "k=2", "auto, first", "auto, later")]
    played.append(arms.play("plain, first", "code", ids, "1"))
    assert played[-1].rounds == 5 and played[-1].reason is None
    assert {one.tokens for one in played} == {6} and min(one.seconds for one in played) > 0
    assert played[0].rounds == 5 and played[1].rounds < 5 and played[0].reason is None
    assert arms.later[0].widths == (1,) and arms.pair.rounds.times is arms.later[0]
    arms.written["code"] = [1, 2]
    with pytest.raises(SystemExit, match="nothing is reported"):
        arms.play("plain", "code", ids, "2")


def test_every_arm_comes_first_and_last_in_some_pass(bench):
    gain, names = bench("auto_gain"), [*"abcdefghij"]
    passes = [gain.in_turn(names, number) for number in range(10)]
    assert passes[0] == names and all(sorted(one) == names for one in passes)
    assert {one[0] for one in passes} == set(names) == {one[-1] for one in passes}


def test_samples_of_another_size_are_not_mixed(bench):
    gain = bench("auto_gain")
    kept: dict = {}
    run = {"began": "now", "commit": "c", "four rows cost one row times": 4.0, "curve": [0.1]}
    for width, wanted in ((64, 1), (64, 2), (128, 1)):
        gain.add(kept, "stock-dense", {**run, "size": {"mlp": width}, "samples": [{"a": 1}]})
        assert len(kept["stock-dense"]["samples"]) == wanted == len(kept["stock-dense"]["runs"])


@pytest.mark.slow
def test_a_short_measurement(tmp_path):
    command = [sys.executable, "bench/auto_gain.py", "stock-moe", "--passes", "1", "--tokens", "8"]
    target = tmp_path / "gain.json"
    subprocess.run([*command, "--gigabytes", "0.02", "--json", target], cwd=ROOT, check=True, timeout=600)
    kept = json.loads(target.read_text())["results"]
    assert kept["summary"]["stock-moe"]["passes"] == 1
    assert len(kept["variants"]["stock-moe"]["samples"]) == 3 * 12
