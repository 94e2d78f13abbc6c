"""What works on a machine and what does not: one check a question, each with a remedy where it is not "ok"."""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mlx_mtp.admission import gigabytes
from mlx_mtp.errors import MachineError, MemoryRefusal, MtpError

if TYPE_CHECKING:
    from mlx_mtp.machine import Machine

Status = Literal["ok", "warning", "problem"]
OLDEST_MACOS = 14  # MLX's wheels are built for it
MACOS, LINUX = "Darwin", "Linux"


@dataclass(frozen=True, slots=True)
class Check:
    """One answer; a "problem" means that models cannot run, a "warning" that something will not be at its best."""

    name: str
    status: Status
    found: str
    remedy: str | None = None


def check_hardware(machine: "Machine") -> Check:
    """Whether models can run on this kind of machine at all; fault 65."""
    from mlx_mtp.machine import check_machine

    try:
        check_machine(machine)
    except MachineError as error:
        return _refused("machine", error)
    if machine.system == LINUX:
        return Check(
            "machine",
            "warning",
            f"Linux on {machine.chip}: MLX computes on the CPU here, which is slow",
            "use a Mac with Apple silicon for speed",
        )
    if machine.is_virtual:
        return Check(
            "machine",
            "warning",
            f"{machine.chip} in a virtual machine, whose Metal is another than the Mac's own",
            "run it on the Mac itself; figures and texts from here may differ",
        )
    cores = f", {machine.gpu_cores} GPU cores" if machine.gpu_cores else ""
    return Check("machine", "ok", f"{machine.chip}{cores}, Metal")


def check_system(machine: "Machine") -> Check:
    """Whether the operating system is one that MLX's packages are made for."""
    name = "macOS" if machine.system == MACOS else machine.system
    major = machine.os_version.partition(".")[0]
    if machine.system == MACOS and major.isdigit() and int(major) < OLDEST_MACOS:
        return Check(
            "system",
            "problem",
            f"macOS {machine.os_version}, and MLX needs {OLDEST_MACOS} or later",
            "update macOS",
        )
    return Check("system", "ok", f"{name} {machine.os_version}, {machine.arch}")


def check_memory(machine: "Machine") -> Check:
    """Whether any model fits, whatever else runs."""
    from mlx_mtp.recommend import recommend

    try:
        choice = recommend(machine)
    except MemoryRefusal as error:
        return _refused("memory", error)
    return Check(
        "memory", "ok", f"{gigabytes(machine.memory_bytes)}, enough for {choice.alias.name} and smaller"
    )


def check_free(free: int, pressure: str, needed: int | None, name: str | None) -> Check:
    """Whether the recommended model fits beside what runs now."""
    if pressure == "critical":
        return Check("free memory", "warning", "memory pressure is critical", "close other programs")
    if needed is not None and free < needed:
        return Check(
            "free memory",
            "warning",
            f"{gigabytes(free)} can be taken now without swapping, and {name} needs {gigabytes(needed)}",
            "close other programs, or use a smaller model",
        )
    return Check("free memory", "ok", f"{gigabytes(free)} can be taken now, pressure {pressure}")


def check_packages() -> list[Check]:
    """Every package that this program uses, by the range that was tested; fault 66."""
    from mlx_mtp.versions import find_versions

    checks = []
    for finding in find_versions():
        trouble = finding.trouble
        if trouble is None:
            continue
        found, _, remedy = trouble.partition("; ")
        status: Status = "warning" if finding.works else "problem"
        checks.append(Check(f"package {finding.tested.package}", status, found, remedy or None))
    return checks or [Check("packages", "ok", "all within the ranges that were tested")]


def check_device(machine: "Machine") -> list[Check]:
    """Whether MLX starts, on which device it computes, and whether it can compile there."""
    try:
        import mlx.core as mx
    except (ImportError, OSError) as error:  # OSError: its metal library is missing
        reason = f"MLX cannot be started: {str(error)[:200]}"
        return [Check("MLX", "problem", reason, "run: pip install --force-reinstall mlx")]
    on_cpu = mx.default_device().type == mx.cpu
    if on_cpu and machine.has_metal:
        return [
            Check("MLX", "warning", "MLX computes on the CPU although there is a GPU", "do not set it so")
        ]
    checks = [Check("MLX", "ok", f"computes on the {'CPU' if on_cpu else 'GPU'}")]
    if on_cpu and shutil.which("g++") is None and shutil.which("clang++") is None:
        checks.append(
            Check(
                "compiler",
                "warning",
                "there is no C++ compiler, without which MLX fuses nothing on a CPU",
                "install g++, or expect slower replies",
            )
        )
    return checks


def check_folder(name: str, folder: Callable[[], Path], needed: int = 0) -> Check:
    """Whether what is kept there can be written, and `needed` bytes still fit on its disk; writes nothing."""
    try:
        path = folder()
        place = next(parent for parent in (path, *path.parents) if parent.is_dir())
        if not os.access(place, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(place))
        free = shutil.disk_usage(place).free
    except MtpError as error:
        return _refused(name, error, status="warning")
    except OSError as error:
        remedy = (
            f"make {error.filename} writable, or set HF_HOME" if name == "downloads" else "make it writable"
        )
        return Check(name, "warning", f"nothing can be kept there: {error}", remedy)
    if free < needed:
        return Check(
            name,
            "warning",
            f"{path}: {free / 1e9:.1f} GB free, and the recommended download has {needed / 1e9:.1f} GB",
            "free some space, or set HF_HOME to a folder on another disk",
        )
    return Check(name, "ok", f"{path}, {free / 1e9:.1f} GB free")


def check_network() -> Check:
    """Whether downloads are turned off; opens no socket."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Check("hub", "warning", "HF_HUB_OFFLINE is set: nothing is downloaded", "unset it to download")
    return Check("hub", "ok", f"{constants.ENDPOINT}, not contacted now")


def check_records() -> list[Check]:
    """What our own files say of themselves; damaged ones were set aside on reading; fault 75."""
    from mlx_mtp.store import everything_kept, last_model

    warning = last_model().warning
    found = [Check("our files", "warning", warning, "nothing: it is not used")] if warning else []
    corrupt = [kept.path.name for kept in everything_kept() if kept.path.name.endswith(".corrupt")]
    if corrupt and not found:
        found.append(
            Check("our files", "warning", f"damaged files kept aside: {', '.join(corrupt)}", "remove them")
        )
    return found


def _refused(name: str, error: MtpError, status: Status = "problem") -> Check:
    """A refusal's words: what is wrong, and after its first semicolon the remedy."""
    found, _, remedy = str(error).partition("; ")
    return Check(name, status, found, remedy or None)
