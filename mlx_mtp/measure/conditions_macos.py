"""Heat, power and load as macOS tells anybody without root: three commands' text, and one C call.

Written from Apple's headers and manual pages; the parsers are tested on text in the recorded form, the calls not yet
on a Mac.
"""

import ctypes
import os
import re
import struct

from mlx_mtp.errors import MachineError
from mlx_mtp.machine_macos import run_text
from mlx_mtp.measure.conditions import Machine

# <libkern/OSThermalNotification.h>: OSThermalPressureLevel on macOS.
THERMAL_KEY = "com.apple.system.thermalpressurelevel"
THERMAL = {0: "nominal", 1: "moderate", 2: "heavy", 3: "trapping", 4: "sleeping"}
# <mach/host_info.h>: host_cpu_load_info holds four counts of ticks: user, system, idle, nice.
HOST_CPU_LOAD_INFO, LOAD_COUNT = 3, 4
LOAD_FORMAT = struct.Struct("=4I")
IDLE = 2
POWER = re.compile(r"drawing from '([^']+)'")
LOW_POWER = re.compile(r"^\s*lowpowermode\s+(\d)", re.MULTILINE)
GPU_BUSY = re.compile(r'"Device Utilization %"\s*=\s*(\d+)')


def read() -> Machine:
    return Machine(
        busy_s=busy_seconds(),
        thermal=parse_thermal(_text("/usr/bin/notifyutil", "-g", THERMAL_KEY)),
        throttled=None,
        power=parse_power(_text("/usr/bin/pmset", "-g", "batt")),
        low_power=parse_low_power(_text("/usr/bin/pmset", "-g")),
        load=os.getloadavg()[0],
        waited_s=None,
        hertz=None,
    )


def gpu_busy() -> int | None:
    """Percent of the GPU's time in use now: by others, if this process computes nothing."""
    return parse_gpu_busy(_text("/usr/sbin/ioreg", "-rc", "AGXAccelerator", "-d", "1"))


def _text(*command: str) -> str:
    try:
        return run_text(*command)
    except MachineError:
        return ""  # one that is missing or hangs tells nothing, and nothing is what is then recorded


def parse_thermal(text: str) -> str | None:
    """`notifyutil -g KEY` prints the key and its number."""
    word = text.split()[-1] if text.split() else ""
    return THERMAL.get(int(word), "sleeping") if word.isdecimal() else None


def parse_power(text: str) -> str | None:
    """`pmset -g batt` begins: Now drawing from 'AC Power'."""
    found = POWER.search(text)
    return None if found is None else "AC" if found[1].startswith("AC") else "battery"


def parse_low_power(text: str) -> bool | None:
    """`pmset -g` lists settings, lowpowermode among them on machines that have it."""
    found = LOW_POWER.search(text)
    return None if found is None else found[1] != "0"


def parse_gpu_busy(text: str) -> int | None:
    found = GPU_BUSY.search(text)
    return None if found is None else int(found[1])


def busy_seconds() -> float | None:
    """Processor seconds of all programs since start; None where the kernel does not say."""
    library = ctypes.CDLL("/usr/lib/libSystem.B.dylib", use_errno=True)
    library.mach_host_self.restype = ctypes.c_uint
    buffer = ctypes.create_string_buffer(LOAD_FORMAT.size)
    count = ctypes.c_uint(LOAD_COUNT)
    host = ctypes.c_uint(library.mach_host_self())
    if library.host_statistics(host, HOST_CPU_LOAD_INFO, buffer, ctypes.byref(count)) != 0:
        return None
    return parse_ticks(buffer.raw, os.sysconf("SC_CLK_TCK"))


def parse_ticks(raw: bytes, ticks_per_s: int) -> float:
    ticks = LOAD_FORMAT.unpack(raw)
    return (sum(ticks) - ticks[IDLE]) / ticks_per_s
