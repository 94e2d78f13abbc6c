"""Our own files under the platform's folders: written whole or not at all, readable by their owner alone.

Nothing here is needed to run a model, so nothing here ends one: a file that cannot be used is set aside, a folder
that cannot be written is spoken of once, and the program goes on.
"""

import errno
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs

from mlx_mtp.errors import StorageError

APP = "mlx-mtp"
VERSION = 1  # of the envelope below and of every record in it
LARGEST_BYTES = 256 << 20  # a long saved conversation has a few MB
LAST_MODEL = "last-model.json"
KERNEL_RESULTS = "kernel-results"
PROFILES = "profiles"
MEANING = {
    "bench": "runs of mlx-mtp bench, to resume and to compare",
    KERNEL_RESULTS: "which Metal kernels passed and won on this chip, found again when removed",
    LAST_MODEL: "the model used last",
    PROFILES: "how long rounds take with each model here, found again when removed",
    "chat-history": "lines typed into chat; mlx-mtp chat --no-history keeps none",
    "conversations": "conversations, for /resume",
    "quantized": "quantised copies of models, made again when removed",
}

_spoken_of: set[str] = set()  # folders whose trouble was reported already


class Record(NamedTuple):
    """What a file held, None where nothing usable; `warning` says why, None where there is nothing to say."""

    value: Any
    warning: str | None


@dataclass(frozen=True, slots=True)
class Kept:
    """One thing that this program keeps: where, how many bytes on disk, what it is."""

    path: Path
    bytes: int
    what: str


def data_folder() -> Path:
    """Where records are kept; not made here. Raises StorageError where this user has no home folder."""
    return _own_folder(platformdirs.user_data_path)


def cache_folder() -> Path:
    """Where what can be made again is kept; as `data_folder`."""
    return _own_folder(platformdirs.user_cache_path)


def _own_folder(find: Callable[..., Path]) -> Path:
    try:
        path = find(APP, appauthor=False)
    except (
        RuntimeError
    ):  # what platformdirs raises where "~" is no folder; its older versions leave "~" as it is
        path = Path("~")
    if not path.is_absolute():
        raise StorageError(
            "this user has no home folder, so nothing can be kept between runs; set HOME to a folder"
        )
    return path


def make_folder(folder: Path) -> Path:
    """Make `folder` and those above it, the new ones for their owner alone. Raises StorageError."""
    try:
        for path in (*reversed(folder.parents), folder):
            if not path.exists():
                path.mkdir(mode=0o700, exist_ok=True)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made ({_reason(error)}); {_remedy(error)}") from None
    return folder


def read_json_file(path: Path, *, key: object = None) -> Record:
    """The value that `write_json_file` put there, and a warning where there is one that cannot be used.

    A file that is damaged, of another version or not ours is moved aside as `.corrupt`. One written under another
    `key` (any JSON value: a model, its files' hashes) is left and not used.
    """
    try:
        if not path.is_file():
            return Record(None, None)
        if path.stat().st_size > LARGEST_BYTES:
            return _set_aside(path, f"larger than {LARGEST_BYTES >> 20} MB")
        content = json.loads(path.read_bytes())
    except OSError as error:
        return Record(None, _once(path.parent, f"{path}: cannot be read ({_reason(error)}) and is not used"))
    except (ValueError, RecursionError):
        return _set_aside(path, "not JSON, or cut short")
    if not isinstance(content, dict) or set(content) != {"mlx_mtp", "key", "value"}:
        return _set_aside(path, "not a file of this program")
    if content["mlx_mtp"] != VERSION or isinstance(content["mlx_mtp"], bool):
        return _set_aside(path, f"of another version, {str(content['mlx_mtp'])[:20]}")
    if content["key"] != _as_json(key):
        return Record(None, f"{path}: was written for something else and is not used")
    return Record(content["value"], None)


def write_json_file(path: Path, value: Any, *, key: object = None) -> str | None:
    """Put `value` there for `read_json_file` with the same `key`, in one step; -> a warning where that failed.

    A warning about the same folder is given once. What was there stays until the new file is complete on disk.
    """
    text = json.dumps({"mlx_mtp": VERSION, "key": key, "value": value}, allow_nan=False)
    try:
        write_bytes(path, text.encode())
    except StorageError as error:
        return _once(path.parent, f"not kept for the next run: {error}")
    return None


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data` in one step, readable by its owner alone. Raises StorageError."""
    make_folder(path.parent)
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # made with 0600
        with open(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({_reason(error)}); {_remedy(error)}") from None
    finally:
        if temporary is not None:
            with suppress(OSError):  # gone already where all went well
                os.unlink(temporary)


def sync_folder(folder: Path) -> None:
    """Put the names in `folder` on disk, so that a renamed file survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remember_model(name: str) -> str | None:
    """Keep the name under which a model was opened; -> a warning where it cannot be kept."""
    try:
        return write_json_file(data_folder() / LAST_MODEL, name)
    except StorageError as error:
        return _once(Path("~"), str(error))


def last_model() -> Record:
    """The name of the model used last, value None where none is known, and a warning as `read_json_file` has it."""
    try:
        path = data_folder() / LAST_MODEL
    except StorageError:
        return Record(None, None)
    name, warning = read_json_file(path)
    if name is not None and not (isinstance(name, str) and 0 < len(name) < 1000):
        return _set_aside(path, "not the name of a model")
    return Record(name, warning)


def everything_kept() -> list[Kept]:
    """All that lies in our folders, one entry per file or folder at their top; [] where there is none."""
    kept = []
    for folder in (data_folder, cache_folder):
        try:
            entries = sorted(folder().iterdir())
        except (OSError, StorageError):
            continue
        kept += [Kept(path, size_of(path), _meaning(path.name)) for path in entries]
    return kept


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; links count as themselves, unreadable ones not at all."""
    try:
        if path.is_dir() and not path.is_symlink():
            return sum(size_of(entry) for entry in path.iterdir())
        return path.lstat().st_size
    except OSError:
        return 0


def _meaning(name: str) -> str:
    if name.endswith(".corrupt"):
        return "a damaged file, kept aside; remove it at will"
    return MEANING.get(name, "unknown")


def _set_aside(path: Path, why: str) -> Record:
    """Move a file out of the way, so that it is neither used nor lost."""
    aside = path.with_name(path.name + ".corrupt")
    try:
        os.replace(path, aside)
    except OSError as error:
        return Record(
            None, _once(path.parent, f"{path}: {why}; not used, and cannot be moved ({_reason(error)})")
        )
    return Record(None, f"{path}: {why}; not used, and kept aside as {aside.name}")


def _once(folder: Path, warning: str) -> str | None:
    if str(folder) in _spoken_of:
        return None
    _spoken_of.add(str(folder))
    return warning


def _as_json(value: object) -> Any:
    """`value` as it comes back from a file: tuples are lists, keys are text."""
    return json.loads(json.dumps(value, allow_nan=False))


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some disk space"
    return "make its folder writable"
