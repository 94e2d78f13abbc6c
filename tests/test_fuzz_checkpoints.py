"""Whatever stands in a model's files, loading ends in a pair or in one of our errors: soon, and in little memory.

The short runs always try the same examples; `slow` ones try many more.
"""

import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cli_runs import write_chat_pair
from hostile_files import (
    Trial,
    as_bytes,
    changed,
    spoil_bytes,
    spoil_drafter_config,
    spoil_generation_config,
    spoil_header,
    spoil_index,
    spoil_quantization,
    spoil_target_config,
    spoil_tokenizer,
    spoil_tokenizer_config,
)
from tiny_checkpoints import mlx_names, random_tensors, write_checkpoint

SHORT, LONG = 50, 2000

short = settings(
    max_examples=SHORT,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
long = settings(short, max_examples=LONG)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    folder = tmp_path_factory.mktemp("pair")
    write_chat_pair(folder)
    return Trial(folder)


@pytest.fixture(scope="module")
def quantized_trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """The same with a 4-bit target in two shards, so that there are an index and quantisation entries."""
    folder = tmp_path_factory.mktemp("quantized")
    target = write_chat_pair(folder)
    config = json.loads((target / "config.json").read_text())
    (target / "model.safetensors").unlink()
    entry = {"bits": 4, "group_size": 64, "mode": "affine"}
    config["quantization"] = {**entry, "language_model.model.embed_tokens": dict(entry)}
    tensors = mlx_names(random_tensors(config), "language_model.model.", {"bits": 4, "group_size": 64})
    write_checkpoint(target, config, tensors, shards=2)
    return Trial(folder)


DENSE = (
    spoil_target_config,
    spoil_drafter_config,
    spoil_generation_config,
    spoil_tokenizer_config,
    spoil_tokenizer,
    spoil_bytes,
    spoil_header,
)
QUANTIZED = (spoil_index, spoil_quantization, spoil_target_config)


@pytest.mark.parametrize("spoil", DENSE)
@short
@given(data=st.data())
def test_dense(trial: Trial, spoil: Callable[[Trial, st.DataObject], None], data: st.DataObject) -> None:
    spoil(trial, data)


@pytest.mark.parametrize("spoil", QUANTIZED)
@short
@given(data=st.data())
def test_quantized(
    quantized_trial: Trial, spoil: Callable[[Trial, st.DataObject], None], data: st.DataObject
) -> None:
    spoil(quantized_trial, data)


# What long runs found, and what they would: (file, where in it, the value there, part of the refusal or None).
FOUND: list[tuple[str, tuple[Any, ...], Any, str | None]] = [
    ("tokenizer_config.json", ("bos_token",), "\ud800", None),
    ("tokenizer.json", ("version",), "\x1b[2J", "is damaged: "),
    ("generation_config.json", ("top_p",), 10**400, "generation_config.json: top_p must be"),
    ("generation_config.json", ("temperature",), "a" * 5000, "generation_config.json: temperature must be"),
    ("model.safetensors.index.json", ("weight_map", "x"), "a\0b.safetensors", "must lie beside the index"),
    (
        "model.safetensors.index.json",
        ("weight_map", "x"),
        "a" * 5000 + ".safetensors",
        "must lie beside the index",
    ),
    ("model.safetensors.index.json", ("weight_map", "x"), "\ud800.safetensors", "must lie beside the index"),
    ("config.json", ("quantization", "a\nb"), {"bits": 7}, "MLX has no affine format"),
    ("config.json", ("text_config", "sliding_window"), 2**31 - 1, "sliding_window must be"),
    ("config.json", ("text_config", "max_position_embeddings"), 2**31 - 1, "max_position_embeddings must be"),
    ("config.json", ("text_config", "head_dim"), 2**31 - 2, "head_dim must be"),
    ("config.json", ("text_config", "global_head_dim"), 2**31 - 2, "global_head_dim must be"),
    ("config.json", ("text_config", "vocab_size"), 10**12, "vocab_size must be"),
    ("config.json", ("text_config", "num_hidden_layers"), 10**9, "num_hidden_layers must be"),
]


@pytest.mark.parametrize(("name", "path", "value", "said"), FOUND)
def test_what_was_found_stays_refused(
    quantized_trial: Trial, name: str, path: tuple[Any, ...], value: Any, said: str | None
) -> None:
    tree = changed(quantized_trial.json(quantized_trial.target / name), path, value, "replace")
    if path[-1] == "head_dim":  # with no sliding layer, no weight says how large its heads are
        layers = tree["text_config"]["layer_types"]
        tree["text_config"]["layer_types"] = ["full_attention"] * len(layers)
    message = quantized_trial.run(is_alone=True, **{f"target__{name.replace('.', '_')}": as_bytes(tree)})
    assert said is None or (message is not None and said in message)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (b'"norm":{"dtype":"F32","shape":[16],"data_offsets":[0,64]},' * 2, "a name stands twice"),
        (b'"a":{"dtype":"F32","shape":[%s16],"data_offsets":[0,64]}' % (b"1," * 10**5), "100001 axes"),
        (b'"a":{"dtype":"F32","shape":[-4,-4],"data_offsets":[0,64]}', "damaged"),
        (
            b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}',
            "damaged",
        ),
        (b'"a":' + b"[" * 10**5, "damaged"),
    ],
)
def test_headers_that_are_refused(trial: Trial, entries: bytes, said: str) -> None:
    text = b"{" + entries.rstrip(b",") + b"}"
    message = trial.run(target__model_safetensors=struct.pack("<Q", len(text)) + text + bytes(64))
    assert message is not None and said in message


def test_the_examples_are_neither_all_refused_nor_all_loaded(trial: Trial, quantized_trial: Trial) -> None:
    """After the runs above: examples that never reach a pair, or are never refused, would test little."""
    for one in (trial, quantized_trial):
        assert one.loaded > 5 and one.refused > 5


@pytest.mark.slow
@pytest.mark.parametrize("spoil", DENSE)
@long
@given(data=st.data())
def test_dense_at_length(
    trial: Trial, spoil: Callable[[Trial, st.DataObject], None], data: st.DataObject
) -> None:
    spoil(trial, data)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", QUANTIZED)
@long
@given(data=st.data())
def test_quantized_at_length(
    quantized_trial: Trial, spoil: Callable[[Trial, st.DataObject], None], data: st.DataObject
) -> None:
    spoil(quantized_trial, data)
