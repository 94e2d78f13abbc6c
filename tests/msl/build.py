"""From C++ text to a loaded library, with the clang of the `ziglang` package; objects are kept by content.

Kept in the machine's temporary folder, in one that belongs to this user, for a week after the last use.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
KEPT_SECONDS = 7 * 86400
COMMON = [
    "--target=x86_64-linux-gnu",
    "-march=x86-64-v3",
    "-std=c++17",
    "-fPIC",
    "-nostdinc",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-Xclang",
    "-ffloat16-excess-precision=none",
    "-Xclang",
    "-fbfloat16-excess-precision=none",
]
KERNEL = [
    *COMMON,
    "-O1",
    "-fno-threadsafe-statics",
    "-fdeclspec",
    "-ftrivial-auto-var-init=pattern",  # a variable never set is NaN, in every run the same
    "-w",
    "-fsanitize=integer-divide-by-zero",  # it would end the process: runtime/hooks.cpp ends the launch
    "-Wno-reserved-user-defined-literal",
    "-Werror=return-type",
]
INSTRUMENTED = [
    "-DMSL_ALIGNED",
    "-Xclang",
    "-fsanitize=thread",  # only for its calls at each access: runtime/checker.cpp answers them
    "-mllvm",
    "-tsan-instrument-func-entry-exit=0",
    "-mllvm",
    "-tsan-instrument-atomics=0",
    "-mllvm",
    "-tsan-instrument-read-before-write=1",
    "-fsanitize=array-bounds,shift,alignment",  # runtime/hooks.cpp answers these
]


class CompileError(RuntimeError):
    """Clang refused the source; the message is clang's, with lines of the source."""


@dataclass(frozen=True, slots=True)
class Library:
    """One compiled kernel, loaded once for each worker (instrumented: one), for its threadgroup memory is static."""

    entries: tuple[int, ...]
    threadgroup_memory: tuple[int, ...]
    threadgroup_bytes: int


def runs_here() -> bool:
    return sys.platform == "linux" and platform.machine() == "x86_64"


@functools.cache
def zig() -> str:
    if not runs_here():
        raise RuntimeError(
            f"Metal source runs on x86-64 Linux only, this is {sys.platform} {platform.machine()}"
        )
    try:
        import ziglang
    except ImportError as missing:
        raise RuntimeError("running Metal source needs clang: pip install 'mlx-mtp[test]'") from missing
    return str(Path(ziglang.__file__).parent / "zig")


@functools.cache
def cache_folder() -> Path:
    """Made for this user alone; refuses a folder that somebody else made."""
    folder = Path(tempfile.gettempdir()) / f"mlx-mtp-msl-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user: remove it, or set TMPDIR")
    for old in folder.iterdir():
        with contextlib.suppress(
            FileNotFoundError
        ):  # a run beside this one puts its objects in place and tidies too
            if old.is_file() and time.time() - old.stat().st_mtime > KEPT_SECONDS:
                old.unlink()
    return folder


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr or f"{command[0]} ended with {done.returncode}")
    return done.stderr


def clang(*arguments: str) -> list[str]:
    return [zig(), "clang", *arguments]


@functools.cache
def shim_hash() -> str:
    """Of everything that a compiled kernel depends on besides its own text."""
    files = [*sorted((HERE / "include").rglob("*")), *sorted((HERE / "runtime").iterdir()), Path(zig())]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            size = str(file.stat().st_size).encode()
            digest.update(file.name.encode() + (size if file.name == "zig" else file.read_bytes()))
    return digest.hexdigest()


def shared_library(key: str, texts: dict[str, str] | list[Path], flags: list[str]) -> Path:
    """Compiles and links unless the cache has it; two processes may do so at once."""
    target = cache_folder() / f"{key}.so"
    if target.exists():
        os.utime(target)
        return target
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        sources = []
        for file in texts:
            if isinstance(file, Path):
                sources.append(file)
            else:
                sources.append(Path(scratch) / file)
                sources[-1].write_text(texts[file])
        objects = [f"{scratch}/{place}.o" for place in range(len(sources))]
        for source, compiled in zip(sources, objects, strict=True):
            run(clang(*flags, "-c", str(source), "-o", compiled))
        run([zig(), "ld.lld", "-shared", *objects, "-o", f"{scratch}/out.so"])
        os.replace(f"{scratch}/out.so", target)
    return target


@functools.cache
def runtime() -> ctypes.CDLL:
    ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
    flags = [
        *COMMON,
        "-O2",
        "-Wall",
        "-fvisibility=default",
        "-isystem",
        str(Path(zig()).parent / "lib/include"),
    ]
    sources = sorted((HERE / "runtime").glob("*.cpp"))
    key = "runtime-" + hashlib.sha256((shim_hash() + repr(flags)).encode()).hexdigest()[:20]
    loaded = ctypes.CDLL(str(shared_library(key, sources, flags)), mode=ctypes.RTLD_GLOBAL)
    loaded.msl_launch.restype = None
    return loaded


def load(file: Path) -> tuple[int, int, int]:
    """Address of the kernel, of its threadgroup memory, and the latter's size in bytes."""
    library = ctypes.CDLL(str(file))
    low_and_high = (ctypes.c_void_p * 2)()
    library.msl_threadgroup_memory(low_and_high)
    low, high = low_and_high[0] or 0, low_and_high[1] or 0
    return ctypes.cast(library.msl_entry, ctypes.c_void_p).value or 0, low, high - low


def second_copy(file: Path) -> Path:
    """Under another name, or the loader would hand out what it has loaded already."""
    second = file.with_suffix(".2.so")
    if not second.exists():
        with tempfile.NamedTemporaryFile(dir=cache_folder(), delete=False) as copy:
            copy.write(file.read_bytes())
        os.replace(copy.name, second)
    return second


@functools.cache
def build(text: str, instrumented: bool) -> Library:
    """`text`: of `lower`; instrumented kernels report each access to the checker and cost 5 to 50 times the time."""
    runtime()
    flags = [*KERNEL, *(INSTRUMENTED if instrumented else []), "-I", str(HERE / "include")]
    key = hashlib.sha256(repr((text, flags, shim_hash())).encode()).hexdigest()[:24]
    files = [shared_library(key, {"kernel.cpp": text}, flags)]
    if not instrumented:
        files.append(second_copy(files[0]))
    loaded = [load(file) for file in files]
    return Library(
        entries=tuple(entry for entry, _, _ in loaded),
        threadgroup_memory=tuple(low for _, low, _ in loaded),
        threadgroup_bytes=loaded[0][2],
    )
