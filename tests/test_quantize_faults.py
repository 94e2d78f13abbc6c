"""Refused, interrupted, killed and full disks: no quantised copy is left that is not whole, and memory stays small."""

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

from mlx_mtp import whole_folder
from mlx_mtp.checkpoint import read_target
from mlx_mtp.errors import CheckpointError, MtpError, ParameterError, StorageError
from mlx_mtp.progress import Progress
from mlx_mtp.quantize import quantize_checkpoint
from test_quantize import ROOT, assert_equal_tensors, stored_tensors
from tiny_checkpoints import (
    edit_json,
    edit_tensors,
    published_names,
    random_tensors,
    target_config,
    write_checkpoint,
    write_target,
)

TABLE = "model.language_model.embed_tokens.weight"


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
