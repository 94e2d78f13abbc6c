"""Times of a pair's rounds kept between runs: by chip, MLX version, checkpoint, quantisation and kernels.

A profile saves the first tries of the next run, no more: one that cannot be used is set aside, and nothing is lost.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_mtp.errors import CheckpointError, ParameterError, StorageError
from mlx_mtp.headers import weight_files
from mlx_mtp.kept_quantized import seal_of
from mlx_mtp.kernels.operations import format_of
from mlx_mtp.machine import Machine, this_machine
from mlx_mtp.round_times import RoundTimes
from mlx_mtp.store import PROFILES, data_folder, read_json_file, write_json_file
from mlx_mtp.versions import find_versions

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair

SCHEMA = "mlx-mtp profile 1"
LARGEST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """What times hold for: they are found anew wherever one of these differs."""

    chip: str
    gpu_cores: int | None
    mlx: str
    checkpoint: str  # hash of the target's and the drafter's weight files
    quantisation: str  # of the target, then of the drafter
    kernels: str  # hash of which operations are ours

    @property
    def file_name(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{digest[:24]}.json"


class Found(NamedTuple):
    """Whether kept times were taken over, and what is wrong with the file, None where nothing is."""

    is_known: bool
    warning: str | None


def key_of(pair: "Pair", machine: Machine | None = None) -> ProfileKey:
    """The place of a pair's profile; a second for large checkpoints, of which samples are read."""
    machine = machine or this_machine()
    (mlx,) = find_versions(("mlx",))
    seals = [
        seal_of(file)
        for folder in (pair.folder, pair.drafter_folder)
        if folder is not None
        for file in weight_files(folder)[0]
    ]
    ours = sorted(str(row.operation) for row in pair.kernel_table if row.by == "ours")
    formats = [format_of(pair.target.embedding)]
    formats += [] if pair.drafter is None else [format_of(pair.drafter.embedding)]
    return ProfileKey(
        chip=machine.chip,
        gpu_cores=machine.gpu_cores,
        mlx=mlx.version or "unknown",
        checkpoint=_hash(seals),
        quantisation=", ".join([*formats, str(pair.target.dtype).rpartition(".")[2]]),
        kernels=_hash(ours) if ours else "stock",
    )


def restore(times: RoundTimes, key: ProfileKey) -> Found:
    """Start from what was kept under `key`; a file that is damaged or another's is set aside, with a warning."""
    try:
        path = profile_path(key)
    except StorageError:
        return Found(False, None)
    kept, warning = read_json_file(path, key=asdict(key))
    if warning is not None and path.exists():
        return Found(False, _set_aside(path, "was written for something else"))
    if kept is None:
        return Found(False, warning)
    try:
        times.learn(kept)
    except ValueError as error:
        return Found(False, _set_aside(path, str(error)))
    return Found(times.is_known(), None)


def save(times: RoundTimes, key: ProfileKey) -> str | None:
    """Keep what is known for the next run, if anything is; -> a warning where that failed."""
    if not times.is_known() and not times.distinct:
        return None
    try:
        return write_json_file(profile_path(key), times.to_json(), key=asdict(key))
    except StorageError as error:
        return str(error)


@contextmanager
def kept_times(pair: "Pair") -> Iterator[str | None]:
    """Inside, times of rounds that earlier runs kept are known; afterwards those of this run are kept -> a warning.

    On the thread that plays the pair's rounds. Nothing is known or kept of a pair without a drafter, which has one kind
    of round, or without files.
    """
    if pair.drafter is None or pair.folder is None:
        yield None
        return
    try:
        key = key_of(pair)
    except (CheckpointError, OSError):  # its files are gone, and with them what the times would be kept for
        yield None
        return
    warning = restore(pair.rounds.times, key).warning
    try:
        yield warning
    finally:
        save(pair.rounds.times, key)  # a folder that cannot be written costs the next run a few tries


def export(times: RoundTimes, key: ProfileKey) -> str:
    """A profile as JSON, to be shared."""
    return json.dumps({"schema": SCHEMA, "key": asdict(key), "times": times.to_json()}, indent=2) + "\n"


def import_profile(text: str | bytes, times: RoundTimes, key: ProfileKey) -> None:
    """Start from an exported profile. Raises ParameterError where it is none, or was made for something else."""
    remedy = "give a file that `mlx-mtp tune --export` wrote for the same model on the same chip"
    if len(text) > LARGEST_BYTES:
        raise ParameterError(
            f"a profile has at most {LARGEST_BYTES >> 20} MB, got {len(text)} bytes; {remedy}"
        )
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise ParameterError(f"a profile is a JSON file, got something else; {remedy}") from None
    if not isinstance(content, dict) or set(content) != {"schema", "key", "times"}:
        raise ParameterError(f"a profile has the fields schema, key and times; {remedy}")
    if content["schema"] != SCHEMA:
        raise ParameterError(f'the schema must be "{SCHEMA}", got {str(content["schema"])[:40]!r}; {remedy}')
    theirs: Any = content["key"]
    ours = asdict(key)
    if theirs != ours:
        raise ParameterError(f"the profile was made for another {_difference(theirs, ours)}; {remedy}")
    try:
        times.learn(content["times"])
    except ValueError as error:
        raise ParameterError(f"the profile's times cannot be used: {error}; {remedy}") from None


def _difference(theirs: Any, ours: dict[str, Any]) -> str:
    """The parts of a key that differ, with what they are there and here."""
    if not isinstance(theirs, dict):
        return "place"
    differ = [
        f"{name} ({str(theirs.get(name))[:40]}, here {str(mine)[:40]})"
        for name, mine in ours.items()
        if theirs.get(name) != mine
    ]
    return ", ".join(differ) or "version of this program"


def profile_path(key: ProfileKey) -> Path:
    """Where it is kept. Raises StorageError where this user has no folders."""
    return data_folder() / PROFILES / key.file_name


def _set_aside(path: Path, why: str) -> str:
    aside = path.with_name(path.name + ".corrupt")
    try:
        os.replace(path, aside)
    except OSError as error:
        return f"{path}: {why}; not used, and cannot be moved ({error.strerror})"
    return f"{path}: {why}; not used, and kept aside as {aside.name}"


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
