"""A drafter is accepted for the target it was made for, and for no other."""

import json
from pathlib import Path

import pytest

from mlx_mtp.checkpoint import read_drafter_config, read_target_config
from mlx_mtp.config import FULL
from mlx_mtp.config_parse import parse_drafter_config, parse_target_config
from mlx_mtp.errors import PairError
from mlx_mtp.pair_check import check_pair
from mlx_mtp.published_configs import SIZES, published_drafter, published_target
from tiny_checkpoints import drafter_config, target_config


@pytest.mark.parametrize("size", SIZES)
def test_published_pairs_belong_together_and_no_others_do(size: str) -> None:
    drafter = parse_drafter_config(published_drafter(size), size)
    for other in SIZES:
        if other == size:
            check_pair(parse_target_config(published_target(other), other), drafter)
        else:
            with pytest.raises(
                PairError, match="use the assistant published for this target, google/gemma-4-"
            ):
                check_pair(parse_target_config(published_target(other), other), drafter)


def test_a_pair_can_be_judged_without_any_weight_file(tmp_path: Path) -> None:
    for name, config in (("target", target_config("12b")), ("drafter", drafter_config("12b"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "target" / "generation_config.json").write_text('{"eos_token_id": 50}')
    target = read_target_config(tmp_path / "target")
    check_pair(target, read_drafter_config(tmp_path / "drafter"))
    assert target.eos_token_ids == (1, 106, 50)


PAIR_FAULTS = [
    ("backbone_hidden_size", 128, "hidden size .backbone_hidden_size. 128, the target has 64"),
    ("text_config__vocab_size", 512, "vocabulary 512, the target has 256"),
    ("text_config__head_dim", 32, "sliding_attention head size 32, the target has 16"),
    ("text_config__global_head_dim", 64, "full_attention head size 64, the target has 32"),
    ("text_config__num_key_value_heads", 4, "sliding_attention K/V heads 4, the target has 2"),
    ("text_config__num_global_key_value_heads", 2, "full_attention K/V heads 2, the target has 1"),
    ("text_config__sliding_window", 32, "sliding window 32, the target has 16"),
]


@pytest.mark.parametrize(("name", "value", "rule"), PAIR_FAULTS)
def test_each_mismatch_of_a_pair_is_named(name: str, value: int, rule: str) -> None:
    raw = drafter_config("31b")
    target = parse_target_config(target_config("31b"), "target")
    check_pair(target, parse_drafter_config(raw, "drafter"))
    section, _, field = name.rpartition("__")
    (raw[section] if section else raw)[field] = value
    with pytest.raises(PairError, match=rule):
        check_pair(target, parse_drafter_config(raw, "drafter"))


def test_a_drafter_layer_without_a_feeding_layer_is_refused() -> None:
    raw = target_config("31b")
    raw["text_config"]["layer_types"] = [FULL, FULL, FULL]
    drafter = parse_drafter_config(drafter_config("31b"), "drafter")
    with pytest.raises(PairError, match="reads K/V of a sliding_attention layer, and no such layer"):
        check_pair(parse_target_config(raw, "target"), drafter)
