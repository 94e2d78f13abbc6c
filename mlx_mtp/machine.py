"""What this machine is and how much of its memory is free: the only place that asks the system.

What macOS and Linux say is read in `machine_macos` and `machine_linux`; everything else takes a `Machine`.
"""

import json
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from mlx_mtp.config_fields import is_integer, shown
from mlx_mtp.errors import MachineError

Pressure = Literal["normal", "warning", "critical"]

MACOS, LINUX = "Darwin", "Linux"
CHIP_GENERATION = re.compile(r"Apple M(\d+)\b")


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine; sizes in bytes, `gpu_budget_bytes` is Metal's recommended working set and None without Metal."""

    system: str  # "Darwin" or "Linux"
    arch: str  # of the running Python: "arm64", "x86_64", "aarch64"
    os_version: str
    chip: str  # "Apple M2 Pro"
    gpu_cores: int | None
    memory_bytes: int
    gpu_budget_bytes: int | None
    has_metal: bool
    is_translated: bool  # an x86 Python under Rosetta
    is_virtual: bool

    @property
    def generation(self) -> int | None:
        """The 2 of "Apple M2 Pro"; None for other processors, and in virtual machines, which do not say."""
        match = CHIP_GENERATION.search(self.chip)
        return int(match[1]) if match else None


@cache
def this_machine() -> Machine:
    """Ask the system once; raises MachineError on systems that MLX does not support."""
    system, arch = platform.system(), platform.machine()
    if system == MACOS:
        from mlx_mtp.machine_macos import metal_budget, read_facts

        facts = read_facts()
        budget = None if facts.is_translated or arch != "arm64" else metal_budget()
        return Machine(
            system=system,
            arch=arch,
            os_version=platform.mac_ver()[0],
            chip=facts.chip,
            gpu_cores=facts.gpu_cores,
            memory_bytes=facts.memory_bytes,
            gpu_budget_bytes=budget,
            has_metal=budget is not None,
            is_translated=facts.is_translated,
            is_virtual=facts.is_virtual,
        )
    if system == LINUX:
        from mlx_mtp.machine_linux import memory_limit, read_processor

        processor = read_processor()
        return Machine(
            system=system,
            arch=arch,
            os_version=platform.release(),
            chip=processor.name,
            gpu_cores=None,
            memory_bytes=memory_limit(),
            gpu_budget_bytes=None,
            has_metal=False,
            is_translated=False,
            is_virtual=processor.is_virtual,
        )
    raise MachineError(
        f"macOS on Apple silicon or Linux is needed, got {system or 'an unknown system'}; use one"
    )


def check_machine(machine: Machine) -> None:
    """Raise MachineError on a Mac that cannot run models: Intel, Rosetta, or no Metal. Linux runs on its CPU."""
    if machine.system != MACOS:
        return
    if machine.is_translated:
        raise MachineError(
            "Python must run natively, but this one is an Intel build translated by Rosetta, which has no Metal; "
            "install a Python for arm64 (`python3 -c 'import platform; print(platform.machine())'` must say arm64)"
        )
    if machine.arch != "arm64":
        raise MachineError(
            f"Macs need Apple silicon (M1 or later), got {machine.chip} ({machine.arch}); "
            "use an Apple silicon Mac, or Linux on a CPU"
        )
    if not machine.has_metal and machine.is_virtual:
        raise MachineError(
            "models on a Mac need Metal, and this virtual machine has none; "
            "run it on the Mac itself, outside the virtual machine"
        )
    if not machine.has_metal:
        raise MachineError(
            "models on a Mac need Metal, and MLX finds no Metal device here; "
            "log in to a desktop session and use macOS 14 or later"
        )


def read_machine(path: Path) -> Machine:
    """A machine described by a JSON file with the fields of `Machine`, to see what would happen on another one."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MachineError(
            f"{path}: a machine is described by a JSON file, got {error}; give a readable one"
        ) from None
    if not isinstance(raw, dict):
        raise MachineError(
            f"{path}: must hold a JSON object, got {shown(raw)}; see tests/machines for examples"
        )
    names = {field.name for field in fields(Machine)}
    for name in sorted(raw.keys() ^ names):
        problem = "is missing" if name in names else "is not a field of a machine"
        raise MachineError(f"{path}: {name} {problem}; the fields are {', '.join(sorted(names))}")
    for name, rule, is_right in _RULES:
        if not is_right(raw[name]):
            raise MachineError(f"{path}: {name} must be {rule}, got {shown(raw[name])}; correct it")
    if raw["has_metal"] != (raw["gpu_budget_bytes"] is not None):
        raise MachineError(
            f"{path}: gpu_budget_bytes must be a number with Metal and null without; correct it"
        )
    return Machine(**raw)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def _is_size(value: Any) -> bool:
    return is_integer(value) and 2**20 <= value <= 2**50


_RULES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("system", f'"{MACOS}" or "{LINUX}"', lambda value: value in (MACOS, LINUX)),
    *((name, "a short text", _is_text) for name in ("arch", "os_version", "chip")),
    (
        "gpu_cores",
        "a count or null",
        lambda value: value is None or (is_integer(value) and 0 < value < 10_000),
    ),
    ("memory_bytes", "a number of bytes", _is_size),
    ("gpu_budget_bytes", "a number of bytes or null", lambda value: value is None or _is_size(value)),
    *(
        (name, "true or false", lambda value: isinstance(value, bool))
        for name in ("has_metal", "is_translated", "is_virtual")
    ),
)


def free_bytes() -> int:
    """What can be taken now without swapping; on macOS it costs some milliseconds, on Linux microseconds."""
    if platform.system() == MACOS:
        from mlx_mtp.machine_macos import free_memory
    else:
        from mlx_mtp.machine_linux import free_memory
    return free_memory()


def footprint_bytes() -> int:
    """What this process holds and nobody else could have: macOS' phys_footprint, Linux' RssAnon + RssShmem."""
    if platform.system() == MACOS:
        from mlx_mtp.machine_macos import footprint
    else:
        from mlx_mtp.machine_linux import footprint
    return footprint()


def pressure_level() -> Pressure:
    """How short of memory the whole machine is; microseconds, so that it can be asked between rounds."""
    if platform.system() == MACOS:
        from mlx_mtp.machine_macos import pressure
    else:
        from mlx_mtp.machine_linux import pressure
    return cast(Pressure, pressure())
