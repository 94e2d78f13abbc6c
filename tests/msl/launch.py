"""One launch of a compiled kernel: arguments in, outputs and counts back, faults raised."""

import ctypes
import time
from dataclasses import dataclass, replace
from typing import Literal

from .arguments import Arena, Block
from .build import Library, runtime
from .counters import Counts, Traffic, Uncounted

MOST_THREADS = 832  # what M1 can start of a kernel that needs many registers
MOST_THREADGROUP_BYTES = 32768
ORDERS = ("forward", "reverse", "random")


class Fault(RuntimeError):
    """A kernel did what it must not; `faults` has one line for each thing found."""

    def __init__(self, kernel: str, faults: list[str]):
        super().__init__(f"{kernel}:\n  " + "\n  ".join(faults))
        self.faults = faults


@dataclass(frozen=True, slots=True)
class Settings:
    """How kernels run. `check` and `count` need instrumented builds and one worker."""

    order: Literal["forward", "reverse", "random"] = "forward"
    seed: int = 0
    check: bool = False
    count: bool = False
    workers: int = 2

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order is one of {ORDERS}, got {self.order!r}")
        if self.workers not in (1, 2):
            raise ValueError(f"workers is 1 or 2, got {self.workers}")

    @property
    def instrumented(self) -> bool:
        return self.check or self.count

    def changed(self, **given: object) -> "Settings":
        return replace(self, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


Uint3 = ctypes.c_uint32 * 3


class CountersStruct(ctypes.Structure):
    """`Counters` of runtime/worker.h."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("switches", "simd_ops", "matrix_ops", "barriers", "atomics", "threads", "threadgroups")
    ]


class LaunchStruct(ctypes.Structure):
    """`Launch` of runtime/worker.h."""

    _fields_ = [
        ("grid", Uint3),
        ("threadgroup", Uint3),
        ("order", ctypes.c_int),
        ("check", ctypes.c_int),
        ("count", ctypes.c_int),
        ("workers", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("entries", ctypes.c_void_p * 2),
        ("threadgroup_memory", ctypes.c_void_p * 2),
        ("threadgroup_bytes", ctypes.c_uint64),
        ("buffers", ctypes.c_int),
        ("addresses", ctypes.POINTER(ctypes.c_void_p)),
        ("sizes", ctypes.POINTER(ctypes.c_uint64)),
        ("kinds", ctypes.POINTER(ctypes.c_int)),
        ("names", ctypes.POINTER(ctypes.c_char_p)),
        ("arena_low", ctypes.c_void_p),
        ("arena_high", ctypes.c_void_p),
        ("traffic", ctypes.POINTER(ctypes.c_uint64)),
        ("counters", CountersStruct),
        ("faults", ctypes.c_char_p),
        ("faults_size", ctypes.c_uint64),
    ]


@dataclass(frozen=True, slots=True)
class Launch:
    """What one launch was and did; `seconds` inside the kernel."""

    kernel: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    threads: int
    threadgroups: int
    threadgroup_bytes: int
    template: tuple[tuple[str, object], ...]
    settings: Settings
    counts: Counts
    seconds: float


def limits(library: Library, threads: int) -> list[str]:
    """What no chip, or not every chip, would start."""
    found = []
    if threads > MOST_THREADS:
        found.append(
            f"{threads} threads a threadgroup, at most {MOST_THREADS} fit an M1: use smaller threadgroups"
        )
    if library.threadgroup_bytes > MOST_THREADGROUP_BYTES:
        found.append(
            f"{library.threadgroup_bytes} bytes of threadgroup memory, at most {MOST_THREADGROUP_BYTES} exist"
        )
    return found


def traffic_of(blocks: list[Block], counted: ctypes.Array, place: int) -> dict[str, Traffic]:
    """`place` 0: read, 1: written. By name; buffers that nobody touched have zeros."""
    found: dict[str, Traffic] = {}
    for number, block in enumerate(blocks):
        start = 6 * number + 3 * place
        found[block.name] = Traffic(*counted[start : start + 3])
    return found


def launch(
    kernel: str,
    library: Library,
    blocks: list[Block],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    settings: Settings,
    template: tuple[tuple[str, object], ...],
    one_worker: bool,
) -> Launch:
    """Runs; outputs are in their blocks' arrays afterwards. Raises `Fault` for anything wrong."""
    size = [min(a, b) for a, b in zip(threadgroup, grid, strict=True)]
    problems = limits(library, size[0] * size[1] * size[2])
    if problems:
        raise Fault(kernel, problems)
    arena = Arena(blocks, copy_inputs=settings.instrumented)
    n = len(blocks)
    traffic = (ctypes.c_uint64 * (6 * n))()
    faults = ctypes.create_string_buffer(16384)
    given = LaunchStruct(
        grid=Uint3(*grid),
        threadgroup=Uint3(*size),
        order=ORDERS.index(settings.order),
        check=settings.check,
        count=settings.count,
        workers=1 if settings.instrumented or one_worker else settings.workers,
        seed=settings.seed,
        entries=(ctypes.c_void_p * 2)(*library.entries),
        threadgroup_memory=(ctypes.c_void_p * 2)(*library.threadgroup_memory),
        threadgroup_bytes=library.threadgroup_bytes,
        buffers=n,
        addresses=(ctypes.c_void_p * n)(*[block.address for block in blocks]),
        sizes=(ctypes.c_uint64 * n)(*[block.span for block in blocks]),
        kinds=(ctypes.c_int * n)(*[block.kind for block in blocks]),
        names=(ctypes.c_char_p * n)(*[block.name.encode() for block in blocks]),
        arena_low=arena.address,
        arena_high=arena.address + arena.size,
        traffic=traffic,
        faults=ctypes.cast(faults, ctypes.c_char_p),
        faults_size=len(faults),
    )
    start = time.perf_counter()
    runtime().msl_launch(ctypes.byref(given))
    seconds = time.perf_counter() - start
    found = faults.value.decode().splitlines()
    damage = arena.damage()
    if damage and not any("out of bounds" in line for line in found):
        found.append(damage)
    if found:
        raise Fault(kernel, found)
    arena.read_outputs()
    c = given.counters
    counts = Counts(
        launches=1,
        threadgroups=c.threadgroups,
        threads=c.threads,
        simd_ops=c.simd_ops,
        matrix_ops=c.matrix_ops,
        barriers=c.barriers,
        atomics=c.atomics,
        read=traffic_of(blocks, traffic, 0) if settings.instrumented else Uncounted(),
        written=traffic_of(blocks, traffic, 1) if settings.instrumented else Uncounted(),
    )
    return Launch(
        kernel=kernel,
        grid=grid,
        threadgroup=(size[0], size[1], size[2]),
        threads=c.threads,
        threadgroups=c.threadgroups,
        threadgroup_bytes=library.threadgroup_bytes,
        template=template,
        settings=settings,
        counts=counts,
        seconds=seconds,
    )
