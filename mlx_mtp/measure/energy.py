"""Joules, where a system lets anybody read them: Linux's counters, a MacBook's own meter; elsewhere the reason why not.

macOS gives the chip's energy to root alone (`powermetrics`); without root a MacBook tells what the whole machine draws.
"""

import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mlx_mtp.errors import MachineError

RAPL = Path("/sys/class/powercap")
SYSTEM_LOAD = re.compile(r'"SystemLoad"\s*=\s*(\d+)')
LARGEST_MW = 1_000_000
SHORTEST_S = (
    20.0  # a MacBook's meter is renewed every few seconds: shorter samples have no figure of their own
)


@dataclass(frozen=True, slots=True)
class Reading:
    """Joules counted so far, or watts drawn now; `at` in seconds."""

    joules: float | None
    watts: float | None
    at: float
    wraps_at: float | None = None


class Meter(NamedTuple):
    """How energy is read here: of what, by what; `read` is None where it cannot be, and `scope` says why."""

    scope: str
    read: Callable[[], Reading] | None


def find_meter(system: str | None = None, rapl: Path = RAPL) -> Meter:
    """The meter of this machine."""
    if (system or platform.system()) == "Darwin":
        return _mac_meter()
    domains = sorted(rapl.glob("intel-rapl:[0-9]*"))
    packages = [path for path in domains if path.name.count(":") == 1 and (path / "energy_uj").is_file()]
    if not packages:
        return Meter("not readable: this machine has no energy counters (powercap)", None)
    try:
        _read_rapl(packages)
    except OSError:
        return Meter("not readable without root: the energy counters are root's", None)
    return Meter("processor packages (powercap)", lambda: _read_rapl(packages))


def joules_between(before: Reading, after: Reading) -> float | None:
    """Joules from one reading to the other; None where they do not say, or the meter is too slow for so short a run."""
    seconds = after.at - before.at
    if before.joules is not None and after.joules is not None:
        used = after.joules - before.joules
        return used + after.wraps_at if used < 0 and after.wraps_at is not None else used
    if before.watts is None or after.watts is None or seconds < SHORTEST_S:
        return None
    return (before.watts + after.watts) / 2 * seconds


def _read_rapl(packages: list[Path]) -> Reading:
    joules = sum(int((path / "energy_uj").read_text()) for path in packages) / 1e6
    wraps = sum(int((path / "max_energy_range_uj").read_text()) for path in packages) / 1e6
    return Reading(joules, None, time.perf_counter(), wraps if len(packages) == 1 else None)


def _mac_meter() -> Meter:
    if _mac_watts() is None:
        return Meter(
            "not readable without root: this Mac has no battery's meter to ask (powermetrics is root's)", None
        )
    return Meter(
        f"the whole machine as its battery's meter sees it; samples of {SHORTEST_S:.0f} s and more",
        lambda: Reading(None, _mac_watts(), time.perf_counter()),
    )


def _mac_watts() -> float | None:
    from mlx_mtp.machine_macos import run_text

    try:
        return parse_battery(run_text("/usr/sbin/ioreg", "-rn", "AppleSmartBattery", "-w0"))
    except MachineError:
        return None


def parse_battery(text: str) -> float | None:
    """`ioreg -rn AppleSmartBattery`: PowerTelemetryData holds SystemLoad in milliwatts -> watts."""
    found = SYSTEM_LOAD.search(text)
    if found is None or not 0 < int(found[1]) < LARGEST_MW:
        return None
    return int(found[1]) / 1000
