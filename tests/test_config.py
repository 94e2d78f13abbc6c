"""config.json: every published shape and both forms, and a refusal for whatever is not one of them."""

import math
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mtp.config import FULL, SLIDING, TargetConfig
from mlx_mtp.config_parse import parse_drafter_config, parse_target_config
from mlx_mtp.errors import CheckpointError, MtpError, PairError
from mlx_mtp.published_configs import SIZES, published_drafter, published_target
from mlx_mtp.tensor_names import expected_tensors, parameter_count
from tiny_checkpoints import KINDS, VOCAB, drafter_config, target_config


def target_of(size: str) -> TargetConfig:
    return parse_target_config(published_target(size), size)


# Google's model cards: "2.3B effective (5.1B with embeddings)", "4.5B effective (8B with embeddings)",
# 11.95B, "25.2B total, 3.8B active", 30.7B. The E models' totals include encoders of about 150 M (vision) and
# 300 M (audio), and the 12B's its embedders of images and sound: none of them is part of the text model.
PUBLISHED_BILLIONS = {"e2b": 5.1 - 0.45, "e4b": 8.0 - 0.45, "12b": 11.95, "26b-a4b": 25.2, "31b": 30.7}
# Parameters of the 12B and 31B assistants as other runtimes report them; none is published for the rest.
DRAFTER_MILLIONS = {"12b": 423, "31b": 470}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_the_published_ones(size: str) -> None:
    count = parameter_count(target_of(size)) / 1e9
    assert count == pytest.approx(PUBLISHED_BILLIONS[size], rel=0.015)


@pytest.mark.parametrize("size", DRAFTER_MILLIONS)
def test_drafter_parameter_counts_are_the_published_ones(size: str) -> None:
    count = parameter_count(parse_drafter_config(published_drafter(size), size)) / 1e6
    assert round(count) == DRAFTER_MILLIONS[size]


def test_active_parameters_of_the_experts_model() -> None:
    config = target_of("26b-a4b")
    experts = sum(math.prod(shape) for name, shape in expected_tensors(config).items() if ".experts." in name)
    idle = experts * (config.text.num_experts - config.text.num_experts_per_token) / config.text.num_experts
    assert (parameter_count(config) - idle) / 1e9 == pytest.approx(3.8, abs=0.05)


@pytest.mark.parametrize(("size", "effective"), [("e2b", 2.3), ("e4b", 4.5)])
def test_effective_parameters_leave_out_the_embedding_tables(size: str, effective: float) -> None:
    shapes = expected_tensors(target_of(size))
    tables = math.prod(shapes["embed_tokens"]) + math.prod(shapes["embed_tokens_per_layer"])
    encoders = 0.45e9  # vision and audio, which the cards count as effective
    assert (parameter_count(target_of(size)) - tables + encoders) / 1e9 == pytest.approx(effective, abs=0.1)


@pytest.mark.parametrize(
    ("size", "feeding", "first_shared"),
    [("e2b", (13, 14), 15), ("e4b", (22, 23), 24), ("12b", (46, 47), 48), ("26b-a4b", (28, 29), 30)],
)
def test_layers_that_feed_the_drafter(size: str, feeding: tuple[int, int], first_shared: int) -> None:
    text = target_of(size).text
    assert (text.feeding_layers[SLIDING], text.feeding_layers[FULL]) == feeding
    assert text.first_shared_layer == first_shared


@pytest.mark.parametrize("kind", KINDS)
def test_flat_and_nested_files_give_the_same_text_model(kind: str) -> None:
    nested = parse_target_config(target_config(kind), kind)
    flat = parse_target_config(target_config(kind, nested=False), kind)
    assert nested.text == flat.text
    assert (nested.multimodal, flat.multimodal) == (True, False)
    assert nested.eos_token_ids == (1, 106)
    assert flat.eos_token_ids == (1,)


def resaved(text: dict[str, Any]) -> dict[str, Any]:
    """The same text_config as transformers 5.23 re-saves it: overrides by layer, no global fields."""
    overrides = {"head_dim": text["global_head_dim"]}
    if text["attention_k_eq_v"]:
        overrides["num_key_value_heads"] = text["num_global_key_value_heads"]
    layers = [i for i, layer in enumerate(text["layer_types"]) if layer == FULL]
    slim = {k: v for k, v in text.items() if k not in ("global_head_dim", "num_global_key_value_heads")}
    return {**slim, "per_layer_config": {f"{i:02}": overrides for i in layers}}


@pytest.mark.parametrize("size", SIZES)
def test_a_resaved_config_means_the_same(size: str) -> None:
    target, drafter = published_target(size), published_drafter(size)
    target["text_config"].setdefault("num_global_key_value_heads", None)
    drafter["text_config"].setdefault("num_global_key_value_heads", None)
    for raw, parse in ((target, parse_target_config), (drafter, parse_drafter_config)):
        again = {**raw, "text_config": resaved(raw["text_config"])}
        assert parse(again, size) == parse(raw, size)


def test_global_heads_count_only_where_keys_serve_as_values() -> None:
    raw = target_config("e2b")
    raw["text_config"]["num_global_key_value_heads"] = 4
    assert parse_target_config(raw, "e2b").text.num_global_kv_heads == 2


def test_resaved_layers_of_one_type_must_agree() -> None:
    raw = target_config("e2b")
    raw["text_config"]["per_layer_config"] = {"1": {"head_dim": 32}, "3": {"head_dim": 64}}
    with pytest.raises(CheckpointError, match="every full_attention layer must be overridden alike"):
        parse_target_config(raw, "e2b")


def test_vocabulary_may_stand_at_the_top_and_must_not_differ() -> None:
    raw = target_config("31b")
    del raw["text_config"]["vocab_size"]
    assert parse_target_config(raw, "31b").text.vocab_size == VOCAB
    raw["text_config"]["vocab_size"] = VOCAB + 1
    with pytest.raises(CheckpointError, match="vocab_size must be the same as text_config's 257, got 256"):
        parse_target_config(raw, "31b")


BAD_FIELDS = [
    ("hidden_size", None),
    ("hidden_size", 0),
    ("hidden_size", -64),
    ("hidden_size", 2**31),
    ("hidden_size", "64"),
    ("hidden_size", 64.0),
    ("hidden_size", True),
    ("intermediate_size", []),
    ("num_attention_heads", 3),
    ("num_key_value_heads", 3),
    ("head_dim", 15),
    ("global_head_dim", -1),
    ("num_hidden_layers", 4),
    ("layer_types", ["chunked_attention"] * 3),
    ("layer_types", "full_attention"),
    ("layer_types", [FULL, FULL, SLIDING]),
    ("sliding_window", 0),
    ("num_kv_shared_layers", 4),
    ("num_kv_shared_layers", 3),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", float("inf")),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", "1e-6"),
    ("final_logit_softcapping", -30.0),
    ("max_position_embeddings", 1.5),
    ("eos_token_id", VOCAB),
    ("eos_token_id", [1, -1]),
    ("eos_token_id", "1"),
    ("attention_k_eq_v", 1),
    ("enable_moe_block", True),
    ("attention_bias", True),
    ("hidden_activation", "silu"),
    ("tie_word_embeddings", False),
    ("use_bidirectional_attention", "all"),
    ("rope_parameters", []),
    ("rope_parameters", {FULL: {"rope_type": "yarn"}}),
    ("rope_parameters", {FULL: {"partial_rotary_factor": 1.5}}),
    ("rope_parameters", {SLIDING: {"rope_theta": 0}}),
    ("per_layer_config", {"3": {"head_dim": 32}}),
    ("per_layer_config", {"x": {"head_dim": 32}}),
    ("per_layer_config", {"2": {"hidden_size": 32}}),
]
# Where the message names another field than the one that was changed.
NAMED_INSTEAD = {"num_key_value_heads": "num_attention_heads", "enable_moe_block": "num_experts"}


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_a_wrong_field_is_refused_by_name_on_one_line(name: str, value: object) -> None:
    raw = target_config("31b")
    raw["text_config"][name] = value
    with pytest.raises(CheckpointError) as refusal:
        parse_target_config(raw, "here/config.json")
    message = str(refusal.value)
    expected = "layer_types" if name == "num_hidden_layers" else NAMED_INSTEAD.get(name, name)
    assert message.startswith("here/config.json")
    assert expected in message
    assert "must" in message and "; " in message and "\n" not in message


@pytest.mark.parametrize("name", ["auto_map", "model_file"])
@pytest.mark.parametrize("parse", [parse_target_config, parse_drafter_config])
def test_code_in_a_model_folder_is_refused(name: str, parse: Any) -> None:
    raw = target_config("31b") if parse is parse_target_config else drafter_config("31b")
    with pytest.raises(CheckpointError, match=f"bring their own code are refused, got {name}"):
        parse({**raw, name: {"AutoModel": "evil.Model"}}, "here")


@pytest.mark.parametrize(
    "raw", [[], None, "gemma4", 4, {}, {"model_type": "llama"}, {"model_type": ["gemma4"]}]
)
def test_other_content_is_refused(raw: Any) -> None:
    for parse in (parse_target_config, parse_drafter_config):
        with pytest.raises(
            CheckpointError, match=r"must hold a JSON object|model_type must be one of gemma4"
        ):
            parse(raw, "here")


def test_target_and_drafter_are_not_confused() -> None:
    with pytest.raises(PairError, match="a target was expected, but this is a drafter"):
        parse_target_config(drafter_config("31b"), "here")
    for nested in (True, False):
        with pytest.raises(PairError, match="a drafter was expected, but this is a target"):
            parse_drafter_config(target_config("12b", nested=nested), "here")


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n"])
def test_a_plain_gemma_as_drafter_is_explained(kind: str) -> None:
    with pytest.raises(PairError, match="reads the target's K/V, but this is an ordinary model"):
        parse_drafter_config({**target_config("31b", nested=False), "model_type": kind}, "here")


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("num_kv_shared_layers", 2, "num_kv_shared_layers must be all 4 layers in a drafter"),
        ("hidden_size_per_layer_input", 8, "hidden_size_per_layer_input must be 0 in a drafter"),
        ("enable_moe_block", True, "enable_moe_block must be false in a drafter"),
        ("use_double_wide_mlp", True, "use_double_wide_mlp must be false in a drafter"),
    ],
)
def test_a_drafter_with_a_targets_parts_is_refused(name: str, value: object, rule: str) -> None:
    raw = drafter_config("31b")
    raw["text_config"][name] = value
    with pytest.raises(CheckpointError, match=rule):
        parse_drafter_config(raw, "here")


def test_no_shared_layers_means_all_in_a_drafter() -> None:
    raw = drafter_config("31b")
    raw["text_config"]["num_kv_shared_layers"] = 0
    assert parse_drafter_config(raw, "here").text.first_shared_layer == 0


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"num_centroids": 48}, "num_centroids must be a divisor of the vocabulary's 256 tokens, got 48"),
        ({"num_centroids": 0}, "num_centroids must be a whole number from 1"),
        (
            {"centroid_intermediate_top_k": 33},
            "centroid_intermediate_top_k must be a whole number from 1 to 32",
        ),
        ({"use_ordered_embeddings": "yes"}, "use_ordered_embeddings must be true or false"),
        ({"backbone_hidden_size": None}, "backbone_hidden_size must be a whole number"),
    ],
)
def test_inconsistent_centroids_are_refused(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(CheckpointError, match=rule):
        parse_drafter_config({**drafter_config("e2b"), **changes}, "here")


def test_unused_centroids_are_not_judged() -> None:
    raw = {**drafter_config("31b", num_centroids=0), "num_centroids": 48}
    assert parse_drafter_config(raw, "here").num_centroids == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(kind=st.sampled_from(KINDS), is_drafter=st.booleans(), data=st.data(), value=JSON)
def test_any_json_in_any_field_gives_a_config_or_our_own_error(
    kind: str, is_drafter: bool, data: st.DataObject, value: Any
) -> None:
    raw = deepcopy(drafter_config(kind) if is_drafter else target_config(kind))
    place = data.draw(st.sampled_from([raw, raw["text_config"], raw["text_config"]["rope_parameters"]]))
    place[data.draw(st.sampled_from([*sorted(place), "per_layer_config", "num_experts"]))] = value
    try:
        (parse_drafter_config if is_drafter else parse_target_config)(raw, "here")
    except MtpError as error:
        assert "\n" not in str(error)
