"""Heat, power and load as Linux tells them in /proc and /sys."""

import os
from pathlib import Path

from mlx_mtp.measure.conditions import Machine

PROC, SYS = Path("/proc"), Path("/sys")
IDLE = (3, 4)  # fields of /proc/stat's first line that are no work: idle, iowait
GUEST = 8  # from here on time is counted a second time


def read(proc: Path = PROC, system: Path = SYS) -> Machine:
    power = parse_power({p.parent.name: p.read_text() for p in system.glob("class/power_supply/*/online")})
    pressure = proc / "pressure/cpu"
    return Machine(
        busy_s=parse_busy((proc / "stat").read_text(), os.sysconf("SC_CLK_TCK")),
        thermal=None,
        throttled=_sum_of(system, "devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count"),
        power=power,
        low_power=None,
        load=float((proc / "loadavg").read_text().split()[0]),
        waited_s=parse_pressure(pressure.read_text()) if pressure.is_file() else None,
        hertz=_mean_of(system, "devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"),
    )


def parse_busy(stat: str, ticks_per_s: int) -> float | None:
    """/proc/stat: processor seconds of user, nice, system, irq, softirq and steal."""
    fields = stat.split("\n", 1)[0].split()
    if len(fields) < 5 or fields[0] != "cpu":
        return None
    ticks = [int(field) for field in fields[1 : GUEST + 1]]
    return sum(t for i, t in enumerate(ticks) if i not in IDLE) / ticks_per_s


def parse_pressure(text: str) -> float | None:
    """/proc/pressure/cpu: seconds in which some program waited (`some .. total=MICROSECONDS`)."""
    for line in text.splitlines():
        if line.startswith("some "):
            return int(line.rpartition("total=")[2]) / 1e6
    return None


def parse_power(online: dict[str, str]) -> str | None:
    """Mains supplies by name and whether they deliver; None where there is none, as in desktops and servers."""
    mains = [value.strip() == "1" for name, value in online.items() if not name.startswith("BAT")]
    return None if not mains else "AC" if any(mains) else "battery"


def _sum_of(system: Path, pattern: str) -> int | None:
    counts = [int(path.read_text()) for path in system.glob(pattern)]
    return sum(counts) if counts else None


def _mean_of(system: Path, pattern: str) -> float | None:
    kilohertz = [int(path.read_text()) for path in system.glob(pattern)]
    return 1e3 * sum(kilohertz) / len(kilohertz) if kilohertz else None
