"""What else the machine did while a sample was taken: heat, power, other programs, sleep.

A sample that met other conditions is kept and marked, and counts for nothing.
"""

import os
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

# Processors that other programs may keep busy on average: a system's own daemons stay below.
OTHERS_SHARE, OTHERS_AT_LEAST = 0.05, 0.25
SLEPT_S = 1.0  # by which the wall clock may run ahead of the one that stops in sleep

THROTTLED, LOADED, SLEPT, POWER = "throttled", "loaded", "slept", "power changed"


@dataclass(frozen=True, slots=True)
class Machine:
    """What the system says at one moment; None where it does not say."""

    busy_s: float | None  # processor seconds of all programs since it started
    thermal: str | None  # "nominal", or a worse word
    throttled: int | None  # times that the processor was slowed because of heat since it started
    power: str | None  # "AC", "battery"
    low_power: bool | None
    load: float  # average number of programs that want to run, of the last minute
    waited_s: float | None  # seconds since start in which some program waited for a processor (Linux)
    hertz: float | None  # of the processors, on average, where they say (Linux)


@dataclass(frozen=True, slots=True)
class Moment:
    """One look: the machine, this process's processor seconds, and three clocks' readings."""

    machine: Machine
    own_s: float
    steady: float
    wall: float


@dataclass(frozen=True, slots=True)
class Observed:
    """What was between two looks; `others` in processors busy with other programs."""

    others: float | None
    load: float
    thermal: str | None
    power: str | None
    low_power: bool | None
    waited_share: float | None
    gigahertz: float | None
    marks: tuple[str, ...]


def read_machine() -> Machine:
    """Ask this system; tens of milliseconds on macOS, so never while a sample runs."""
    if platform.system() == "Darwin":
        from mlx_mtp.measure.conditions_macos import read
    else:
        from mlx_mtp.measure.conditions_linux import read
    return read()


def look(read: Callable[[], Machine] = read_machine) -> Moment:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Moment(read(), usage.ru_utime + usage.ru_stime, time.perf_counter(), time.time())


def between(before: Moment, after: Moment, processors: int | None = None) -> Observed:
    """What happened between two looks, and how a sample taken there has to be marked."""
    seconds = max(after.steady - before.steady, 1e-6)
    first, last = before.machine, after.machine
    others = waited = None
    if first.busy_s is not None and last.busy_s is not None:
        others = max(0.0, last.busy_s - first.busy_s - (after.own_s - before.own_s)) / seconds
    if first.waited_s is not None and last.waited_s is not None:
        waited = (last.waited_s - first.waited_s) / seconds
    marks = []
    heat = {moment.thermal for moment in (first, last)} - {None, "nominal"}
    if heat or (
        first.throttled is not None and last.throttled is not None and last.throttled > first.throttled
    ):
        marks.append(THROTTLED)
    if others is not None and others > most_by_others(processors or os.cpu_count() or 1):
        marks.append(LOADED)
    if (after.wall - before.wall) - (after.steady - before.steady) > SLEPT_S:
        marks.append(SLEPT)
    if first.power != last.power or first.low_power != last.low_power:
        marks.append(POWER)
    return Observed(
        others=others,
        load=last.load,
        thermal=max(heat, default=last.thermal, key=str),
        power=last.power,
        low_power=last.low_power,
        waited_share=waited,
        gigahertz=None if last.hertz is None else last.hertz / 1e9,
        marks=tuple(marks),
    )


def most_by_others(processors: int) -> float:
    """Processors that other programs may use before a sample is called loaded."""
    return max(OTHERS_AT_LEAST, OTHERS_SHARE * processors)
