"""Published files against what is expected of them: every planted difference is named."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from hub_stand_in import HubStandIn
from mlx_mtp.config_parse import parse_drafter_config, parse_target_config
from mlx_mtp.published_configs import SIZES, published_drafter, published_target
from mlx_mtp.report import published
from report_settings import long
from tiny_checkpoints import drafter_config, edit_json, edit_tensors, write_drafter, write_target


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
        published.compare_models(models, published.describer(offline=False), found, long())
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
