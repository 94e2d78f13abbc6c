"""Kept quantised copies: used again, made again when damaged or out of date, made once by two processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp import kept_quantized
from mlx_mtp.checkpoint import read_target
from mlx_mtp.errors import CheckpointError, StorageError
from mlx_mtp.progress import Progress
from mlx_mtp.quantize import (
    is_sound,
    kept_copies,
    kept_copy,
    quantize_checkpoint,
    quantized_copy,
    remove_copy,
)
from test_quantize import ROOT, assert_equal_tensors, stored_tensors
from tiny_checkpoints import edit_tensors, write_target

KEY = "google/gemma-tiny-it@0123456789abcdef"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_target(tmp_path / "tiny it", "31b", shards=2)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "quantized"


def unused(progress: Progress) -> None:
    pytest.fail(f"nothing should be done, got {progress}")


@pytest.mark.parametrize("key", [KEY, None])
def test_a_copy_is_made_once_and_found_again(source: Path, cache: Path, key: str | None) -> None:
    events: list[Progress] = []
    made = quantized_copy(source, 4, key=key, into=cache, on_progress=events.append)
    assert events and made.parent == cache
    assert made.name.startswith("gemma-tiny-it-4bit-" if key else "tiny-it-4bit-")
    want = quantize_checkpoint(source, cache.parent / "other", bits=4)
    assert_equal_tensors(stored_tensors(made), stored_tensors(want))
    assert quantized_copy(source, 4, key=key, into=cache, on_progress=unused) == made
    assert read_target(made).quantized == "4-bit affine, groups of 64"
    assert cache.stat().st_mode & 0o777 == 0o700


def test_with_a_key_the_source_may_be_gone(source: Path, cache: Path) -> None:
    assert kept_copy(KEY, 4, into=cache) is None
    made = quantized_copy(source, 4, key=KEY, into=cache)
    shutil.rmtree(source)
    assert kept_copy(KEY, 4, into=cache) == made
    assert quantized_copy(source, 4, key=KEY, into=cache, on_progress=unused) == made
    assert kept_copy(KEY, 8, into=cache) is kept_copy(KEY + "0", 4, into=cache) is None
    with pytest.raises(CheckpointError, match="is not a folder"):
        quantized_copy(source, 8, key=KEY, into=cache)


def test_bits_groups_and_keys_have_copies_of_their_own(source: Path, cache: Path) -> None:
    made = {
        quantized_copy(source, 4, key=KEY, into=cache),
        quantized_copy(source, 8, key=KEY, into=cache),
        quantized_copy(source, 4, key=KEY, into=cache, group_size=32),
        quantized_copy(source, 4, key=KEY + "0", into=cache),
        quantized_copy(source, 4, into=cache),
    }
    assert len(made) == 5 == len(kept_copies(cache))


def test_a_new_way_of_making_copies_makes_them_again(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = quantized_copy(source, 4, key=KEY, into=cache)
    monkeypatch.setattr(kept_quantized, "VERSION", 2)
    assert quantized_copy(source, 4, key=KEY, into=cache) != made


def test_a_local_folder_that_changed_gets_a_new_copy(source: Path, cache: Path) -> None:
    made = [quantized_copy(source, 4, into=cache)]
    edit_tensors(source / "model-00001-of-00002.safetensors", {"model.vision_tower.extra": mx.ones((2,))})
    made.append(quantized_copy(source, 4, into=cache))
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    made.append(quantized_copy(source, 4, into=cache))
    os.utime(source / "model-00002-of-00002.safetensors", ns=(5, 5))
    made.append(quantized_copy(source, 4, into=cache))
    source = source.rename(source.with_name("moved"))
    made.append(quantized_copy(source, 4, into=cache))
    assert len(set(made)) == 5
    assert (made[2] / "generation_config.json").is_file() and not (
        made[0] / "generation_config.json"
    ).exists()
    assert quantized_copy(source, 4, into=cache, on_progress=unused) == made[-1]


def zero_page(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        stream.write(b"\0" * 4096)


DAMAGES: dict[str, Any] = {
    "cut weights": lambda copy: os.truncate(copy / "model.safetensors", 5000),
    "empty weights": lambda copy: os.truncate(copy / "model.safetensors", 0),
    "zeroed weights": lambda copy: zero_page(copy / "model.safetensors"),
    "missing weights": lambda copy: (copy / "model.safetensors").unlink(),
    "a folder for weights": lambda copy: [
        (copy / "model.safetensors").unlink(),
        (copy / "model.safetensors").mkdir(),
    ],
    "another config": lambda copy: (copy / "config.json").write_text("{}"),
    "no record": lambda copy: (copy / kept_quantized.RECORD).unlink(),
    "a record of garbage": lambda copy: (copy / kept_quantized.RECORD).write_bytes(b"\xff\x00"),
    "a record of nothing": lambda copy: (copy / kept_quantized.RECORD).write_text("[]"),
    "a nested record": lambda copy: (copy / kept_quantized.RECORD).write_text("[" * 100_000),
    "an old record": lambda copy: (copy / kept_quantized.RECORD).write_text('{"version": 0}'),
    "a wrong record": lambda copy: (copy / kept_quantized.RECORD).write_text(
        '{"version": 1, "source": 1, "bits": "4", "files": {"config.json": ""}}'
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_copy_is_set_aside_with_a_warning_and_made_again(
    source: Path, cache: Path, damage: Any
) -> None:
    """Fault 75."""
    made = quantized_copy(source, 4, key=KEY, into=cache)
    want = stored_tensors(made)
    mx.eval(want)
    damage(made)
    assert kept_copy(KEY, 4, into=cache) is None and not any(map(is_sound, kept_copies(cache)))
    warnings: list[str] = []
    assert quantized_copy(source, 4, key=KEY, into=cache, on_warning=warnings.append) == made
    assert_equal_tensors(stored_tensors(made), want)
    (warning,) = warnings
    aside = made.with_name(made.name + ".corrupt")
    assert aside.is_dir() and "is damaged" in warning and str(aside) in warning
    assert quantized_copy(source, 4, key=KEY, into=cache, on_progress=unused) == made
    assert [(copy.bits, is_sound(copy)) for copy in kept_copies(cache)] == [(4, True), (0, False)]


def test_a_zeroed_stretch_of_a_large_file_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(range(1, 251)) * 40_000)
    seal = kept_quantized.seal_of(file)
    for start in (2_000_000, 5_000_001, 9_800_000):
        with file.open("r+b") as stream:
            stream.seek(start)
            held = stream.read(200_000)
            stream.seek(start)
            stream.write(bytes(200_000))
        assert kept_quantized.seal_of(file) != seal
        with file.open("r+b") as stream:
            stream.seek(start)
            stream.write(held)
    assert kept_quantized.seal_of(file) == seal


def test_a_second_damage_replaces_the_first_that_was_set_aside(source: Path, cache: Path) -> None:
    for _ in range(2):
        made = quantized_copy(source, 4, key=KEY, into=cache)
        (made / "config.json").unlink()
    events: list[Progress] = []
    quantized_copy(source, 4, key=KEY, into=cache, on_progress=events.append)
    assert len(list(cache.iterdir())) == 2
    assert "is damaged (config.json cannot be read" in events[0].message


def test_what_is_kept_can_be_listed_and_removed(source: Path, cache: Path) -> None:
    assert kept_copies(cache) == ()
    made = quantized_copy(source, 8, key=KEY, into=cache)
    (cache / ".gone-4bit-0.partial").mkdir()
    (cache / ".gone-4bit-0.partial" / "model.safetensors").write_bytes(b"0" * 100)
    unfinished, copy = kept_copies(cache)
    assert (copy.path, copy.source, copy.bits) == (made, KEY, 8)
    assert copy.nbytes == sum(file.stat().st_size for file in made.iterdir())
    assert (unfinished.bits, unfinished.nbytes) == (0, 100)
    assert remove_copy(copy) == copy.nbytes and remove_copy(unfinished) == 100
    assert list(cache.iterdir()) == []


TWIN = """
import json, sys, time
from pathlib import Path
from mlx_mtp.quantize import quantized_copy
stages = []
def slowly(progress):
    if not stages:
        print("at work", flush=True)
    stages.append(progress.stage)
    time.sleep(0.02)
out = quantized_copy(Path(sys.argv[1]), 4, key="twin", into=Path(sys.argv[2]), on_progress=slowly)
print(json.dumps([str(out), sorted(set(stages))]))
"""


def test_two_processes_make_a_copy_once(source: Path, cache: Path) -> None:
    command = [sys.executable, "-c", TWIN, str(source), str(cache)]
    twins = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [json.loads(twin.communicate(timeout=60)[0].splitlines()[-1]) for twin in twins]
    assert [twin.returncode for twin in twins] == [0, 0]
    assert told[0][0] == told[1][0] and sorted(stages for _, stages in told) == [["quantize"], ["wait"]]
    assert [path.name for path in cache.iterdir()] == [Path(told[0][0]).name]


def test_waiting_can_be_interrupted_by_the_callback(source: Path, cache: Path) -> None:
    command = [sys.executable, "-c", TWIN, str(source), str(cache)]
    twin = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert twin.stdout is not None and twin.stdout.readline() == "at work\n"

    def impatient(progress: Progress) -> None:
        assert progress.stage == "wait" and "another process" in progress.message
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized_copy(source, 4, key="twin", into=cache, on_progress=impatient)
    assert kept_copies(cache) == ()
    out = json.loads(twin.communicate(timeout=60)[0].splitlines()[-1])[0]
    assert quantized_copy(source, 4, key="twin", into=cache, on_progress=unused) == Path(out)


def test_a_place_that_cannot_be_written_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="; "):
        quantized_copy(source, 4, key=KEY, into=tmp_path / "file" / "quantized")
