"""Quantised copies on disk: what mlx-lm converts, bit for bit, and what both readers compute the same from."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.convert import convert
from mlx_lm.utils import load_model
from safetensors import safe_open

from mlx_mtp import quantize_files, quantize_plan
from mlx_mtp.checkpoint import read_drafter, read_target, read_target_config
from mlx_mtp.headers import read_headers
from mlx_mtp.progress import Progress
from mlx_mtp.quantize import quantize_checkpoint, quantize_tensors
from mlx_mtp.weights import DenseWeight, QuantizedWeight
from test_quantized_parity import assert_same, own_logits, text
from tiny_checkpoints import (
    KINDS,
    edit_json,
    published_names,
    random_tensors,
    target_config,
    write_checkpoint,
    write_drafter,
    write_target,
)
from tiny_tokenizer import write_tokenizer

ROOT = Path(__file__).parent.parent
each_kind = pytest.mark.parametrize("kind", KINDS)


def published(
    folder: Path, kind: str, *, nested: bool = True, dtype: str = "bfloat16", shards: int = 2
) -> Path:
    """A tiny target as it is published: bfloat16, in shards, with a tokenizer and a vision tower."""
    config = target_config(kind, nested=nested)
    if nested:
        config["text_config"]["dtype"] = dtype
        config["vision_config"] = {"model_type": "gemma4_vision"}
    prefix = "model.language_model." if nested else "model."
    stored = published_names(random_tensors(config, dtype=getattr(mx, dtype)), prefix)
    if nested:
        stored["model.vision_tower.patch_embedder.input_proj.weight"] = mx.ones((64, 64), mx.bfloat16)
    write_tokenizer(folder)
    return write_checkpoint(folder, config, stored, shards=shards)


def stored_tensors(folder: Path) -> dict[str, mx.array]:
    """All tensors of a folder; refuses a name that is in two files."""
    found: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        own = mx.load(str(file))
        assert not own.keys() & found.keys()
        found |= own
    return found


def assert_equal_tensors(got: dict[str, mx.array], want: dict[str, mx.array]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert mx.array_equal(got[name], want[name]).item(), name


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


@each_kind
@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, 32)])
def test_a_quantised_copy_is_what_mlx_lm_converts(
    tmp_path: Path, kind: str, bits: int, group_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    source = published(tmp_path / "source", kind)
    convert(str(source), str(tmp_path / "theirs"), quantize=True, q_bits=bits, q_group_size=group_size)
    capsys.readouterr()
    ours = quantize_checkpoint(source, tmp_path / "ours", bits=bits, group_size=group_size)
    theirs = tmp_path / "theirs"
    assert capsys.readouterr() == ("", "")
    assert_equal_tensors(stored_tensors(ours), stored_tensors(theirs))
    # mlx-lm copies generation_config.json's EOS ids into config.json; both readers look into both files.
    configs = [read_json(folder / "config.json") | {"eos_token_id": None} for folder in (ours, theirs)]
    assert configs[0] == configs[1]
    assert read_target_config(ours).eos_token_ids == read_target_config(source).eos_token_ids
    index, theirs_index = (read_json(folder / "model.safetensors.index.json") for folder in (ours, theirs))
    assert index["weight_map"] == theirs_index["weight_map"]
    assert index["metadata"]["total_size"] == theirs_index["metadata"]["total_size"]
    assert (ours / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    assert (ours / "chat_template.jinja").read_bytes() == (source / "chat_template.jinja").read_bytes()


@each_kind
def test_mlx_lm_and_we_compute_the_same_from_our_copy(tmp_path: Path, kind: str) -> None:
    source = published(tmp_path / "source", kind, dtype="float32")
    ours = quantize_checkpoint(source, tmp_path / "ours", bits=4)
    model, _ = load_model(ours)
    assert_same(own_logits(ours, rows=5), np.array(model(mx.array([text()]))[0]))


@pytest.mark.parametrize("kind", ["e2b", "31b", "a4b"])
def test_the_text_only_form_keeps_its_names(tmp_path: Path, kind: str) -> None:
    source = published(tmp_path / "source", kind, nested=False)
    ours = quantize_checkpoint(source, tmp_path / "ours", bits=4)
    convert(str(source), str(tmp_path / "theirs"), quantize=True, q_bits=4)
    assert_equal_tensors(stored_tensors(ours), stored_tensors(tmp_path / "theirs"))
    assert read_target(ours).quantized == "4-bit affine, groups of 64"


def test_routers_stay_at_eight_bits_by_an_override_that_both_readers_know(tmp_path: Path) -> None:
    ours = quantize_checkpoint(published(tmp_path / "source", "a4b"), tmp_path / "ours", bits=4)
    name = "language_model.model.layers.0.router.proj"
    assert read_json(ours / "config.json")["quantization"][name] == {"bits": 8, "group_size": 64}
    router = read_target(ours).tensors["layers.0.router.proj"]
    assert isinstance(router, QuantizedWeight) and router.bits == 8


def test_a_type_that_config_asks_for_is_given_as_mlx_lm_gives_it(tmp_path: Path) -> None:
    source = published(tmp_path / "source", "31b", dtype="float32")
    edit_json(source / "config.json", text_config__dtype="bfloat16")
    ours = quantize_checkpoint(source, tmp_path / "ours", bits=4)
    convert(str(source), str(tmp_path / "theirs"), quantize=True, q_bits=4)
    assert_equal_tensors(stored_tensors(ours), stored_tensors(tmp_path / "theirs"))


@pytest.mark.parametrize("kind", ["e2b", "a4b"])
def test_small_slices_and_shards_hold_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    source = published(tmp_path / "source", kind)
    whole = quantize_checkpoint(source, tmp_path / "whole", bits=4)
    monkeypatch.setattr(quantize_files, "SLICE_BYTES", 5 * 128 + 1)  # five rows of 64, never a whole matrix
    pieces = quantize_checkpoint(source, tmp_path / "pieces", bits=4, shard_bytes=40_000)
    files = sorted(pieces.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert max(file.stat().st_size for file in files) < 50_000
    assert_equal_tensors(stored_tensors(pieces), stored_tensors(whole))
    index = read_json(pieces / "model.safetensors.index.json")["weight_map"]
    assert index == {name: file.name for file in files for name in mx.load(str(file))}
    assert len(read_target(pieces).tensors) == len(read_target(whole).tensors)


def test_files_are_sound_and_every_tensor_is_aligned(tmp_path: Path) -> None:
    ours = quantize_checkpoint(published(tmp_path / "source", "e2b"), tmp_path / "ours", bits=4)
    with safe_open(ours / "model.safetensors", framework="numpy") as opened:
        assert opened.metadata() == {"format": "mlx"}
    for info in read_headers(ours)[0].values():
        assert info.offset % (4 if info.dtype == "U32" else 2) == 0, info.name


@pytest.mark.parametrize(("kind", "num_centroids"), [("e2b", 32), ("a4b", 0), ("12b", 0)])
def test_a_drafter_on_disk_is_the_drafter_quantised_in_memory(
    tmp_path: Path, kind: str, num_centroids: int
) -> None:
    source = write_drafter(tmp_path / "source", kind, num_centroids=num_centroids)
    on_disk = read_drafter(quantize_checkpoint(source, tmp_path / "ours", bits=4, group_size=32))
    dense = read_drafter(source).tensors
    ordering = dense.get("masked_embedding.token_ordering")
    in_memory = quantize_tensors(dense, 4, 32)
    assert dense == {} and in_memory.keys() == on_disk.tensors.keys()
    for path, value in in_memory.items():
        read = on_disk.tensors[path]
        assert type(value) is type(read), path
        for mine, theirs in zip(arrays_of(value), arrays_of(read), strict=True):
            assert mine.dtype == theirs.dtype and mx.array_equal(mine, theirs).item(), path
    if num_centroids:
        assert mx.array_equal(in_memory["masked_embedding.token_ordering"], ordering).item()


def arrays_of(value: Any) -> list[mx.array]:
    return [value] if isinstance(value, mx.array) else value.arrays


def test_in_memory_odd_widths_and_quantised_matrices_stay_as_they_are() -> None:
    odd = DenseWeight(mx.ones((64, 48)))
    packed = mx.quantize(mx.ones((64, 64)))
    done = QuantizedWeight(*packed, 64, 4, "affine", mx.float32)
    made = quantize_tensors({"odd": odd, "done": done, "norm": mx.ones((64,))}, 8)
    assert made["odd"] is odd and made["done"] is done and isinstance(made["norm"], mx.array)


def test_in_memory_centroids_keep_eight_bits() -> None:
    names = ("masked_embedding.centroids", "embed_tokens")
    made = quantize_tensors({name: DenseWeight(mx.ones((64, 64))) for name in names}, 4)
    formats = [made[name] for name in names]
    assert all(isinstance(weight, QuantizedWeight) for weight in formats)
    assert [weight.bits for weight in formats if isinstance(weight, QuantizedWeight)] == [8, 4]


def test_progress_counts_the_bytes_that_are_read(tmp_path: Path) -> None:
    source = published(tmp_path / "source", "a4b")
    events: list[Progress] = []
    quantize_checkpoint(source, tmp_path / "ours", bits=4, on_progress=events.append)
    done = [event.done for event in events]
    read = sum(i.nbytes for name, i in read_headers(source)[0].items() if "vision" not in name)
    assert done == sorted(done) and done[0] == 0 and done[-1] == read and len(events) > 50  # type: ignore[type-var]
    assert {(event.stage, event.total) for event in events} == {("quantize", read)}


def test_every_tensor_of_the_plan_is_written_once(tmp_path: Path) -> None:
    """Slices of rows cover each new tensor exactly, for fused experts too."""
    plan = quantize_plan.make_plan(write_target(tmp_path / "source", "a4b"), 4, 32)
    for shard in plan.shards:
        ends = sorted((shard.offsets[t.name], t.nbytes) for job in shard.jobs for t in job.made)
        at = len(shard.header)
        for offset, nbytes in ends:
            assert offset == at
            at += nbytes
        assert at == shard.nbytes
        for job in shard.jobs:
            assert sum(rows for _, rows in job.runs()) == int(np.prod(job.shape[:-1]))
