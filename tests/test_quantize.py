"""Quantised copies on disk: mlx-lm's own, bit for bit; refused, interrupted and full disks leave nothing behind."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.convert import convert
from mlx_lm.utils import load_model
from safetensors import safe_open

from mlx_mtp import quantize_files, quantize_plan, whole_folder
from mlx_mtp.checkpoint import read_drafter, read_target, read_target_config
from mlx_mtp.errors import CheckpointError, MtpError, ParameterError, StorageError
from mlx_mtp.headers import read_headers
from mlx_mtp.progress import Progress
from mlx_mtp.quantize import quantize_checkpoint, quantize_tensors
from mlx_mtp.weights import DenseWeight, QuantizedWeight
from test_quantized_parity import assert_same, own_logits, text
from tiny_checkpoints import (
    KINDS,
    edit_json,
    edit_tensors,
    published_names,
    random_tensors,
    target_config,
    write_checkpoint,
    write_drafter,
    write_target,
)
from tiny_tokenizer import write_tokenizer

ROOT = Path(__file__).parent.parent
TABLE = "model.language_model.embed_tokens.weight"
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


# What must leave nothing behind.


def refused(source: Path, error: type[MtpError], **arguments: Any) -> str:
    """The message with which the conversion of `source` is refused; nothing may be left beside it."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(error) as caught:
        quantize_checkpoint(source, source.parent / "out", **{"bits": 4, **arguments})
    assert sorted(source.parent.iterdir()) == before
    message = str(caught.value)
    assert "\n" not in message and "; " in message
    return message


def test_an_already_quantised_source_is_refused(tmp_path: Path) -> None:
    ours = quantize_checkpoint(write_target(tmp_path / "source", "31b"), tmp_path / "ours", bits=8)
    message = refused(ours, CheckpointError)
    assert "8-bit affine, groups of 64 already" in message and "load them as they are" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["embed_tokens.weight", "norm.weight", "layers.2.mlp.down_proj.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, name: str, value: float) -> None:
    source = write_target(tmp_path / "source", "31b")
    full = f"model.language_model.{name}"
    array = mx.load(str(source / "model.safetensors"))[full]
    broken = np.array(array)
    broken.reshape(-1)[-1] = value
    edit_tensors(source / "model.safetensors", {full: mx.array(broken)})
    assert f"{full} holds NaN or Inf" in refused(source, CheckpointError)


def test_values_too_large_for_the_type_they_become_are_refused(tmp_path: Path) -> None:
    source = write_target(tmp_path / "source", "31b")
    edit_json(source / "config.json", text_config__dtype="float16")
    edit_tensors(source / "model.safetensors", {TABLE: mx.full((256, 64), 1e30)})
    assert "values too large for F16" in refused(source, CheckpointError)


@pytest.mark.parametrize("arguments", [{"bits": 3}, {"bits": 16}, {"group_size": 48}, {"bits": True}])
def test_formats_that_are_not_offered_are_refused(tmp_path: Path, arguments: dict[str, Any]) -> None:
    refused(write_target(tmp_path / "source", "31b"), ParameterError, **arguments)


def test_a_model_too_narrow_for_the_groups_is_refused(tmp_path: Path) -> None:
    config = target_config("31b")
    config["text_config"]["num_attention_heads"] = 2
    stored = published_names(random_tensors(config), "model.language_model.")
    source = write_checkpoint(tmp_path / "source", config, stored)
    assert "smaller group_size" in refused(source, CheckpointError, group_size=128)


def test_an_existing_result_is_never_touched(tmp_path: Path) -> None:
    source = write_target(tmp_path / "source", "31b")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "exists already" in refused(source, ParameterError)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_too_little_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_target(tmp_path / "source", "31b")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(whole_folder.shutil, "disk_usage", lambda place: usage(10**9, 10**9, 10**6))
    monkeypatch.setattr(os, "pwrite", lambda *arguments: pytest.fail("nothing may be written"))
    assert "0.0 GB free" in refused(source, StorageError)


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "became full"), (errno.EACCES, "cannot be written")]
)
def test_a_disk_that_fails_halfway_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    real, calls = os.pwrite, []

    def failing(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) > 20:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", failing)
    assert said in refused(write_target(tmp_path / "source", "a4b"), StorageError)


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_target(tmp_path / "source", "a4b")
    want = stored_tensors(quantize_checkpoint(source, tmp_path / "whole", bits=4))
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, memoryview(data)[:100], at))
    assert_equal_tensors(stored_tensors(quantize_checkpoint(source, tmp_path / "short", bits=4)), want)


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    source = write_target(tmp_path / "source", "31b")
    file = source / "model.safetensors"

    def touch(progress: Progress) -> None:
        os.utime(file, ns=(1, 1))

    assert "changed while" in refused(source, CheckpointError, on_progress=touch)


def test_a_source_that_is_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    source = write_target(tmp_path / "source", "31b")
    file = source / "model.safetensors"
    cut = lambda progress: os.truncate(file, file.stat().st_size // 2)  # noqa: E731
    assert "became shorter" in refused(source, CheckpointError, on_progress=cut)


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError, RuntimeError])
def test_what_a_callback_raises_comes_through_and_leaves_nothing(
    tmp_path: Path, error: type[BaseException]
) -> None:
    source = write_target(tmp_path / "source", "31b")

    def stop(progress: Progress) -> None:
        if progress.done:
            assert (tmp_path / ".out.partial" / "model.safetensors").exists()
            raise error

    with pytest.raises(error):
        quantize_checkpoint(source, tmp_path / "out", bits=4, on_progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


SLOW_CHILD = """
import sys, time
from mlx_mtp.quantize import quantize_checkpoint
def wait(progress):
    print("at work", flush=True)
    time.sleep(0.5)
quantize_checkpoint(sys.argv[1], sys.argv[2], bits=4, on_progress=wait)
"""


def child_at_work(source: Path, out: Path, program: str = SLOW_CHILD) -> subprocess.Popen[str]:
    """Another Python that has begun to quantise."""
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(source), str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "at work\n"
    return child


def test_signals_leave_no_result_and_a_killed_run_is_cleared_away(tmp_path: Path) -> None:
    source, out = write_target(tmp_path / "source", "31b"), tmp_path / "out"
    child = child_at_work(source, out)
    with pytest.raises(StorageError, match="another process is writing here"):
        quantize_checkpoint(source, out, bits=4)
    child.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in child.communicate(timeout=20)[1]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]

    child = child_at_work(source, out)
    child.kill()
    child.communicate(timeout=20)
    (tmp_path / ".out.partial" / "stray").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "source"]
    quantize_checkpoint(source, out, bits=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert not (out / "stray").exists() and read_target(out).quantized


LARGE_CHILD = """
import json, resource, sys
import mlx.core as mx
from mlx_mtp.quantize import quantize_checkpoint
mx.set_default_device(mx.cpu)
mx.eval(mx.quantize(mx.ones((64, 64))))
unit = 1 if sys.platform == "darwin" else 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
before = peak()
quantize_checkpoint(sys.argv[1], sys.argv[2], bits=8)
print(json.dumps(peak() - before))
"""


def test_memory_stays_far_below_one_matrix(tmp_path: Path) -> None:
    """A table of 0.3 GB in bfloat16 passes in far less, whatever its format on disk."""
    config = target_config("31b")
    for place in (config, config["text_config"]):
        place["vocab_size"] = 1 << 21
    source = tmp_path / "source"
    prefix = "model.language_model."
    small = random_tensors(target_config("31b"), dtype=mx.bfloat16)
    stored = published_names({**small, "embed_tokens": mx.ones((1 << 21, 64), mx.bfloat16)}, prefix)
    write_checkpoint(source, config, stored)
    command = [sys.executable, "-c", LARGE_CHILD, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert (source / "model.safetensors").stat().st_size > 250e6
    assert json.loads(done.stdout) < 120e6
    shutil.rmtree(tmp_path / "out")


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
