"""Every published form gives the same tensors, and mlx-lm's own conversions compute the same."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from mlx_mtp.checkpoint import Tensors, read_drafter, read_target
from mlx_mtp.tensor_names import expected_tensors
from mlx_mtp.weights import DenseWeight, QuantizedWeight
from tiny_checkpoints import (
    KINDS,
    VOCAB,
    drafter_config,
    edit_json,
    edit_tensors,
    mlx_names,
    published_names,
    random_tensors,
    target_config,
    write_checkpoint,
    write_drafter,
    write_target,
)

AFFINE = [{"bits": bits, "group_size": 64, "mode": "affine"} for bits in (2, 3, 4, 5, 6, 8)]
GROUPS = [{"bits": 4, "group_size": 32, "mode": "affine"}, {"bits": 8, "group_size": 32, "mode": "affine"}]
BLOCKS = [
    {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    {"bits": 4, "group_size": 16, "mode": "nvfp4"},
]


def label(form: dict[str, Any]) -> str:
    return f"{form['mode']}-{form['bits']}-{form['group_size']}"


def plain(tensors: Tensors) -> dict[str, mx.array]:
    return {name: value if isinstance(value, mx.array) else dense(value) for name, value in tensors.items()}


def dense(weight: DenseWeight | QuantizedWeight) -> mx.array:
    if isinstance(weight, DenseWeight):
        return weight.weight
    form = {"group_size": weight.group_size, "bits": weight.bits, "mode": weight.mode}
    if weight.global_scale is None:
        return mx.dequantize(weight.weight, weight.scales, weight.biases, dtype=weight.dtype, **form)
    each = zip(weight.weight, weight.scales, weight.global_scale, strict=True)
    return mx.stack([mx.dequantize(w, s, global_scale=g, dtype=weight.dtype, **form) for w, s, g in each])


def assert_equal(got: dict[str, mx.array], want: dict[str, mx.array]) -> None:
    assert set(got) == set(want)
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        assert mx.array_equal(got[name], value).item(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("nested", [True, False])
def test_targets_as_transformers_publishes_them(tmp_path: Path, kind: str, nested: bool, shards: int) -> None:
    folder = write_target(tmp_path, kind, nested=nested, shards=shards)
    checkpoint = read_target(folder)
    assert_equal(plain(checkpoint.tensors), random_tensors(target_config(kind)))
    assert (checkpoint.warnings, checkpoint.quantized, checkpoint.generation) == ((), None, {})
    assert checkpoint.folder == folder
    for name, value in checkpoint.tensors.items():
        is_matrix = len(random_tensors(target_config(kind))[name].shape) > 1
        assert isinstance(value, DenseWeight if is_matrix else mx.array), name


@pytest.mark.parametrize("num_centroids", [0, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_drafters_as_transformers_publishes_them(tmp_path: Path, kind: str, num_centroids: int) -> None:
    checkpoint = read_drafter(write_drafter(tmp_path, kind, num_centroids=num_centroids))
    assert len(checkpoint.tensors) == (50 if num_centroids else 48)
    assert_equal(
        plain(checkpoint.tensors), random_tensors(drafter_config(kind, num_centroids=num_centroids), seed=11)
    )


def test_token_ordering_stays_exact_whatever_the_dtype(tmp_path: Path) -> None:
    checkpoint = read_drafter(write_drafter(tmp_path, "e2b"), dtype=mx.bfloat16)
    ordering = checkpoint.tensors["masked_embedding.token_ordering"]
    assert ordering.dtype == mx.uint32
    want = random_tensors(drafter_config("e2b"), seed=11)["masked_embedding.token_ordering"]
    assert ordering.tolist() == want.tolist()


def test_shards_without_an_index_are_found_by_name(tmp_path: Path) -> None:
    folder = write_target(tmp_path, "31b", shards=3)
    (folder / "model.safetensors.index.json").unlink()
    assert_equal(plain(read_target(folder).tensors), random_tensors(target_config("31b")))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("stored", [mx.float16, mx.bfloat16, mx.float32])
def test_floats_are_cast_only_on_request(tmp_path: Path, stored: mx.Dtype, dtype: mx.Dtype) -> None:
    config = target_config("a4b")
    tensors = random_tensors(config, dtype=stored)
    folder = write_checkpoint(tmp_path, config, published_names(tensors, "model.language_model."))
    assert_equal(plain(read_target(folder).tensors), tensors)
    assert {value.dtype for value in plain(read_target(folder).tensors).values()} == {stored}
    assert {value.dtype for value in plain(read_target(folder, dtype=dtype).tensors).values()} == {dtype}


def test_unused_towers_buffers_and_shared_layers_are_left_out(tmp_path: Path) -> None:
    folder = write_target(tmp_path, "e2b")
    first, last = (f"model.language_model.layers.{i}.self_attn." for i in (2, 3))
    extra = {
        "model.vision_tower.patch_embedder.weight": mx.zeros((4, 4)),
        "model.audio_tower.layers.0.self_attn.q_proj.weight": mx.full((4, 4), mx.nan),
        "model.embed_vision.embedding_projection.weight": mx.zeros((4, 4)),
        "model.language_model.layers.0.mlp.gate_proj.input_max": mx.full((1,), mx.inf),
        first + "k_proj.weight": mx.full((32, 64), mx.nan),
        last + "v_proj.weight": mx.zeros((64, 64)),
        last + "k_norm.weight": mx.zeros((32,)),
    }
    edit_tensors(folder / "model.safetensors", extra)
    checkpoint = read_target(folder)
    assert checkpoint.warnings == ()
    assert_equal(plain(checkpoint.tensors), random_tensors(target_config("e2b")))


def test_unknown_tensors_are_warned_of_once_by_their_first_five_names(tmp_path: Path) -> None:
    folder = write_target(tmp_path, "31b", nested=False)
    edit_tensors(folder / "model.safetensors", {f"model.adapter.{i}": mx.zeros((1,)) for i in range(7)})
    names = ", ".join(f"adapter.{i}" for i in range(5))
    assert read_target(folder).warnings == (f"7 tensors are not used: {names}",)


def test_files_beside_the_index_are_not_read_and_reported(tmp_path: Path) -> None:
    folder = write_target(tmp_path, "31b", shards=2)
    (folder / "model-old.safetensors").write_bytes(b"not weights")
    assert read_target(folder).warnings == (
        "not named by model.safetensors.index.json, so not read: model-old.safetensors",
    )


def test_generation_config_adds_its_end_tokens(tmp_path: Path) -> None:
    folder = write_target(tmp_path, "31b")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 106, 50], "top_k": 64}))
    checkpoint = read_target(folder)
    assert checkpoint.config.eos_token_ids == (1, 106, 50)
    assert checkpoint.generation["top_k"] == 64


def convert(source: Path, folder: Path, *, global_scale: bool = False, **form: Any) -> Any:
    """What mlx-lm's converter writes for `source`; its quantised model comes back, for comparison."""
    model, config = load_model(source)
    model, config = quantize_model(model, config, **form, global_scale=global_scale)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return model


def mlx_module(model: Any, name: str) -> Any:
    """mlx-lm's module for one of our tensor names."""
    module = model.language_model.model if "language_model" in model else model.model
    for step in name.replace(".experts.", ".experts.switch_glu.").split("."):
        module = module[int(step)] if step.isdecimal() else module[step]
    return module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [*AFFINE, *GROUPS, *BLOCKS], ids=label)
def test_conversions_by_mlx_lm_compute_the_same(tmp_path: Path, kind: str, form: dict[str, Any]) -> None:
    model = convert(write_target(tmp_path / "hf", kind), tmp_path / "mlx", **form)
    checkpoint = read_target(tmp_path / "mlx")
    assert checkpoint.warnings == ()
    assert checkpoint.quantized == f"{form['bits']}-bit {form['mode']}, groups of {form['group_size']}"
    quantized = 0
    for name, weight in checkpoint.tensors.items():
        if isinstance(weight, QuantizedWeight):
            quantized += 1
            module = mlx_module(model, name)
            x = mx.random.normal((2, weight.shape[-1]), key=mx.random.key(3))
            if ".experts." in name:
                experts = mx.array([[0, 3], [1, 2]])
                got = weight.project_experts(x[:, None, None, :], experts)
                assert mx.array_equal(got, module(x[:, None, None, :], experts)).item(), name
            elif name.startswith("embed_tokens"):
                ids = mx.array([[0, VOCAB - 1]])
                assert mx.array_equal(weight.rows(ids), module(ids)).item(), name
            else:
                assert mx.array_equal(weight.project(x), module(x)).item(), name
    assert quantized == sum(len(shape) > 1 for shape in expected_tensors(checkpoint.config).values())


@pytest.mark.parametrize("kind", KINDS)
def test_an_unquantised_conversion_by_mlx_lm_gives_the_same_tensors(tmp_path: Path, kind: str) -> None:
    model, config = load_model(write_target(tmp_path / "hf", kind))
    save_model(tmp_path / "mlx", model)
    save_config(config, tmp_path / "mlx" / "config.json")
    assert_equal(plain(read_target(tmp_path / "mlx").tensors), random_tensors(target_config(kind)))


def test_nvfp4_experts_keep_their_tensor_scales(tmp_path: Path) -> None:
    form = {"bits": 4, "group_size": 16, "mode": "nvfp4"}
    model = convert(write_target(tmp_path / "hf", "a4b"), tmp_path / "mlx", global_scale=True, **form)
    weight = read_target(tmp_path / "mlx", dtype=mx.bfloat16).tensors["layers.1.experts.up_proj"]
    assert isinstance(weight, QuantizedWeight)
    assert weight.global_scale is not None and weight.global_scale.dtype == mx.float32
    module = mlx_module(model, "layers.1.experts.up_proj")
    assert mx.array_equal(weight.global_scale, module.global_scale).item()
    original = random_tensors(target_config("a4b"))["layers.1.experts.up_proj"]
    assert mx.abs(dense(weight) - original).max().item() < 0.15 * mx.abs(original).max().item()


def test_the_router_keeps_its_own_format(tmp_path: Path) -> None:
    convert(write_target(tmp_path / "hf", "a4b"), tmp_path / "mlx", bits=4, group_size=32, mode="affine")
    tensors = read_target(tmp_path / "mlx").tensors
    router, query = tensors["layers.0.router.proj"], tensors["layers.0.self_attn.q_proj"]
    assert isinstance(router, QuantizedWeight) and isinstance(query, QuantizedWeight)
    assert (router.bits, router.group_size, router.mode) == (8, 64, "affine")
    assert (query.bits, query.group_size, query.mode) == (4, 32, "affine")


QUANTIZE = {"bits": 4, "group_size": 32, "mode": "affine"}


@pytest.mark.parametrize("form", [*AFFINE, *BLOCKS], ids=label)
def test_quantised_drafters_as_mlx_vlm_writes_them(tmp_path: Path, form: dict[str, Any]) -> None:
    raw = drafter_config("31b")
    tensors = random_tensors(raw, seed=11)
    folder = write_checkpoint(tmp_path, {**raw, "quantization": form}, mlx_names(tensors, "model.", form))
    checkpoint = read_drafter(folder)
    assert checkpoint.quantized == f"{form['bits']}-bit {form['mode']}, groups of {form['group_size']}"
    embedding = checkpoint.tensors["embed_tokens"]
    assert isinstance(embedding, QuantizedWeight)
    parts = mx.quantize(tensors["embed_tokens"], **form)
    ids = mx.array([5, 200])
    want = mx.dequantize(*parts, dtype=mx.float32, **form)[ids]
    assert mx.array_equal(embedding.rows(ids), want).item()
    assert isinstance(checkpoint.tensors["masked_embedding.centroids"], QuantizedWeight)


@pytest.mark.parametrize("kind", ["31b", "a4b"])
@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model.", ""])
def test_per_matrix_overrides_under_any_prefix(tmp_path: Path, prefix: str, kind: str) -> None:
    raw = target_config(kind)
    tensors = random_tensors(raw)
    stored = mlx_names(tensors, "language_model.model.", QUANTIZE)
    left_dense, eight_bit = "layers.0.self_attn.o_proj", "layers.1.mlp.down_proj"
    for part in ("scales", "biases"):
        del stored[f"language_model.model.{left_dense}.{part}"]
    stored[f"language_model.model.{left_dense}.weight"] = tensors[left_dense]
    parts = mx.quantize(tensors[eight_bit], bits=8, group_size=64)
    names = (f"language_model.model.{eight_bit}.{part}" for part in ("weight", "scales", "biases"))
    stored |= zip(names, parts, strict=True)
    stored["vision_tower.encoder.weight"] = mx.zeros((4, 4))
    claims = {**QUANTIZE, prefix + left_dense: False, prefix + eight_bit: {"bits": 8, "group_size": 64}}
    folder = write_checkpoint(tmp_path, {**raw, "quantization": claims}, stored)
    read = read_target(folder).tensors
    assert isinstance(read[left_dense], DenseWeight)
    assert mx.array_equal(read[left_dense].weight, tensors[left_dense]).item()
    changed = read[eight_bit]
    assert isinstance(changed, QuantizedWeight) and (changed.bits, changed.group_size) == (8, 64)


@pytest.mark.parametrize("place", ["quantization", "quantization_config", "text_config__quantization_config"])
def test_the_quantization_entry_may_stand_in_three_places(tmp_path: Path, place: str) -> None:
    raw = target_config("31b")
    stored = mlx_names(random_tensors(raw), "language_model.model.", QUANTIZE)
    folder = write_checkpoint(tmp_path, raw, stored)
    edit_json(folder / "config.json", **{place: QUANTIZE})
    assert read_target(folder).quantized == "4-bit affine, groups of 32"


def test_scales_are_cast_and_block_scales_are_not(tmp_path: Path) -> None:
    raw = target_config("31b")
    for form in (QUANTIZE, BLOCKS[0]):
        stored = mlx_names(random_tensors(raw), "language_model.model.", form)
        folder = write_checkpoint(tmp_path / form["mode"], {**raw, "quantization": form}, stored)
        weight = read_target(folder, dtype=mx.bfloat16).tensors["embed_tokens"]
        assert isinstance(weight, QuantizedWeight)
        assert weight.dtype == mx.bfloat16 and weight.rows(mx.array([3])).dtype == mx.bfloat16
        assert weight.scales.dtype == (mx.bfloat16 if form is QUANTIZE else mx.uint8)
        assert read_target(folder).tensors["embed_tokens"].dtype == mx.float32


def test_a_claim_that_no_matrix_bears_out_is_warned_of(tmp_path: Path) -> None:
    folder = write_target(tmp_path, "31b")
    edit_json(folder / "config.json", quantization=QUANTIZE)
    assert read_target(folder).warnings == (
        "config.json speaks of 4-bit affine, groups of 32 weights, and no matrix is such",
    )


def test_reading_leaves_weights_on_disk(tmp_path: Path) -> None:
    config = target_config("31b")
    config["text_config"]["vocab_size"] = config["vocab_size"] = 200_000
    tensors = random_tensors(config)
    folder = write_checkpoint(tmp_path, config, published_names(tensors, "model.language_model."))
    del tensors
    mx.clear_cache()
    before = mx.get_active_memory()
    checkpoint = read_target(folder)
    assert mx.get_active_memory() - before < 1_000_000
    mx.eval(checkpoint.tensors["embed_tokens"].weight)
    assert mx.get_active_memory() - before > 50_000_000
