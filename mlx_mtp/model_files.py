"""The files of a model's folder: which may be read, how large they may be, and whether they changed meanwhile."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.errors import CheckpointError

LARGEST_JSON = 16 << 20  # bytes of a configuration, an index or a template; published ones stay below 1 MB
LARGEST_TOKENIZER = 256 << 20  # Gemma's tokenizer.json has 33 MB
COMPARED_BYTES = 1 << 20  # of a weight file's start, which holds its header
REPO_FOLDER = re.compile(r"models--.+")
DOWNLOAD = "download the model again"


@dataclass(frozen=True, slots=True)
class Seen:
    """A weight file as it was when its header was read; `start` is the hash of its first MB."""

    file: Path
    size: int
    changed_ns: int
    identity: tuple[int, int]  # device and inode: another file may have been put in its place
    start: bytes


def own_file(folder: Path, name: str) -> Path | None:
    """The file `name` of a model's folder, None where there is none.

    A link may lead to another place in the folder, and in the Hugging Face cache to its blobs. Anything else, such as
    a key file, a device or a pipe that a downloaded archive's link names, is refused with CheckpointError.
    """
    path = folder / name
    try:
        place = path.resolve(strict=True)
        if not any(place.is_relative_to(allowed) for allowed in allowed_folders(folder)):
            raise CheckpointError(
                f"{path}: a model's files must lie in its folder, got a link to {place}; "
                "put the file itself there, or give the folder that it lies in"
            )
        if not place.is_file():
            raise CheckpointError(f"{path}: must be a regular file; {DOWNLOAD}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, names that no file can have
        raise CheckpointError(f"{path}: cannot be read ({str(error)[:120]}); {DOWNLOAD}") from None
    return path


def allowed_folders(folder: Path) -> tuple[Path, ...]:
    """Where the files of a model in `folder` may really lie.

    The cache has <cache>/models--org--name/snapshots/<commit>/file -> ../../blobs/<hash>, and since huggingface_hub 2
    that may be a link to <cache>/blobs, which repositories share.
    """
    inside = folder.resolve()
    repo = inside.parent.parent
    if inside.parent.name == "snapshots" and REPO_FOLDER.fullmatch(repo.name):
        return (inside, (repo / "blobs").resolve(), repo.parent / "blobs")
    return (inside,)


def read_json(path: Path, *, largest: int = LARGEST_JSON) -> Any:
    """The content of a JSON file of a model; refuses one that is missing, too large or not JSON."""
    try:
        return json.loads(read_bytes(path, largest=largest))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({str(error)[:80]}); {DOWNLOAD}") from None


def read_text(path: Path) -> str:
    """The content of a text file of a model; refuses one that is missing, too large or not UTF-8."""
    try:
        return read_bytes(path, largest=LARGEST_JSON).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; {DOWNLOAD}") from None


def read_bytes(path: Path, *, largest: int) -> bytes:
    """The content of a file of a model, at most `largest` bytes."""
    if own_file(path.parent, path.name) is None:
        raise CheckpointError(f"{path.parent}: {path.name} is missing; {DOWNLOAD}")
    try:
        with path.open("rb") as stream:
            content = stream.read(largest + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({str(error)[:120]}); {DOWNLOAD}") from None
    if len(content) > largest:
        raise CheckpointError(f"{path}: must be at most {largest >> 20} MB, and is larger; {DOWNLOAD}")
    return content


def see(file: Path) -> Seen:
    """What tells this state of a weight file from a later one, before its header is read."""
    try:
        found = file.stat()
        with file.open("rb") as stream:
            start = hashlib.sha256(stream.read(COMPARED_BYTES)).digest()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({str(error)[:120]}); {DOWNLOAD}") from None
    return Seen(file, found.st_size, found.st_mtime_ns, (found.st_dev, found.st_ino), start)


def check_unchanged(files: Iterable[Seen]) -> None:
    """Refuse weights whose file changed since it was seen: what was read may be half old and half new.

    Called when every array is evaluated. A change that keeps size, time, place and first MB goes unnoticed.
    """
    for seen in files:
        if see(seen.file) != seen:
            raise CheckpointError(
                f"{seen.file}: changed while it was read; wait until nothing writes to it and load the model again"
            )
