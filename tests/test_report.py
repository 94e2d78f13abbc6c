"""The first-Mac protocol: each section answers its question, sees what was planted, and fails alone."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlx_mtp
import mlx_mtp.layers
import mlx_mtp.round
from goldens import golden
from hub_stand_in import HubStandIn
from mlx_mtp.config_parse import parse_drafter_config, parse_target_config
from mlx_mtp.errors import MemoryRefusal
from mlx_mtp.machine import this_machine
from mlx_mtp.pair import Pair
from mlx_mtp.published_configs import SIZES, published_drafter, published_target
from mlx_mtp.report import activations, donation, experts, position, published
from mlx_mtp.report.acceptance import acceptance, other_targets, tally
from mlx_mtp.report.here import power
from mlx_mtp.report.privacy import publishable
from mlx_mtp.report.protocol import Deadline, NotHere, OutOfTime, Section, run_protocol
from mlx_mtp.report.sections import SECTIONS
from mlx_mtp.report.setting import GREEDY, Setting, play
from mlx_mtp.weights import DenseWeight
from pairs import GOLDEN, golden_pair, random_drafter
from tiny_checkpoints import drafter_config, edit_json, edit_tensors, write_drafter, write_target

pair_of = functools.cache(golden_pair)
LONG = Deadline(600)


def setting_of(variant: str, pair: Pair | None = None, **changes: Any) -> Setting:
    """A golden pair on this machine with its two golden prompts, short replies and few repeats."""
    folder = GOLDEN / variant
    values: dict[str, Any] = {
        "name": variant,
        "machine": this_machine(),
        "pair": pair or pair_of(variant),
        "target_folder": folder / "target",
        "drafter_folder": folder / "drafter",
        "offline": True,
        "prompts": {name: golden(variant, name).prompt for name in ("short", "long")},
        "tokens": 24,
        "repeats": 2,
    }
    return Setting(**values | changes)


def found_by(section: Any, setting: Setting) -> dict[str, Any]:
    found: dict[str, Any] = {}
    section(setting, found, LONG)
    return found


# The protocol itself


def test_sections_fail_alone_and_keep_what_they_found():
    def good(setting, found, deadline):
        found["answer"] = 42

    def broken(setting, found, deadline):
        found["before"] = 1
        raise RuntimeError(f"in {Path.home()}/models/x")

    def slow(setting, found, deadline):
        found["begun"] = True
        while True:
            deadline.check()

    def elsewhere(setting, found, deadline):
        raise NotHere("only with experts")

    kept: list[dict[str, Any]] = []
    sections = [
        Section("broken", "?", 9, broken, needs_pair=False),
        Section("slow", "?", 0.05, slow, needs_pair=False),
        Section("elsewhere", "?", 9, elsewhere, needs_pair=False),
        Section("no_pair", "?", 9, good),
        Section("good", "?", 9, good, needs_pair=False),
    ]
    setting = Setting("e2b", this_machine(), no_pair_because="nothing is downloaded")
    document = run_protocol(
        setting, sections, keep=lambda document: kept.append(json.loads(json.dumps(document)))
    )
    entries = document["sections"]
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "broken": "error",
        "slow": "out of time",
        "elsewhere": "skipped",
        "no_pair": "skipped",
        "good": "ok",
    }
    assert entries["broken"]["found"] == {"before": 1}
    assert entries["broken"]["reason"] == "RuntimeError: in ~/models/x"
    assert entries["slow"]["found"] == {"begun": True} and entries["slow"]["seconds"] < 5
    assert "nothing is downloaded" in entries["no_pair"]["reason"]
    assert entries["good"]["found"] == {"answer": 42}
    assert [document["running"] for document in kept] == [section.name for section in sections] + [None]
    assert [document["complete"] for document in kept] == [False] * 5 + [True]


def test_all_sections_share_one_limit():
    clock = iter(range(0, 1000, 10))
    deadline = Deadline(25, clock=lambda: float(next(clock)))
    deadline.check()
    deadline.check()
    with pytest.raises(OutOfTime):
        deadline.check()
    ran = []
    section = Section("late", "?", 60, lambda *_: ran.append(1), needs_pair=False)
    document = run_protocol(Setting("e2b", this_machine()), [section], seconds=0.0)
    assert document["sections"]["late"]["status"] == "out of time" and not ran


def test_the_protocol_ends_within_fifteen_minutes():
    assert sum(section.seconds for section in SECTIONS) <= 14 * 60
    assert len({section.name for section in SECTIONS}) == len(SECTIONS)


def test_what_is_published_names_nobody():
    value = {
        "/Users/jane/x": ("/Users/jane/.cache/hub", Path("/home/jane"), "at /Volumes/jane/m, jane"),
        "n": float("nan"),
        "other": "/Users/joe/secret and /home/mary",
        "janet": "/Users/janet/x",
    }
    clean = publishable(value, home="/Users/jane")
    assert clean == {
        "~/x": ["~/.cache/hub", "~", "at /Volumes/USER/m, jane"],
        "n": "nan",
        "other": "~/secret and ~",
        "janet": "~/x",
    }
    json.dumps(clean, allow_nan=False)
    assert publishable(["/srv/people/jo/x:", "/srv/people/joe"], home="/srv/people/jo") == [
        "~/x:",
        "/srv/people/joe",
    ]


def test_a_whole_report_on_a_tiny_pair_with_experts():
    """Every section runs; those that cannot answer here say why."""
    setting = setting_of("a4b", tokens=7, repeats=1, prompts={"short": golden("a4b", "short").prompt})
    document = run_protocol(setting, SECTIONS)
    status = {name: (entry["status"], entry.get("reason")) for name, entry in document["sections"].items()}
    skipped = {name for name, (word, _) in status.items() if word == "skipped"}
    assert {name: found for name, found in status.items() if found[0] not in ("ok", "skipped")} == {}
    assert skipped <= {"published", "other_targets"}
    found = {name: entry["found"] for name, entry in document["sections"].items()}
    assert found["machine"]["versions"]["mlx"]
    assert found["exactness"]["replies_equal"] == 1
    assert found["memory"]["contexts"][0]["mlx_peak_bytes"] > 0
    assert set(found["cost_curve"]["short"]["pass_ms_by_rows"]) == {str(m) for m in range(1, 10)}
    assert set(found["speeds"]["gain"]["short"]) == {"0", "1", "2", "3", "4", "auto"}
    assert found["formats"]["float32"]["largest_logit_difference"] == 0
    text = json.dumps(document, allow_nan=False)
    assert str(Path.home()) + "/" not in text


# Published files


def differences_in(folder: Path, role: str = "target") -> dict[str, Any]:
    described = published.from_folder(folder)
    parse = parse_target_config if role == "target" else parse_drafter_config
    return published.compare_tensors(
        described.headers, parse(described.config, "config.json"), described.config
    )


@pytest.mark.parametrize("kind", ["e2b", "31b", "a4b", "12b"])
def test_sound_files_have_no_difference(tmp_path, kind):
    for role, folder in (
        ("target", write_target(tmp_path / "t", kind)),
        ("drafter", write_drafter(tmp_path / "d", kind)),
    ):
        found = differences_in(folder, role)
        assert (found["missing"], found["wrong"], found["not_used"]) == ([], [], [])
        assert found["tensors"] > 40 and found["formats"] == ["dense"]


def test_planted_differences_are_all_found(tmp_path):
    folder = write_target(tmp_path, "31b")
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    edit_tensors(
        folder / "model.safetensors",
        {
            name: None,
            name.replace("up_proj", "upp_proj"): mx.zeros((64, 64)),
            "model.language_model.layers.0.self_attn.q_norm.weight": mx.zeros((17,)),
            "model.language_model.layers.2.mlp.down_proj.weight": mx.zeros((64, 32)),
        },
    )
    found = differences_in(folder)
    assert found["missing"] == ["layers.1.mlp.up_proj"]
    assert found["not_used"] == ["layers.1.mlp.upp_proj"]
    assert found["wrong_count"] == 2
    assert "layers.0.self_attn.q_norm must have shape [16]" in " ".join(found["wrong"])


@pytest.mark.parametrize("size", SIZES)
def test_config_fields_that_differ_are_named(size):
    ours = parse_target_config(published_target(size), size)
    assert published.differences(ours, ours) == []
    raw = published_target(size)
    raw["text_config"] |= {"sliding_window": 2048}
    theirs = parse_target_config(raw, "config.json")
    assert published.differences(ours, theirs) == [
        {"field": "text.sliding_window", "ours": ours.text.sliding_window, "published": 2048}
    ]
    small = published_drafter(size)
    mine = parse_drafter_config(small, size)
    other = parse_drafter_config(
        small | {"centroid_intermediate_top_k": 16, "use_ordered_embeddings": True}, size
    )
    assert [entry["field"] for entry in published.differences(mine, other)] == (
        ["centroid_top_k"] if mine.num_centroids else ["num_centroids", "centroid_top_k"]
    )


def test_models_on_the_hub_are_compared_without_their_weights(tmp_path):
    """Over the loopback: config, index and the heads of the shards; a missing model is said and does not end it."""
    target = write_target(tmp_path / "t", "e2b", shards=3)
    other = write_drafter(tmp_path / "d", "e2b")
    (other / "config.json").write_text(json.dumps(drafter_config("31b")))
    models = {
        "org/target": ("e2b", "target"),
        "org/none": ("e2b", "target"),
        "org/drafter": ("e2b", "drafter"),
    }
    found: dict[str, Any] = {}
    with HubStandIn({"org/target": target, "org/drafter": other}) as hub, hub.in_process(tmp_path / "home"):
        published.compare_models(models, published.describer(offline=False), found, LONG)
        ranges = [request.range for request in hub.requests if "/cdn/" in request.path]
    assert found["not_seen"] == ["org/none"] and "RepositoryNotFound" in found["models"]["org/none"]["error"]
    entry = found["models"]["org/target"]
    assert (entry["missing"], entry["wrong"], entry["not_used"]) == ([], [], [])
    # It is tiny, which is what the comparison with the published E2B must say.
    assert "text.hidden_size" in [difference["field"] for difference in entry["config_differences"]]
    assert found["models"]["org/drafter"]["agrees"] is False
    assert ranges and all(asked and asked.startswith("bytes=") for asked in ranges)
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_cached_model_is_compared_offline(tmp_path):
    folder = write_target(tmp_path / "t", "e2b")
    edit_json(folder / "config.json", text_config__hidden_size="many")
    described = published.from_folder(folder)
    entry = published.compare(described, "e2b", "target")
    assert entry["agrees"] is False and "hidden_size" in entry["refusal"]


# Drafting position and acceptance


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
    position.count_kept(pair, arms, ids, reply, kept, LONG)
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
    position.count_kept(pair, {"P": pair.drafter}, ids, reply.tokens, kept, LONG)
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
    routes = experts.routes_of(pair.target, ids, reply, LONG)
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
    in_passes = activations.scan(pair.target, ids, reply, LONG)
    monkeypatch.setattr("mlx_mtp.report.observe.ROWS", 7)
    in_others = activations.scan(pair.target, ids, reply, LONG)
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
