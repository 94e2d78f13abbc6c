"""What Linux says about processor and memory: /proc, and the control group's limit where there is one."""

from pathlib import Path
from typing import NamedTuple

KIB = 1024
PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
NO_LIMIT = 2**60  # cgroup v1 writes a huge number for "none"
WARNING_SHARE, CRITICAL_SHARE = 0.08, 0.03  # of the memory, still free: our own thresholds, Linux has none


class Processor(NamedTuple):
    """What /proc/cpuinfo tells."""

    name: str
    is_virtual: bool


class GroupMemory(NamedTuple):
    """A control group's limit in bytes, and what of it can still be taken."""

    limit: int
    free: int


def parse_cpuinfo(text: str) -> Processor:
    """The first processor's name, whatever the architecture calls that field."""
    values = _colon_fields(text)
    names = (values[key] for key in ("model name", "Model", "Hardware", "CPU part") if values.get(key))
    return Processor(next(names, "unknown processor"), "hypervisor" in values.get("flags", "").split())


def parse_kib_fields(text: str) -> dict[str, int]:
    """`Name:   123 kB` lines of /proc/meminfo and /proc/PID/status -> bytes."""
    sizes = {}
    for name, value in _colon_fields(text).items():
        number, _, unit = value.partition(" ")
        if unit == "kB" and number.isdecimal():
            sizes[name] = int(number) * KIB
    return sizes


def _colon_fields(text: str) -> dict[str, str]:
    """`name : value` lines, the first of each name."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            values.setdefault(name.strip(), value.strip())
    return values


def parse_group_paths(text: str) -> tuple[str, str | None]:
    """/proc/self/cgroup -> the path in the unified hierarchy (v2), and that of the v1 memory controller, if any."""
    unified, memory = "/", None
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            unified = path
        elif "memory" in controllers.split(","):
            memory = path
    return unified, memory


def group_memory(limit: str, used: str, stat: str) -> GroupMemory | None:
    """The contents of a group's three files -> its memory, or None without a limit.

    The page cache counts as used and is given back when others need it; only version 1 tells a group's own share of it
    from its children's (`total_`).
    """
    if not limit.strip().isdecimal() or int(limit) >= NO_LIMIT:
        return None
    values = dict(line.split(" ", 1) for line in stat.splitlines() if " " in line)
    names = ("inactive_file", "active_file")
    cache = sum(int(values.get(f"total_{name}", values.get(name, 0))) for name in names)
    return GroupMemory(int(limit), max(0, int(limit) - int(used) + cache))


def read_groups(proc: Path = PROC, root: Path = CGROUP) -> list[GroupMemory]:
    """The limits on this process: those of its group and of every group above it."""
    file = proc / "self/cgroup"
    if not file.is_file():
        return []
    unified, memory = parse_group_paths(file.read_text())
    places = [(root, unified, "memory.max", "memory.current")]
    if memory is not None:
        places.append((root / "memory", memory, "memory.limit_in_bytes", "memory.usage_in_bytes"))
    groups = []
    for top, path, limit, used in places:
        own = top / path.lstrip("/")
        # Inside a container the path is the host's and the container's own group is mounted at the top.
        for folder in (own, *own.parents):
            if not folder.is_relative_to(top):
                break
            if (folder / limit).is_file() and (folder / used).is_file():
                stat = (folder / "memory.stat").read_text()
                group = group_memory((folder / limit).read_text(), (folder / used).read_text(), stat)
                groups += [group] if group else []
    return groups


def read_processor(proc: Path = PROC) -> Processor:
    return parse_cpuinfo((proc / "cpuinfo").read_text())


def memory_limit(proc: Path = PROC, root: Path = CGROUP) -> int:
    """Bytes of memory this process may ever use: the machine's, or less in a limited group."""
    total = parse_kib_fields((proc / "meminfo").read_text())["MemTotal"]
    return min([total, *(group.limit for group in read_groups(proc, root))])


def free_memory(proc: Path = PROC, root: Path = CGROUP) -> int:
    """Bytes that can be taken without swapping."""
    available = parse_kib_fields((proc / "meminfo").read_text())["MemAvailable"]
    return min([available, *(group.free for group in read_groups(proc, root))])


def footprint(proc: Path = PROC) -> int:
    """This process's anonymous and shared memory; mapped files are left out."""
    sizes = parse_kib_fields((proc / "self/status").read_text())
    return sizes["RssAnon"] + sizes["RssShmem"]


def pressure(proc: Path = PROC, root: Path = CGROUP) -> str:
    """By the share of memory that is still free, here or in a limiting group."""
    share = free_memory(proc, root) / memory_limit(proc, root)
    return "critical" if share < CRITICAL_SHARE else "warning" if share < WARNING_SHARE else "normal"
