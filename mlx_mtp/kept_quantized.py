"""Quantised copies kept between runs, each named by what it was made from; a damaged one is made again."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.errors import CheckpointError
from mlx_mtp.headers import INDEX, weight_files
from mlx_mtp.progress import OnProgress, Progress, silent
from mlx_mtp.quantize_files import COPIED, write_json, write_plan
from mlx_mtp.quantize_plan import check_format, make_plan
from mlx_mtp.whole_folder import PARTIAL, building, is_at_work, publish, storage_errors

VERSION = 1  # of the way in which copies are made; raise it when the same source would give other files
RECORD = "mlx-mtp-copy.json"
DAMAGED = ".corrupt"
SAMPLES, SAMPLE_BYTES = 64, 4096
OnWarning = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class KeptCopy:
    """One kept copy: its folder, what it was made from, and how much disk it takes."""

    path: Path
    source: str
    bits: int
    nbytes: int


def quantized_copy(
    folder: Path,
    bits: int,
    *,
    key: str | None = None,
    group_size: int = 64,
    on_progress: OnProgress = silent,
    on_warning: OnWarning | None = None,
    into: Path | None = None,
) -> Path:
    """The kept `bits`-bit copy of a dense checkpoint, made now if there is none; -> its folder.

    key: what the files are for certain ("org/name@commit"): then a kept copy is found without looking at `folder`,
    which may be gone. None: the folder's path and its files' sizes, times and headers, all of which must be the same.
    into: where copies are kept, our cache folder unless given. Two processes make a copy once: the second waits.
    A kept copy that is damaged is set aside as `.corrupt` and made again; `on_warning` is told, else `on_progress`.
    Raises as `quantize_checkpoint`.
    """
    check_format(bits, group_size)
    from mlx_mtp.store import make_folder

    place = copies_folder() if into is None else into
    out = place / copy_name(folder, bits, group_size, key)
    warn = on_warning or (lambda text: on_progress(Progress("quantize", text)))
    if out.is_dir() and damage_of(out) is None:
        return out
    plan = make_plan(folder, bits, group_size)

    def waiting() -> None:
        on_progress(Progress("wait", f"another process is quantising {folder.name}"))

    make_folder(place)
    with building(out, on_wait=waiting) as partial:
        if out.is_dir():
            damage = damage_of(out)
            if damage is None:
                return out  # made by another process meanwhile
            with storage_errors(place):
                warning = set_aside(out, damage)
            warn(warning)
        write_plan(plan, partial, on_progress)
        source = key or str(folder.resolve())
        record = {"version": VERSION, "source": source, "bits": bits, "files": seals(partial)}
        with storage_errors(place):
            write_json(partial / RECORD, record)
        publish(partial, out)
    return out


def kept_copy(key: str, bits: int, *, group_size: int = 64, into: Path | None = None) -> Path | None:
    """The sound kept copy of what `key` names, None where there is none: no download is needed if there is."""
    out = (copies_folder() if into is None else into) / copy_name(None, bits, group_size, key)
    return out if out.is_dir() and damage_of(out) is None else None


def kept_copies(into: Path | None = None) -> tuple[KeptCopy, ...]:
    """All copies that are on disk; bits 0: of no use, because damaged and set aside, or left unfinished."""
    place = copies_folder() if into is None else into
    found = []
    for path in sorted(place.iterdir()) if place.is_dir() else []:
        if path.is_dir() and not (path.name.endswith(PARTIAL) and is_at_work(path)):
            record = read_record(path) or {"source": path.name, "bits": 0}
            bits = 0 if path.name.endswith((DAMAGED, PARTIAL)) else record["bits"]
            nbytes = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
            found.append(KeptCopy(path, record["source"], bits, nbytes))
    return tuple(found)


def is_sound(copy: KeptCopy) -> bool:
    """Whether a listed copy can be used: its samples and small files are as they were when it was made."""
    return copy.bits > 0 and damage_of(copy.path) is None


def remove_copy(copy: KeptCopy) -> int:
    """Remove it from disk; -> bytes freed. Raises StorageError."""
    with storage_errors(copy.path):
        shutil.rmtree(copy.path)
    return copy.nbytes


def copies_folder() -> Path:
    """Where copies are kept unless told otherwise. Raises StorageError where this user has no folders."""
    from mlx_mtp.store import cache_folder

    return cache_folder() / "quantized"


def copy_name(folder: Path | None, bits: int, group_size: int, key: str | None) -> str:
    """Readable at the front, and for certain at the end."""
    if key is not None:
        identity: Any = key
        front = key.rpartition("@")[0] or key
    else:
        assert folder is not None
        identity, front = identity_of(folder), folder.resolve().name
    text = json.dumps([VERSION, identity, bits, group_size])
    slug = re.sub(r"[^A-Za-z0-9]+", "-", front.rpartition("/")[2]).strip("-")[:60] or "model"
    return f"{slug}-{bits}bit-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def identity_of(folder: Path) -> list[Any]:
    """What tells a local folder's content from another's without reading its weights."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder; give the folder that holds config.json")
    weights = weight_files(folder)[0]
    others = [folder / name for name in ("config.json", INDEX, *COPIED)]
    identity: list[Any] = [str(folder.resolve())]
    for file in [*weights, *(file for file in others if file.is_file())]:
        status = file.stat()
        identity.append([file.name, status.st_size, status.st_mtime_ns])
    return identity + [seal_of(file) for file in weights]


def damage_of(out: Path) -> str | None:
    """What is wrong with a kept copy, None where it is as it was when it was made.

    Small files are compared whole, weight files by size, header and evenly spaced samples.
    """
    record = read_record(out)
    if record is None:
        return f"{RECORD} is missing or damaged"
    for name, seal in record["files"].items():
        file = out / name
        try:
            is_same = seal_of(file) == seal
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if not is_same:
            return f"{name} has changed"
    return None


def read_record(out: Path) -> dict[str, Any] | None:
    """The list of what a copy holds, None where it is missing or not as this version writes it."""
    try:
        record = json.loads((out / RECORD).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    types = {"version": int, "source": str, "bits": int, "files": dict}
    if not isinstance(record, dict) or any(
        type(record.get(name)) is not kind for name, kind in types.items()
    ):
        return None
    return record if record["version"] == VERSION and record["files"] else None


def seals(folder: Path) -> dict[str, str]:
    return {file.name: seal_of(file) for file in sorted(folder.iterdir())}


def seal_of(file: Path) -> str:
    """Hash of a file's size and content; of a large one's first megabyte and 64 samples."""
    digest = hashlib.sha256()
    size = file.stat().st_size
    digest.update(str(size).encode())
    with file.open("rb", buffering=0) as stream:
        if file.suffix != ".safetensors":
            while piece := stream.read(1 << 20):
                digest.update(piece)
            return digest.hexdigest()
        digest.update(stream.read(1 << 20))
        for number in range(SAMPLES):
            stream.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def set_aside(out: Path, damage: str) -> str:
    """Move a damaged copy out of the way, in place of an earlier one; -> the warning."""
    aside = out.with_name(out.name + DAMAGED)
    if aside.is_dir():
        shutil.rmtree(aside)
    os.replace(out, aside)
    return f"the kept copy {out.name} is damaged ({damage}) and is made again; it was set aside as {aside}"


__all__ = ["KeptCopy", "is_sound", "kept_copies", "kept_copy", "quantized_copy", "remove_copy"]
