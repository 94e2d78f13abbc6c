"""What self-tests and races found, kept between runs: by chip, system, MLX version and the kernels' source.

A file for each of these places; in it an entry for each operation. Nothing here is needed to run a model.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlx_mtp.errors import KernelError, StorageError
from mlx_mtp.kernels.chooser import Verdict
from mlx_mtp.kernels.judge import is_clear, judge
from mlx_mtp.kernels.operations import Operation
from mlx_mtp.kernels.race import Raced, Time
from mlx_mtp.kernels.self_test import Checked
from mlx_mtp.kernels.source import FOLDERS
from mlx_mtp.machine import Machine
from mlx_mtp.store import KERNEL_RESULTS, cache_folder, read_json_file, write_json_file
from mlx_mtp.versions import find_versions

SOURCES = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Place:
    """What a verdict holds for: it is found anew wherever one of these differs."""

    chip: str
    gpu_cores: int | None
    system: str  # its compiler makes the machine code
    mlx: str
    source: str  # hash of the kernels and of what launches and tests them


@dataclass(frozen=True, slots=True)
class Outcome:
    """One operation's self-test and race; `raced` None where the kernel failed or was not timed."""

    operation: Operation
    tested: Checked
    raced: Raced | None = None

    @property
    def is_settled(self) -> bool:
        """Whether there is nothing to find out again."""
        return not self.tested.passed or (self.raced is not None and is_clear(self.raced))


Outcomes = Mapping[Operation, Outcome]


class Known(NamedTuple):
    """Outcomes that were kept, and what is wrong with the file, None where nothing is."""

    outcomes: dict[Operation, Outcome]
    warning: str | None


def place_of(machine: Machine) -> Place:
    """Where this process would run kernels."""
    (mlx,) = find_versions(("mlx",))
    system = f"{machine.system} {machine.os_version}"
    return Place(machine.chip, machine.gpu_cores, system, mlx.version or "unknown", source_hash())


def source_hash(folders: Iterable[Path] = (SOURCES, *FOLDERS)) -> str:
    """Of every .metal file and every module of this package, by name."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((*folder.glob("*.metal"), *folder.glob("*.py"))):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def read_outcomes(place: Place) -> Known:
    """What is known of `place`; a damaged file is set aside, an entry that cannot be read is left out and said."""
    try:
        path = _path(place)
    except StorageError:
        return Known({}, None)
    value, warning = read_json_file(path, key=asdict(place))
    outcomes, unread = {}, 0
    for entry in value if isinstance(value, list) else []:
        try:
            outcome = _outcome(entry)
        except (KeyError, TypeError, ValueError, AttributeError):
            unread += 1
        else:
            outcomes[outcome.operation] = outcome
    if unread or not isinstance(value, list | None):
        warning = f"{path}: some kernels' results cannot be read and are not used"
    return Known(outcomes, warning)


def write_outcomes(place: Place, outcomes: Outcomes) -> str | None:
    """Add to what is known of `place`; -> a warning where that cannot be kept."""
    known = {**read_outcomes(place).outcomes, **outcomes}
    try:
        return write_json_file(_path(place), [_entry(own) for own in known.values()], key=asdict(place))
    except StorageError as error:
        return f"not kept for the next run: {error}"


def verdicts_of(outcomes: Outcomes, *, exact: bool = False) -> dict[Operation, Verdict]:
    """What the chooser takes."""
    return {operation: judge(own.tested, own.raced, exact=exact) for operation, own in outcomes.items()}


def known_verdicts(machine: Machine, *, exact: bool = False) -> dict[Operation, Verdict]:
    """Verdicts kept for this machine as it is now; {} where there are none, or the kernels' files cannot be read."""
    try:
        return verdicts_of(read_outcomes(place_of(machine)).outcomes, exact=exact)
    except (KernelError, OSError):
        return {}


def _path(place: Place) -> Path:
    name = hashlib.sha256(repr(asdict(place)).encode()).hexdigest()[:16]
    return cache_folder() / KERNEL_RESULTS / f"{name}.json"


def _entry(outcome: Outcome) -> dict[str, Any]:
    raced = outcome.raced
    return {
        "operation": asdict(outcome.operation),
        "tested": tested_entry(outcome.tested),
        "raced": None if raced is None else raced_entry(raced),
    }


def _outcome(entry: dict[str, Any]) -> Outcome:
    """The entry read back; KeyError, TypeError, ValueError or AttributeError where it is none."""
    own = entry["operation"]
    operation = Operation(str(own["name"]), tuple(int(size) for size in own["shape"]), str(own["format"]))
    raced = entry["raced"]
    return Outcome(operation, read_tested(entry["tested"]), None if raced is None else read_raced(raced))


def tested_entry(tested: Checked) -> dict[str, Any]:
    return {"bodies": list(tested.bodies), "reason": tested.reason, "are_equal": tested.are_equal}


def read_tested(entry: dict[str, Any]) -> Checked:
    bodies = tuple(str(body) for body in entry["bodies"])
    if not set(bodies) <= {"scalar", "matrix"}:
        raise ValueError(bodies)
    return Checked(bodies, str(entry["reason"])[:300], entry["are_equal"] is True)


def raced_entry(raced: Raced) -> dict[str, Any]:
    """Microseconds and scatter, by rows and arm."""
    return {str(rows): {arm: list(time) for arm, time in own.items()} for rows, own in raced.times.items()}


def read_raced(entry: dict[str, Any]) -> Raced:
    times = {int(rows): {arm: _time(*time) for arm, time in own.items()} for rows, own in entry.items()}
    if not times or not all("stock" in own and len(own) > 1 for own in times.values()):
        raise ValueError("no times of stock operations beside ours")
    return Raced(times)


def _time(median: float, scatter: float) -> Time:
    if not 0 < median < 1e9 or not 0 <= scatter < 1e9:
        raise ValueError((median, scatter))
    return Time(float(median), float(scatter))
