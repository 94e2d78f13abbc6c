"""Weights that are stored but wrong: quantised parts that do not fit, untrue claims, NaN and Inf."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mtp import finite
from mlx_mtp.checkpoint import read_drafter, read_target
from mlx_mtp.errors import CheckpointError
from mlx_mtp.headers import read_header
from mlx_mtp.quantization import parse_quantization
from tiny_checkpoints import (
    VOCAB,
    edit_json,
    edit_tensors,
    mlx_names,
    published_names,
    random_tensors,
    refusal,
    target_config,
    write_checkpoint,
    write_drafter,
    write_target,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_target(tmp_path, "31b")


@pytest.fixture
def file(folder: Path) -> Path:
    return folder / "model.safetensors"


QUANTISED = "language_model.model.layers.0.mlp.up_proj"
FORM = {"bits": 4, "group_size": 32, "mode": "affine"}


def write_quantised(folder: Path, form: dict[str, Any] = FORM) -> Path:
    raw = target_config("31b")
    stored = mlx_names(random_tensors(raw), "language_model.model.", form)
    return write_checkpoint(folder, {**raw, "quantization": form}, stored)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("scales", mx.ones((64, 3))),
        ("scales", mx.ones((63, 2))),
        ("scales", mx.ones((64, 2), dtype=mx.uint8)),
        ("scales", mx.ones((64, 64))),
        ("scales", mx.ones((64, 0))),
        ("scales", mx.ones((64, 2), dtype=mx.int32)),
        ("biases", mx.ones((64, 1))),
        ("biases", mx.ones((64, 2), dtype=mx.bfloat16)),
        ("biases", None),
        ("weight", mx.zeros((64, 7), dtype=mx.uint32)),
        ("weight", mx.zeros((64, 14), dtype=mx.uint32)),
        ("weight", mx.zeros((64, 8), dtype=mx.int32)),
        ("weight", mx.zeros((64, 64))),
    ],
)
def test_quantised_parts_that_do_not_fit(tmp_path: Path, part: str, value: mx.array | None) -> None:
    folder = write_quantised(tmp_path)
    edit_tensors(folder / "model.safetensors", {f"{QUANTISED}.{part}": value})
    assert "layers.0.mlp.up_proj must be a quantised [64, 64] matrix, got" in refusal(folder)


@pytest.mark.parametrize("name", ["0.mlp.up_proj.biases", "0.input_layernorm.scales"])
def test_parts_of_a_quantised_matrix_beside_dense_weights(folder: Path, file: Path, name: str) -> None:
    edit_tensors(file, {f"model.language_model.layers.{name}": mx.ones((64, 2))})
    part = name.rpartition(".")[2]
    assert f"must be one float array or a whole quantised matrix, got the parts {part}, weight" in refusal(
        folder
    )


def test_block_formats_have_no_biases(tmp_path: Path) -> None:
    folder = write_quantised(tmp_path, {"bits": 4, "group_size": 32, "mode": "mxfp4"})
    edit_tensors(folder / "model.safetensors", {f"{QUANTISED}.biases": mx.ones((64, 2))})
    assert "must be a quantised [64, 64] matrix, got" in refusal(folder)


def test_tensor_scales_belong_to_experts_alone(tmp_path: Path) -> None:
    folder = write_quantised(tmp_path, {"bits": 4, "group_size": 16, "mode": "nvfp4"})
    edit_tensors(folder / "model.safetensors", {f"{QUANTISED}.global_scale": mx.ones((1,))})
    assert "which only nvfp4 experts have" in refusal(folder)


@pytest.mark.parametrize(
    ("form", "scale"),
    [
        ({"bits": 4, "group_size": 16, "mode": "nvfp4"}, mx.ones((3,))),
        ({"bits": 4, "group_size": 16, "mode": "nvfp4"}, mx.ones((4,), dtype=mx.bfloat16)),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, mx.ones((4,))),
    ],
)
def test_tensor_scales_that_do_not_fit_the_experts(
    tmp_path: Path, form: dict[str, Any], scale: mx.array
) -> None:
    raw = target_config("a4b")
    stored = mlx_names(random_tensors(raw), "language_model.model.", form)
    stored["language_model.model.layers.0.experts.switch_glu.up_proj.global_scale"] = scale
    folder = write_checkpoint(tmp_path, {**raw, "quantization": form}, stored)
    assert "which only nvfp4 experts have, one F32 each" in refusal(folder)


def test_quantised_weights_without_their_config(tmp_path: Path) -> None:
    folder = write_quantised(tmp_path)
    (folder / "config.json").write_text(json.dumps(target_config("31b")))
    assert "is quantised but config.json has no quantization entry" in refusal(folder)


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        (
            False,
            "says that layers.0.mlp.up_proj is not quantised, its tensors are 4-bit affine, groups of 32",
        ),
        ({"bits": 8}, "says that layers.0.mlp.up_proj is 8-bit affine, groups of 32, its tensors are 4-bit"),
        ({"bits": 7}, "MLX has no affine format with bits 7 and group_size 32"),
        ({"group_size": 48}, "MLX has no affine format with bits 4 and group_size 48"),
        ({"group_size": "32"}, "MLX has no affine format with bits 4 and group_size '32'"),
        ({"bits": None}, "MLX has no affine format with bits nothing"),
        ({"mode": "mxfp4", "bits": 8}, "MLX has no mxfp4 format with bits 8"),
        ({"mode": "int4"}, "mode must be one of affine, mxfp4, mxfp8, nvfp4, got 'int4'"),
        ({"mode": []}, "mode must be one of affine, mxfp4, mxfp8, nvfp4, got []"),
    ],
)
def test_claims_about_one_matrix_that_are_untrue(tmp_path: Path, claim: Any, words: str) -> None:
    folder = write_quantised(tmp_path)
    edit_json(folder / "config.json", quantization={**FORM, QUANTISED: claim})
    assert words in refusal(folder)


def test_a_dense_matrix_that_is_claimed_to_be_quantised(folder: Path) -> None:
    edit_json(folder / "config.json", quantization={**FORM, QUANTISED: FORM})
    assert "says that layers.0.mlp.up_proj is 4-bit affine, groups of 32, its tensor is dense" in refusal(
        folder
    )


METHODS = ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8", "modelopt", "", 4]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["quantization_config", "text_config__quantization_config"])
def test_formats_of_other_libraries(folder: Path, method: Any, place: str) -> None:
    edit_json(folder / "config.json", **{place: {"quant_method": method, "bits": 4, "group_size": 128}})
    assert f"must be dense or quantised by MLX, got quant_method {method!r}" in refusal(folder)


def test_formats_of_other_libraries_in_a_drafter(tmp_path: Path) -> None:
    folder = write_drafter(tmp_path, "31b")
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quant_method 'gptq'" in refusal(folder, read_drafter)


@pytest.mark.parametrize("entry", ["4bit", [4], 4])
def test_quantization_that_is_no_object(folder: Path, entry: Any) -> None:
    edit_json(folder / "config.json", quantization=entry)
    assert "[quantization]: must be an object" in refusal(folder)


NOT_FINITE = [mx.nan, mx.inf, -mx.inf]
SPOILED = ["layers.1.mlp.down_proj.weight", "layers.2.input_layernorm.weight", "layers.0.layer_scalar"]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("name", [*SPOILED, "embed_tokens.weight"])
def test_one_value_that_is_not_finite(tmp_path: Path, name: str, value: float, dtype: mx.Dtype) -> None:
    config = target_config("31b")
    stored = published_names(random_tensors(config, dtype=dtype), "model.language_model.")
    full = f"model.language_model.{name}"
    flat = stored[full].reshape(-1)
    flat[flat.size - 1] = value
    stored[full] = flat.reshape(stored[full].shape)
    folder = write_checkpoint(tmp_path, config, stored)
    assert f"weights must be finite, {full} holds NaN or Inf" in refusal(folder)
    assert read_target(folder, scan=False).config.text.num_layers == 3


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_scales_and_biases_that_are_not_finite(tmp_path: Path, part: str) -> None:
    folder = write_quantised(tmp_path)
    edit_tensors(folder / "model.safetensors", {f"{QUANTISED}.{part}": mx.full((64, 2), mx.nan)})
    assert f"{QUANTISED}.{part} holds NaN or Inf" in refusal(folder)


@pytest.mark.parametrize("form", [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
def test_block_scales_that_are_not_finite(tmp_path: Path, form: tuple[str, int, int]) -> None:
    mode, bits, group_size = form
    folder = write_quantised(tmp_path, {"mode": mode, "bits": bits, "group_size": group_size})
    read_target(folder)
    scales = mx.full((64, 64 // group_size), 0xFF, dtype=mx.uint8)
    edit_tensors(folder / "model.safetensors", {f"{QUANTISED}.scales": scales})
    assert f"{QUANTISED}.scales holds NaN or Inf" in refusal(folder)


def test_large_models_are_sampled_by_rows(folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.language_model.embed_tokens.weight"
    rows = np.array(random_tensors(target_config("31b"))["embed_tokens"])

    def spoil(row: int) -> None:
        spoiled = rows.copy()
        spoiled[row, 63] = np.nan
        edit_tensors(file, {name: mx.array(spoiled)})

    monkeypatch.setattr(finite, "FULL_SCAN_BYTES", 0)
    for sampled in (0, VOCAB - 1):
        spoil(sampled)
        assert f"{name} holds NaN" in refusal(folder)
    spoil(1)  # between two samples: only the full scan sees it
    read_target(folder)
    monkeypatch.undo()
    assert f"{name} holds NaN" in refusal(folder)
    norm = "model.language_model.norm.weight"
    monkeypatch.setattr(finite, "FULL_SCAN_BYTES", 0)
    edit_tensors(file, {norm: mx.full((64,), mx.nan)})
    assert f"{norm} holds NaN" in refusal(folder)


def test_a_file_that_shrinks_while_it_is_read(file: Path) -> None:
    (info, *_) = read_header(file)
    file.write_bytes(file.read_bytes()[: info.offset + info.nbytes - 2])
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        finite.scan_finite([info])


def test_large_values_are_finite(folder: Path, file: Path) -> None:
    huge = mx.full((64,), 3.3e38)
    edit_tensors(file, {"model.language_model.norm.weight": huge})
    assert mx.array_equal(read_target(folder).tensors["norm"], huge).item()


@pytest.mark.parametrize("part", ["weight", "scales"])
def test_missing_parts_of_a_quantised_matrix(tmp_path: Path, part: str) -> None:
    folder = write_quantised(tmp_path)
    edit_tensors(folder / "model.safetensors", {f"{QUANTISED}.{part}": None})
    words = (
        "1 of 43 tensors are missing (layers.0.mlp.up_proj)"
        if part == "weight"
        else "a whole quantised matrix"
    )
    assert words in refusal(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(name=st.sampled_from(["bits", "group_size", "mode", "quant_method", QUANTISED]), value=JSON)
def test_any_json_in_a_quantization_entry_gives_claims_or_our_own_error(name: str, value: Any) -> None:
    for entry in ({**FORM, name: value}, {**FORM, QUANTISED: {name: value}}, value):
        try:
            parse_quantization({"quantization": entry}, "here")
        except CheckpointError as error:
            assert "\n" not in str(error)
