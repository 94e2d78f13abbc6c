"""The protocol's measurements: each answers its question and sees what was planted."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

import mlx_mtp
import mlx_mtp.layers
import mlx_mtp.round
from goldens import golden
from mlx_mtp.errors import MemoryRefusal
from mlx_mtp.pair import Pair
from mlx_mtp.report import activations, costs, donation, experts, position
from mlx_mtp.report.acceptance import acceptance, other_targets, tally
from mlx_mtp.report.here import power
from mlx_mtp.report.protocol import NotHere
from mlx_mtp.report.setting import GREEDY, play
from mlx_mtp.weights import DenseWeight
from pairs import golden_pair, random_drafter
from report_settings import found_by, long, pair_of, setting_of
from tiny_checkpoints import write_drafter


def test_drafts_at_a_wrong_position_are_worse():
    """The override reaches the drafter: 16 positions off is clearly worse, none is the same, one changes its rows."""
    found = found_by(position.drafter_position, setting_of("31b", tokens=28))
    control = found["P against P-16"]
    assert control["better"] == "P" and control["difference"] > 2 * control["standard_error"] > 0
    assert found["P"]["places"] == found["P-1"]["places"] > 40
    pair = pair_of("31b")
    ids, reply = golden("31b", "long").prompt, golden("31b", "long").new_tokens
    kept: dict[str, list[int]] = {"P": [], "P-1": []}
    arms = {"P": pair.drafter, "P-1": position.shifted(pair.drafter, 0)}
    position.count_kept(pair, arms, ids, reply, kept, long())
    assert kept["P"] == kept["P-1"]
    assert position.paired(kept)["P against P-1"]["better"] == "undecided"
    here, before = (
        arm.ropes["sliding_attention"].at(9, 1) for arm in (pair.drafter, position.shifted(pair.drafter, -1))
    )
    assert not mx.array_equal(here.cosine, before.cosine)
    assert mx.array_equal(before.cosine, pair.drafter.ropes["sliding_attention"].at(8, 1).cosine)


def test_a_clear_difference_is_called_one():
    kept = {"P": [4, 3, 4, 2] * 20, "P-1": [3, 3, 2, 2] * 20, "P-16": [4, 3, 4, 3] * 20}
    found = position.paired(kept)
    assert found["P"] == {"places": 80, "kept_of_k": 3.25, "by_position": [1.0, 1.0, 0.75, 0.6667]}
    assert found["P against P-1"] == {"difference": 0.75, "standard_error": 0.09329, "better": "P"}
    assert found["P against P-16"]["better"] == "P-16"
    assert position.paired({"P": [4, 2] * 5, "P-1": [2, 4] * 5})["P against P-1"]["better"] == "undecided"


@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_drafts_counted_at_every_token_are_those_of_the_rounds(variant):
    pair = pair_of(variant)
    ids = golden(variant, "long").prompt
    reply = play(pair, ids, k=position.K, tokens=40, sampling=GREEDY)
    kept: dict[str, list[int]] = {"P": []}
    position.count_kept(pair, {"P": pair.drafter}, ids, reply.tokens, kept, long())
    at, rounds = 0, 0
    stream = mlx_mtp.stream_generate(pair, ids, max_tokens=40, sampling=GREEDY, num_draft_tokens=position.K)
    next(stream)  # the prefill's token
    for chunk in stream:
        if at >= len(kept["P"]):
            break
        assert len(chunk.tokens) - 1 == kept["P"][at], at
        at, rounds = at + len(chunk.tokens), rounds + 1
    assert rounds > 5 and len(kept["P"]) >= 35


def test_acceptance_by_drafter_bits():
    found = found_by(acceptance, setting_of("e2b"))
    assert found["target"] == 16
    rates = {bits: own["greedy"]["acceptance_rate"] for bits, own in found["drafters"].items()}
    assert rates["16-bit"] > 0.4
    wrong = found_by(
        acceptance, setting_of("e2b", golden_pair("e2b", drafter=random_drafter("e2b")), drafter_folder=None)
    )
    assert wrong["drafters"]["16-bit"]["greedy"]["acceptance_rate"] < 0.1


def test_a_drafter_is_measured_at_16_8_and_4_bits(tmp_path):
    """Its files are read again for each; widths of 64 can be quantised."""
    from mlx_mtp.checkpoint import read_drafter
    from mlx_mtp.drafter import make_drafter
    from mlx_mtp.report.acceptance import bits_of, drafters_of

    folder = write_drafter(tmp_path, "e2b")
    small = read_drafter(folder)
    own = make_drafter(small.config, small.tensors)
    made = dict(drafters_of(setting_of("e2b", drafter_folder=folder), own))
    assert {name: bits_of(drafter.pre_projection) for name, drafter in made.items()} == {
        "16-bit": 16,
        "8-bit": 8,
        "4-bit": 4,
    }


def test_other_precisions_are_measured_where_they_are_downloaded(monkeypatch, tmp_path):
    places = {
        "mlx-community/gemma-4-E2B-it-qat-8bit": tmp_path / "8",
        "mlx-community/gemma-4-E2B-it-bf16": tmp_path,
    }
    monkeypatch.setattr("mlx_mtp.cache.cached_snapshot", places.get)

    def load(name: str, **options: Any) -> Pair:
        if name == "e2b:8bit":
            return pair_of("e2b")
        raise MemoryRefusal(f"{name} needs more")

    monkeypatch.setattr(mlx_mtp, "load", load)
    found = found_by(other_targets, setting_of("e2b", size="e2b", tokens=8))
    assert found["e2b:bf16"] == {"refusal": "e2b:bf16 needs more"}
    assert found["e2b:8bit"]["drafters"]["16-bit"]["greedy"]["replies"] == 2
    assert "e2b:4bit" not in found
    with pytest.raises(NotHere, match="no other precision"):
        found_by(other_targets, setting_of("31b", size=None))


def test_the_rates_are_what_they_say():
    reply = play(pair_of("31b"), golden("31b", "short").prompt, k=4, tokens=40, sampling=GREEDY)
    found, stats = tally([reply, reply], 4), reply.stats
    assert found["acceptance_rate"] == pytest.approx(stats.draft_acceptance_rate, abs=1e-3)
    assert found["tokens_per_round"] == pytest.approx(stats.tokens_per_round, abs=1e-2)
    chain, kept = 1.0, 0.0
    for rate in found["by_position"]:
        chain *= rate or 0.0
        kept += chain
    full_rounds = stats.num_draft_tokens.count(4)
    assert kept * full_rounds == pytest.approx(stats.accepted, abs=0.1)


# Buffers, experts, number formats


def test_rounds_write_in_place():
    found = found_by(donation.donation, setting_of("31b", repeats=3))
    for arm in ("plain", "k=3"):
        assert found[arm]["in_place"] is True
        assert found[arm]["buffers_copied"] == [] and found[arm]["buffers"] == 24
        assert abs(found[arm]["peak_growth_in_buffers"]) < 0.5


def test_a_reference_kept_on_purpose_is_seen():
    """Whoever keeps the state of the last round makes every buffer move, those that feed the drafter too."""
    pair = pair_of("31b")
    ids, kept = golden("31b", "long").prompt, []

    def play_and_keep(state, **how):
        kept[:] = [state]
        return pair.rounds(state, **how)

    costs = [donation.cost_of_rounds(pair, ids, rows, 3, 3, play_and_keep) for rows in (512, 16_384)]
    found = donation.verdict(pair, *costs)
    assert found["in_place"] is False
    assert len(found["buffers_copied"]) == 24
    assert found["feed_buffers_copied"] == ["k10", "k11", "v10", "v11"]
    assert found["peak_growth_in_buffers"] > 0.9


def test_one_kept_buffer_is_named():
    pair = pair_of("31b")
    ids, kept = golden("31b", "long").prompt, []

    def play_and_keep(state, **how):
        kept[:] = [state.kv[11][1]]
        return pair.rounds(state, **how)

    costs = [donation.cost_of_rounds(pair, ids, rows, 0, 3, play_and_keep) for rows in (512, 16_384)]
    assert donation.verdict(pair, *costs)["buffers_copied"] == ["v11"]


def test_experts_are_those_that_the_router_chose(monkeypatch):
    pair, ids = pair_of("a4b"), golden("a4b", "long").prompt
    reply = golden("a4b", "long").new_tokens[:20]
    calls: list[list[list[int]]] = []
    sound = mlx_mtp.layers.route

    def route(*words):
        chosen, weights = sound(*words)
        calls.append(chosen.tolist())
        return chosen, weights

    monkeypatch.setattr(mlx_mtp.layers, "route", route)
    routes = experts.routes_of(pair.target, ids, reply, long().check)
    assert all(len(layer) == len(reply) for layer in routes)
    layers = pair.target.text.num_layers
    passes = [
        calls[i : i + layers] for i in range(len(calls) - 2 * layers, len(calls), layers)
    ]  # of 16 and 4 rows
    expected = [[set(row) for rows in passes for row in rows[layer]] for layer in range(layers)]
    assert routes == expected


def test_distinct_experts_are_counted_within_replies():
    same, other = {0, 1}, {2, 3}
    found = experts.summary(
        [[same, same, other, same], [same, other, same, other]], [2, 4], experts=8, top_k=2
    )
    assert found["by_rows"]["1"]["distinct"] == 2
    assert found["by_rows"]["2"]["distinct"] == 3.5  # (2 + 4) / 2 and (4 + 4) / 2, over the two layers
    assert found["by_rows"]["2"]["independent"] == 3.5  # 8 * (1 - (3/4)^2)
    assert "3" not in found["by_rows"]  # no reply has three rows
    assert found["rows_of_text"] == 4


def test_an_activation_too_large_for_float16_is_found_where_it_is():
    pair = pair_of("31b")
    sound = found_by(activations.activations, setting_of("31b"))
    assert sound["overflows_float16"] is False and len(sound["by_layer"]) == pair.target.text.num_layers
    layer = pair.target.layers[3]
    loud = replace(layer, down_proj=DenseWeight(layer.down_proj.weight * 1e7))
    layers = (*pair.target.layers[:3], loud, *pair.target.layers[4:])
    planted = replace(pair, target=replace(pair.target, layers=layers), drafter=None)
    planted = replace(planted, rounds=mlx_mtp.round.Rounds(planted.target, None, compiled=False))
    found = found_by(activations.activations, setting_of("31b", planted))
    assert found["overflows_float16"] is True
    assert [layer["mlp_out"] > activations.FP16_LARGEST for layer in found["by_layer"][:5]] == [
        False,
        False,
        False,
        True,
        False,
    ]
    formats = found_by(activations.formats, setting_of("31b", planted))
    assert (
        formats["float32"]["finite"] and formats["float32"]["same_best_token"] == formats["float32"]["rows"]
    )


def test_largest_activations_are_those_of_all_passes(monkeypatch):
    pair, ids = pair_of("31b"), golden("31b", "long").prompt
    reply = golden("31b", "long").new_tokens[:7]
    in_passes = activations.scan(pair.target, ids, reply, long())
    monkeypatch.setattr("mlx_mtp.report.observe.ROWS", 7)
    in_others = activations.scan(pair.target, ids, reply, long())
    for one, two in zip(in_passes, in_others, strict=True):
        assert set(one) == set(activations.PLACES)
        assert one == pytest.approx(two, rel=1e-4)


def test_formats_differ_by_rounding_and_share_packed_weights():
    found = found_by(activations.formats, setting_of("e2b"))
    assert found["as_loaded"] == "float32" and found["float32"]["largest_logit_difference"] == 0
    assert 0 < found["float16"]["mean_logit_difference"] < found["bfloat16"]["mean_logit_difference"]
    target = pair_of("e2b").target
    half = activations.in_dtype(target, mx.float16)
    assert half.dtype == mx.float16 == half.layers[0].q_proj.dtype
    assert half.ropes["full_attention"].frequencies.dtype == mx.float32
    broken = activations.against(mx.zeros((2, 3)), mx.array([[1.0, mx.inf, 0], [0, 0, 0]]))
    assert broken["finite"] is False and broken["same_best_token"] is None


def test_gains_are_medians_over_plain():
    rates = {"code": {"0": [10.0, 20.0, 30.0], "2": [40.0, 30.0, 20.0]}, "json": {"2": [1.0]}}
    assert costs.gains(rates) == {"code": {"0": 1.0, "2": 1.5}}


def test_power_is_read_from_what_pmset_prints():
    batteries = "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1)\t80%; discharging"
    assert power(batteries, "Currently in use:\n lowpowermode         1\n") == {
        "on_mains": False,
        "low_power_mode": True,
    }
    assert power("Now drawing from 'AC Power'\n", " lowpowermode 0") == {
        "on_mains": True,
        "low_power_mode": False,
    }
    assert power("", "") == {"on_mains": None, "low_power_mode": None}
