"""What macOS says about chip, memory and pressure: its own commands' text, and two C calls.

Written from Apple's headers and manual pages; the parsers are tested on text in the recorded form.
"""

import ctypes
import os
import re
import struct
import subprocess
from typing import Any, NamedTuple

from mlx_mtp.errors import MachineError

FACTS = ("hw.memsize", "machdep.cpu.brand_string", "kern.hv_vmm_present", "sysctl.proc_translated")
GPU_CORES = re.compile(r'"gpu-core-count"\s*=\s*(\d+)')
PAGE_SIZE = re.compile(r"page size of (\d+) bytes")
PRESSURE_NAME = b"kern.memorystatus_vm_pressure_level"
LEVELS = {1: "normal", 2: "warning", 4: "critical"}  # <sys/event.h>: NOTE_MEMORYSTATUS_PRESSURE_*
RUSAGE_INFO_V0 = 0
# <sys/resource.h>, struct rusage_info_v0: a 16-byte id, then ten 64-bit numbers.
RUSAGE_FORMAT = struct.Struct("=16s10Q")
PHYS_FOOTPRINT = 8  # user, system, idle and interrupt wakeups, page-ins, wired, resident, footprint


class MacFacts(NamedTuple):
    """What `sysctl` and `ioreg` tell once."""

    chip: str
    gpu_cores: int | None
    memory_bytes: int
    is_translated: bool
    is_virtual: bool


def run_text(*command: str) -> str:
    """What a system command prints; a nonzero exit is fine, since sysctl has one for any name it does not know."""
    try:
        # close_fds=False lets Python use posix_spawn: a fork of a process with a loaded model would be slow.
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=10, close_fds=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise unreadable(command[0], str(error)) from None
    return done.stdout


def unreadable(command: str, got: str) -> MachineError:
    return MachineError(
        f"{command} must say what this Mac has, got {got[:200]!r}; run it by hand to see why, and report it"
    )


def read_facts() -> MacFacts:
    return parse_facts(
        run_text("/usr/sbin/sysctl", *FACTS), run_text("/usr/sbin/ioreg", "-rc", "AGXAccelerator", "-d", "1")
    )


def parse_facts(sysctl: str, ioreg: str) -> MacFacts:
    """`sysctl NAME ..` prints `name: value` for those it knows; `ioreg` prints the GPU's properties."""
    values = dict(line.split(": ", 1) for line in sysctl.splitlines() if ": " in line)
    cores = GPU_CORES.search(ioreg)
    if not values.get("hw.memsize", "").strip().isdecimal():
        raise unreadable("sysctl hw.memsize", sysctl)
    return MacFacts(
        chip=values.get("machdep.cpu.brand_string", "unknown processor").strip(),
        gpu_cores=int(cores[1]) if cores else None,
        memory_bytes=int(values["hw.memsize"]),
        is_translated=values.get("sysctl.proc_translated", "0").strip() == "1",
        is_virtual=values.get("kern.hv_vmm_present", "0").strip() == "1",
    )


def metal_budget() -> int | None:
    """Metal's recommended working set in bytes; None where MLX has no Metal device."""
    import mlx.core as mx

    if not mx.metal.is_available():
        return None
    info: dict[str, Any] = mx.device_info(mx.Device(mx.gpu))
    return int(info["max_recommended_working_set_size"])


def free_memory() -> int:
    return parse_vm_stat(run_text("/usr/bin/vm_stat"))


def parse_vm_stat(text: str) -> int:
    """Bytes that can be taken without compressing or swapping: free pages, file cache and purgeable memory.

    It is what Activity Monitor does not count as used. "File-backed pages" hold the speculative ones too.
    """
    size = PAGE_SIZE.search(text)
    pages = {
        name.strip().strip('"'): int(value.strip().rstrip("."))
        for name, _, value in (line.partition(":") for line in text.splitlines()[1:])
        if value.strip().rstrip(".").isdecimal()
    }
    names = ("Pages free", "File-backed pages", "Pages purgeable")
    if size is None or not pages.keys() >= set(names):
        raise unreadable("vm_stat", text)
    return sum(pages[name] for name in names) * int(size[1])


def footprint() -> int:
    """This process's phys_footprint, which is what Activity Monitor shows and jetsam counts."""
    library = ctypes.CDLL("/usr/lib/libSystem.B.dylib", use_errno=True)
    buffer = ctypes.create_string_buffer(RUSAGE_FORMAT.size)
    if library.proc_pid_rusage(os.getpid(), RUSAGE_INFO_V0, buffer) != 0:
        raise OSError(ctypes.get_errno(), "proc_pid_rusage")
    return parse_rusage(buffer.raw)


def parse_rusage(raw: bytes) -> int:
    return int(RUSAGE_FORMAT.unpack(raw)[PHYS_FOOTPRINT])


def pressure() -> str:
    library = ctypes.CDLL("/usr/lib/libSystem.B.dylib", use_errno=True)
    level, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    if library.sysctlbyname(PRESSURE_NAME, ctypes.byref(level), ctypes.byref(size), None, 0) != 0:
        raise OSError(ctypes.get_errno(), "kern.memorystatus_vm_pressure_level")
    return level_of(level.value)


def level_of(value: int) -> str:
    """The kernel's number -> our word; an unknown number counts as the next worse one."""
    return next((word for number, word in LEVELS.items() if value <= number), "critical")
