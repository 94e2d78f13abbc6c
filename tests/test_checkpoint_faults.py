"""Every way in which model files are known to break ends in one clear line, not in a traceback."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_mtp.checkpoint import read_drafter, read_target
from mlx_mtp.errors import MtpError, PairError
from tiny_checkpoints import (
    VOCAB,
    drafter_config,
    edit_json,
    edit_tensors,
    random_tensors,
    refusal,
    write_drafter,
    write_target,
)

INDEX = "model.safetensors.index.json"
LAYER = "model.language_model.layers."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_target(tmp_path, "31b")


@pytest.fixture
def file(folder: Path) -> Path:
    return folder / "model.safetensors"


def test_path_that_is_no_folder(tmp_path: Path) -> None:
    assert "is not a folder; give the folder that holds config.json" in refusal(tmp_path / "absent")


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'"gemma4"', b"\xff\xfe", b"[" * 100_000])
def test_config_missing_or_not_an_object(folder: Path, content: bytes | None) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    message = refusal(folder)
    assert "config.json" in message and message.endswith(("download the model again", "download it again"))


def test_unknown_model_type_lists_the_known(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="llama")
    assert "model_type must be one of gemma4, gemma4_unified, gemma4_text" in refusal(folder)


@pytest.mark.parametrize("content", [b"[]", b"{"])
def test_generation_config_that_is_no_object(folder: Path, content: bytes) -> None:
    (folder / "generation_config.json").write_bytes(content)
    assert "generation_config.json" in refusal(folder)


def test_no_weights(folder: Path, file: Path) -> None:
    file.unlink()
    assert "has no .safetensors files; download the model again" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.npz", "gemma-4.gguf"])
def test_weights_in_a_format_that_may_run_code(folder: Path, file: Path, name: str) -> None:
    file.rename(folder / name)
    assert f"weights must be .safetensors, got only {name}" in refusal(folder)


def test_empty_file(folder: Path, file: Path) -> None:
    file.write_bytes(b"")
    assert "is empty; download it again" in refusal(folder)


@pytest.mark.parametrize("keep", [1, 7, 8, 9, 100, 0.5, -1])
def test_file_cut_short(folder: Path, file: Path, keep: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * keep)] if isinstance(keep, float) else whole[:keep])
    assert refusal(folder).endswith("download it again")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 200_000_000])
def test_header_longer_than_the_file(folder: Path, file: Path, length: int) -> None:
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    assert f"the header claims {length} bytes" in refusal(folder)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"<!DOCTYPE html><html>", "is a web page, not weights"),
        (b"\n<html lang=en>", "is a web page, not weights"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "is a Git LFS pointer, not the weights",
        ),
        (b"PK\x03\x04 a zip archive, as torch.save writes", "is not safetensors"),
    ],
)
def test_something_else_instead_of_weights(folder: Path, file: Path, start: bytes, words: str) -> None:
    file.write_bytes(start + b"x" * 200)
    assert words in refusal(folder)


def write_header(file: Path, header: dict[str, Any], size: int) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": {**F32, "shape": [-4]}},
        {"a": {**F32, "shape": [-2, -2]}},
        {"a": {**F32, "shape": [2**62, 2**62]}},
        {"a": {**F32, "shape": [2**64]}},
        {"a": {**F32, "data_offsets": [0, 2**63]}},
        {"a": {**F32, "data_offsets": [16, 0]}},
        {"a": {**F32, "data_offsets": [-16, 0]}},
        {"a": F32, "b": F32},
        {"a": F32, "b": {**F32, "data_offsets": [8, 24]}},
        {"a": F32, "b": {**F32, "data_offsets": [32, 48]}},
        {"a": {**F32, "dtype": "F99"}},
        {"a": {"dtype": "F32"}},
        {"a": []},
        {"a": {**F32, "shape": "four"}},
    ],
)
def test_impossible_headers(folder: Path, file: Path, header: dict[str, Any]) -> None:
    write_header(file, header, 48)
    assert "damaged" in refusal(folder)


def test_index_that_names_an_absent_shard(tmp_path: Path) -> None:
    folder = write_target(tmp_path, "31b", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "names 3 shards and 1 of them are missing (model-00002-of-00003" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/../../x", "..", "sub/x", "a\\..\\b"]
)
def test_index_that_leaves_the_folder(tmp_path: Path, name: str) -> None:
    folder = write_target(tmp_path, "31b", shards=2)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert "shards must lie beside the index, got" in refusal(folder)


@pytest.mark.parametrize(
    "content", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": "a.bin"}}]
)
def test_index_that_is_none(tmp_path: Path, content: Any) -> None:
    folder = write_target(tmp_path, "31b", shards=2)
    (folder / INDEX).write_text(json.dumps(content))
    assert INDEX in refusal(folder)


def test_shards_without_index_must_be_complete(tmp_path: Path) -> None:
    folder = write_target(tmp_path, "31b", shards=3)
    (folder / INDEX).unlink()
    (folder / "model-00003-of-00003.safetensors").unlink()
    assert "the shards do not form one set" in refusal(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = write_target(tmp_path, "31b", shards=2)
    name = "model.language_model.norm.weight"
    for shard in sorted(folder.glob("*.safetensors")):
        edit_tensors(shard, {name: mx.ones((64,))})
    assert f"every tensor must be in one file, got {name} in" in refusal(folder)


def test_a_tensor_under_two_names(folder: Path, file: Path) -> None:
    edit_tensors(file, {"model.norm.weight": mx.ones((64,))})
    assert "norm must be stored once, got" in refusal(folder)


def test_missing_tensors_are_counted_and_five_are_named(folder: Path, file: Path) -> None:
    absent = [
        f"{LAYER}{layer}.self_attn.{name}.weight" for layer in (0, 1, 2) for name in ("q_proj", "q_norm")
    ]
    edit_tensors(file, dict.fromkeys(absent))
    assert "6 of " in refusal(folder)
    assert refusal(folder).count("self_attn.q_") == 5


@pytest.mark.parametrize("shape", [(64, 63), (63, 64), (64,), (1, 64, 64), (4096,)])
def test_wrong_shapes_are_named_with_both_shapes(folder: Path, file: Path, shape: tuple[int, ...]) -> None:
    edit_tensors(file, {f"{LAYER}0.mlp.up_proj.weight": mx.zeros(shape)})
    assert f"layers.0.mlp.up_proj must have shape [64, 64] by config.json, got {list(shape)}" in refusal(
        folder
    )


def test_fused_experts_of_an_odd_or_other_size(tmp_path: Path) -> None:
    folder = write_target(tmp_path, "a4b")
    for rows, words in ((126, "experts.gate_proj must have shape [4, 64, 64]"), (127, "tensors are missing")):
        edit_tensors(
            folder / "model.safetensors", {f"{LAYER}0.experts.gate_up_proj": mx.zeros((4, rows, 64))}
        )
        assert words in refusal(folder)


@pytest.mark.parametrize("dtype", [mx.int8, mx.uint8, mx.int32, mx.int64, mx.complex64])
def test_weights_of_a_type_that_is_no_float(folder: Path, file: Path, dtype: mx.Dtype) -> None:
    edit_tensors(file, {f"{LAYER}0.mlp.up_proj.weight": mx.zeros((64, 64), dtype=dtype)})
    assert "layers.0.mlp.up_proj must be of type F32, F16, BF16, got" in refusal(folder)


def test_token_ordering_must_be_whole_numbers(tmp_path: Path) -> None:
    folder = write_drafter(tmp_path, "e2b")
    ordering = mx.arange(VOCAB).astype(mx.float32)
    edit_tensors(folder / "model.safetensors", {"masked_embedding.token_ordering": ordering})
    assert "token_ordering must be of type I64" in refusal(folder, read_drafter)


def twice(ids: list[int]) -> list[int]:
    return [ids[1], *ids[1:]]


def beyond(ids: list[int]) -> list[int]:
    return [VOCAB if token == 0 else token for token in ids]


def negative(ids: list[int]) -> list[int]:
    return [-1 if token == 0 else token for token in ids]


@pytest.mark.parametrize("spoil", [twice, beyond, negative])
def test_token_ordering_must_name_every_id_once(tmp_path: Path, spoil: Any) -> None:
    folder = write_drafter(tmp_path, "e2b")
    name = "masked_embedding.token_ordering"
    ids = random_tensors(drafter_config("e2b"), seed=11)[name].tolist()
    edit_tensors(folder / "model.safetensors", {name: mx.array(spoil(ids), dtype=mx.int64)})
    assert "must name each of the 256 token ids once" in refusal(folder, read_drafter)


def test_wrong_kinds_of_model_are_pair_errors(tmp_path: Path) -> None:
    target, drafter = write_target(tmp_path / "t", "12b"), write_drafter(tmp_path / "d", "12b")
    with pytest.raises(PairError, match="a drafter was expected, but this is a target"):
        read_drafter(target)
    with pytest.raises(PairError, match="a target was expected, but this is a drafter"):
        read_target(drafter)


def test_refusals_come_before_weights_are_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("weights were opened")

    monkeypatch.setattr(mx, "load", forbidden)
    with pytest.raises(AssertionError, match="weights were opened"):
        read_target(folder)
    edit_json(folder / "config.json", text_config__hidden_size=128)
    assert "must have shape [256, 128] by config.json, got [256, 64]" in refusal(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = write_target(tmp_path_factory.mktemp("fuzz"), "31b")
    return folder, (folder / "model.safetensors").read_bytes()


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(places=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=3), value=st.integers(0, 255))
def test_flipped_header_bytes_never_escape_our_errors(
    whole: tuple[Path, bytes], places: list[float], value: int
) -> None:
    folder, content = whole
    length = 8 + struct.unpack("<Q", content[:8])[0]
    spoiled = bytearray(content)
    for place in places:
        spoiled[int(place * length)] = value
    (folder / "model.safetensors").write_bytes(spoiled)
    try:
        tensors = read_target(folder).tensors
    except MtpError as error:
        assert "\n" not in str(error)
    else:  # a name or number changed that nobody reads: everything the model needs is still right
        assert tensors["embed_tokens"].shape == (VOCAB, 64)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_that_cannot_be_read(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        (folder / name).chmod(0)
    else:  # root reads everything: a directory in the file's place fails as surely
        (folder / name).unlink()
        (folder / name).mkdir()
    assert name in refusal(folder)
