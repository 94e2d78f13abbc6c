"""Faults of files and pairs as a person meets them: through `load` and the command line."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from cli_runs import CONTEXT, one_line, run_main, write_chat_pair
from mlx_mtp import checkpoint as checkpoint_module
from mlx_mtp import generate, load
from mlx_mtp.errors import CheckpointError, PairError, PromptError
from tiny_checkpoints import edit_json, edit_tensors

SHARD = "model.safetensors"
OURS = (CheckpointError, PairError)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `target` and, beside it, `drafter`."""
    write_chat_pair(tmp_path)
    return tmp_path


def refused(target: str | Path, **options: Any) -> str:
    """The one line with which `load` refuses, ending in a remedy."""
    with pytest.raises(OURS) as caught:
        load(target, **options)
    message = str(caught.value)
    assert "\n" not in message and "; " in message and caught.value.exit_code == 3
    return message


def says_so(*words: str | Path, exit_code: int = 3) -> str:
    """The one line on stderr with which `mlx-mtp WORDS` ends; nothing on stdout, no traceback."""
    run = run_main(*words)
    assert run.returncode == exit_code and run.stdout == b"", run
    return one_line(run.stderr)


def test_a_path_that_is_missing(folder: Path) -> None:
    """Fault 1: the remedy names what can be given instead."""
    message = refused(folder / "nowhere")
    assert "there is no folder" in message and "nowhere" in message and "e4b" in message
    assert says_so("generate", folder / "nowhere", "Hi") == message


@pytest.mark.parametrize("part", ["target", "drafter"])
def test_a_shard_of_no_bytes(folder: Path, part: str) -> None:
    """Fault 5."""
    (folder / part / SHARD).write_bytes(b"")
    assert "is empty; download it again" in refused(folder / "target")
    assert "is empty; download it again" in says_so("generate", folder / "target", "Hi")


def moved_out(folder: Path, name: str) -> Path:
    """Put a target's file elsewhere and a link to it in its place."""
    outside = folder / "outside"
    outside.mkdir(exist_ok=True)
    (folder / "target" / name).rename(outside / name)
    (folder / "target" / name).symlink_to(outside / name)
    return outside / name


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", SHARD]
)
def test_a_link_that_leaves_the_folder(folder: Path, name: str) -> None:
    """Fault 18."""
    place = moved_out(folder, name)
    message = refused(folder / "target")
    assert f"got a link to {place}" in message and "put the file itself there" in message


def test_an_index_that_is_a_link(folder: Path) -> None:
    index = folder / "index.json"
    index.write_text(json.dumps({"weight_map": {"x": SHARD}}))
    (folder / "target" / f"{SHARD}.index.json").symlink_to(index)
    assert "got a link to" in refused(folder / "target")


def test_links_within_a_folder_and_to_a_folder_are_fine(folder: Path) -> None:
    target = folder / "target"
    (target / SHARD).rename(target / "weights")
    (target / SHARD).symlink_to("weights")
    (folder / "short").symlink_to(target)
    assert load(folder / "short").drafter is not None


@pytest.mark.parametrize("name", ["config.json", SHARD])
def test_links_to_nothing_and_in_a_circle(folder: Path, name: str) -> None:
    path = folder / "target" / name
    path.unlink()
    path.symlink_to(folder / "gone")
    assert "download the model again" in refused(folder / "target")
    path.unlink()
    path.symlink_to(path)
    assert "cannot be read" in refused(folder / "target")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", SHARD])
def test_a_pipe_is_not_waited_for(folder: Path, name: str) -> None:
    path = folder / "target" / name
    path.unlink()
    os.mkfifo(path)
    assert "must be a regular file" in refused(folder / "target")


def as_cache(folder: Path) -> Path:
    """The target as huggingface_hub lays it out: names in a snapshot that link to blobs of the repository."""
    repo = folder / "hub" / "models--org--name"
    snapshot, blobs = repo / "snapshots" / ("0" * 40), repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((folder / "target").iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    return snapshot


def test_the_links_of_the_cache_are_fine(folder: Path) -> None:
    """Fault 18's other side, and with blobs that repositories share, as huggingface_hub 2 keeps them."""
    snapshot = as_cache(folder)
    assert load(snapshot, drafter=folder / "drafter").drafter is not None
    shared = folder / "hub" / "blobs" / "ab"
    shared.mkdir(parents=True)
    blob = (snapshot / SHARD).resolve()
    blob.rename(shared / "abcd")
    blob.symlink_to("../../blobs/ab/abcd")
    assert load(snapshot, drafter=None).drafter is None


@pytest.mark.parametrize("place", ["hub/models--other--name/blobs", "hub", "elsewhere"])
def test_a_link_that_leaves_the_cache(folder: Path, place: str) -> None:
    snapshot = as_cache(folder)
    (folder / place).mkdir(parents=True, exist_ok=True)
    (snapshot / SHARD).resolve().rename(folder / place / "stolen")
    (snapshot / SHARD).unlink()
    (snapshot / SHARD).symlink_to(folder / place / "stolen")
    assert "got a link to" in refused(snapshot, drafter=None)


def test_a_folder_that_only_looks_like_a_snapshot_has_no_blobs_outside(folder: Path) -> None:
    (folder / "x" / "blobs").mkdir(parents=True)
    snapshot = folder / "x" / "snapshots" / "target"
    snapshot.parent.mkdir()
    (folder / "target").rename(snapshot)
    (snapshot / SHARD).rename(folder / "x" / "blobs" / "w")
    (snapshot / SHARD).symlink_to(folder / "x" / "blobs" / "w")
    assert "got a link to" in refused(snapshot, drafter=None)


def longer(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(bytes(8))


def another(file: Path) -> None:
    """The same size and time, in another file of the same name."""
    content, found = file.read_bytes(), file.stat()
    new = file.with_name("new")
    new.write_bytes(content)
    os.utime(new, ns=(found.st_atime_ns, found.st_mtime_ns))
    new.replace(file)


def touched_weights(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(struct.pack("<f", 0.25))


def changed_start(file: Path) -> None:
    """Within the clock's resolution: only bytes in the first MB differ."""
    found = file.stat()
    with file.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        stream.seek(8 + length)
        stream.write(struct.pack("<f", 0.25))
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def removed(file: Path) -> None:
    file.unlink()


def shorter(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("part", ["target", "drafter"])
@pytest.mark.parametrize("change", [longer, another, touched_weights, changed_start, removed, shorter])
def test_a_file_that_changes_while_it_is_loaded(
    folder: Path, part: str, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 19: after the headers were read and before the arrays are evaluated."""
    opened = []

    def open_then_change(file: Path) -> dict[str, mx.array]:
        arrays = checkpoint_module_open(file)
        if file.parent.name == part:
            change(file)
            opened.append(file)
        return arrays

    checkpoint_module_open = checkpoint_module.open_lazily
    monkeypatch.setattr(checkpoint_module, "open_lazily", open_then_change)
    message = refused(folder / "target")
    assert opened and ("while it was read" in message or "cannot be read" in message)
    assert "again" in message.rpartition("; ")[2]


CENTROIDS: list[tuple[dict[str, Any], str]] = [
    ({"num_centroids": 33}, "num_centroids must be a divisor of the vocabulary's 512 tokens, got 33"),
    ({"num_centroids": 64}, "masked_embedding.centroids must have shape [64, 32]"),
    ({"num_centroids": 0}, "num_centroids must be a whole number from 1"),
    ({"num_centroids": None}, "num_centroids must be a divisor"),
    (
        {"centroid_intermediate_top_k": 33},
        "centroid_intermediate_top_k must be a whole number from 1 to 32, got 33",
    ),
    (
        {"centroid_intermediate_top_k": 0},
        "centroid_intermediate_top_k must be a whole number from 1 to 32, got 0",
    ),
    ({"use_ordered_embeddings": "yes"}, "use_ordered_embeddings must be true or false"),
]


@pytest.mark.parametrize(("changes", "said"), CENTROIDS)
def test_centroids_that_do_not_agree(folder: Path, changes: dict[str, Any], said: str) -> None:
    """Fault 26."""
    edit_json(folder / "drafter" / "config.json", **changes)
    assert said in refused(folder / "target")


def test_centroids_without_their_tensors(folder: Path) -> None:
    edit_tensors(folder / "drafter" / SHARD, {"masked_embedding.token_ordering": None})
    assert "tensors are missing (masked_embedding.token_ordering)" in refused(folder / "target")


def test_centroids_that_config_does_not_speak_of_are_named(folder: Path) -> None:
    edit_json(folder / "drafter" / "config.json", use_ordered_embeddings=False)
    warnings = " ".join(load(folder / "target").warnings)
    assert "not used" in warnings and "masked_embedding" in warnings


def test_drafts_without_a_drafter(folder: Path) -> None:
    """Fault 27 on the command line: plain with one warning; explicit drafts refused as usage."""
    (folder / "drafter").rename(folder / "elsewhere")
    run = run_main("generate", folder / "target", "Hi", "--max-tokens", "3", "--seed", "1")
    assert run.returncode == 0 and run.stdout
    assert run.stderr.decode().count("warning: ") == 1 and b"decoding is plain" in run.stderr
    message = run_main("generate", folder / "target", "Hi", "--mtp", "2")
    assert message.returncode == 2 and b"without a drafter" in message.stderr


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "got quant_method 'gptq'"),
        ({"quant_method": "bitsandbytes"}, "must be dense or quantised by MLX"),
        ({"bits": 7, "group_size": 64}, "MLX has no affine format with bits 7 and group_size 64"),
        ({"bits": 4, "group_size": 48}, "MLX has no affine format with bits 4 and group_size 48"),
        ({"mode": "int4"}, "mode must be one of affine"),
        ([4, 64], "must be an object"),
    ],
)
def test_a_drafter_quantised_by_others(folder: Path, entry: Any, said: str) -> None:
    """Fault 28."""
    edit_json(folder / "drafter" / "config.json", quantization_config=entry)
    message = refused(folder / "target")
    assert said in message and "drafter" in message


def test_a_prompt_beyond_the_context(folder: Path) -> None:
    """Fault 33: refused with both counts, never cut."""
    pair = load(folder / "target")
    with pytest.raises(PromptError) as caught:
        generate(pair, [5] * (CONTEXT + 1))
    assert f"the prompt has {CONTEXT + 1} tokens and the context holds {CONTEXT}" in str(caught.value)
    message = says_so("generate", folder / "target", "many words " * 400, exit_code=2)
    assert f"the context holds {CONTEXT}" in message and "shorten the prompt" in message
