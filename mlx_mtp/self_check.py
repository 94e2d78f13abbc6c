"""Whether this copy of the program is whole, for applications that bundle it: nothing is printed, nothing is raised.

The traps are known from other applications (docs/embedding.md): MLX's Metal library left out of a bundle or not beside
the libmlx that was loaded, two copies of libmlx in a process, and a Mac that computes on its CPU without saying so.
"""

import ctypes
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_mtp.errors import MtpError
from mlx_mtp.kernels.source import FOLDERS, metal_source
from mlx_mtp.machine import MACOS, check_machine, this_machine
from mlx_mtp.versions import check_versions

LIBRARY_NAMES = ("libmlx.dylib", "libmlx.so")
METAL_LIBRARY = "mlx.metallib"
METAL_MAGIC = b"MTLB"  # a Metal library begins with it
PACKAGES = ("numpy", "tokenizers", "jinja2", "safetensors", "filelock", "platformdirs", "huggingface_hub")
BUNDLE_MLX = (
    "put the whole mlx package, mlx/lib with it, into the bundle "
    "(PyInstaller: --collect-all mlx; py2app: docs/embedding.md)"
)
BUNDLE_OURS = (
    "put the whole mlx_mtp package with its data files into the bundle "
    "(PyInstaller: --collect-all mlx_mtp; py2app: docs/embedding.md)"
)


@dataclass(frozen=True, slots=True)
class Checked:
    """One thing that was looked at; `remedy` says what to do where it is not right."""

    name: str
    is_right: bool
    found: str
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """All that was looked at, in order; `str` gives a line for each."""

    checks: tuple[Checked, ...]

    @property
    def is_right(self) -> bool:
        return not self.problems

    @property
    def problems(self) -> tuple[Checked, ...]:
        return tuple(check for check in self.checks if not check.is_right)

    def __str__(self) -> str:
        return "\n".join(
            f"{'ok' if check.is_right else 'no':3}{check.name}: {check.found}"
            + ("" if check.remedy is None else f"; {check.remedy}")
            for check in self.checks
        )


class _Wrong(Exception):
    """What was found, and the remedy."""

    def __init__(self, found: str, remedy: str):
        super().__init__(found)
        self.found, self.remedy = found, remedy


def selfcheck(*, load_demo: bool = False) -> SelfCheck:
    """Look at the machine, the packages, MLX with its Metal library, our files, and a product on the default device.

    load_demo: also load the demo pair and write a few tokens with it, which takes a second or a few. Takes 0.1 s
    without; imports mlx. Nothing is raised: what is wrong is in `problems`, each with a remedy.
    """
    checks: list[Checked] = []
    stages: list[tuple[str, Callable[[], str]]] = [
        ("machine", _machine),
        ("packages", _packages),
        ("copies of libmlx", _copies),
        ("mlx", _mlx),
        ("Metal library", _metal_library),
        ("device", _device),
        ("product", _product),
        ("Metal sources", _sources),
        ("demo pair", _load_demo if load_demo else _demo_files),
    ]
    for name, look in stages:
        checks.append(_checked(name, look))
        # Where a copy of libmlx is loaded from elsewhere, importing a second one aborts the process.
        if name in ("copies of libmlx", "mlx") and not checks[-1].is_right:
            break
    return SelfCheck(tuple(checks))


def _checked(name: str, look: Callable[[], str]) -> Checked:
    try:
        return Checked(name, True, look())
    except _Wrong as wrong:
        return Checked(name, False, wrong.found, wrong.remedy)
    except MtpError as error:
        found, _, remedy = str(error).rpartition("; ")
        return Checked(name, False, found, remedy)
    except Exception as error:  # a check that fails in a way nobody has thought of is a finding too
        return Checked(
            name, False, f"{type(error).__name__}: {error}", "run the same outside the bundle to compare"
        )


def _machine() -> str:
    machine = this_machine()
    check_machine(machine)
    return f"{machine.chip}, {machine.system} {machine.os_version}"


def _packages() -> str:
    missing = [name for name in (*PACKAGES, "mlx", "mlx_lm") if importlib.util.find_spec(name) is None]
    if missing:
        raise _Wrong(f"{', '.join(missing)} cannot be found", "put these packages into the bundle")
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:  # a missing shared library is an OSError
            raise _Wrong(
                f"{name} cannot be imported: {error}", "put its shared libraries into the bundle"
            ) from None
    return "; ".join(check_versions()) or "all there"


def _copies() -> str:
    """Before MLX is imported: one that was loaded by other code, or a second one on the path, would end the process."""
    loaded = sorted({path.resolve() for path in loaded_libraries() if path.name in LIBRARY_NAMES})
    own = {folder.resolve() for folder in _mlx_folders()}
    foreign = [path for path in loaded if not any(path.is_relative_to(folder) for folder in own)]
    if foreign and "mlx.core" not in sys.modules:
        raise _Wrong(
            f"{foreign[0]} is loaded already, and mlx would load its own beside it",
            "use one copy of MLX in a process: run this in a process of its own, or leave the other one out",
        )
    if len(loaded) > 1:
        raise _Wrong(
            f"{len(loaded)} copies are loaded: {', '.join(map(str, loaded))}",
            "leave all but the one in mlx/lib out of the bundle",
        )
    return f"{loaded[0]}" if loaded else "none loaded yet"


def _mlx() -> str:
    try:
        mx = importlib.import_module("mlx.core")
    except (
        ImportError,
        OSError,
    ) as error:  # voicebox took an OSError for a missing MLX and computed without it
        raise _Wrong(f"mlx.core cannot be imported: {error}", BUNDLE_MLX) from None
    return f"{mx.__version__} in {Path(str(mx.__file__)).parent}"


def _metal_library() -> str:
    """MLX looks beside the libmlx that is loaded, and in Resources there."""
    if this_machine().system != MACOS:
        return "not needed on this system"
    loaded = [path for path in loaded_libraries() if path.name in LIBRARY_NAMES]
    return find_metal_library(loaded[0].parent if loaded else next(_mlx_folders()) / "lib")


def find_metal_library(folder: Path) -> str:
    """Where the Metal library for a libmlx in `folder` is; raises where MLX would not find a sound one."""
    places = [folder / METAL_LIBRARY, folder / "Resources" / METAL_LIBRARY]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise _Wrong(
            f"{METAL_LIBRARY} is not beside the libmlx that is loaded, in {folder}",
            f"{BUNDLE_MLX}, and leave other copies of libmlx out: packagers move them away from {METAL_LIBRARY}",
        )
    with path.open("rb") as stream:
        if stream.read(4) != METAL_MAGIC:
            raise _Wrong(
                f"{path} is no Metal library", f"{BUNDLE_MLX}; compression and signing may have changed it"
            )
    return str(path)


def _device() -> str:
    import mlx.core as mx

    device = mx.default_device()
    if this_machine().system == MACOS and device.type != mx.gpu:
        raise _Wrong(
            f"mlx computes on {device}, though this Mac has a GPU",
            "do not set MLX's default device to the CPU, and see that the Metal library is in the bundle",
        )
    return str(device)


def _product() -> str:
    import mlx.core as mx

    try:
        left, right = mx.arange(6, dtype=mx.float32).reshape(2, 3), mx.ones((3, 2), mx.float32)
        found = (left @ right).tolist()
    except RuntimeError as error:
        raise _Wrong(f"mlx cannot compute: {error}", BUNDLE_MLX) from None
    if found != [[3.0, 3.0], [12.0, 12.0]]:
        raise _Wrong(f"2 x 3 times 3 x 2 gives {found}", "install mlx again")
    return "right"


def _sources() -> str:
    names = sorted({path.name for folder in FOLDERS if folder.is_dir() for path in folder.glob("*.metal")})
    if not names:
        raise _Wrong(f"no .metal file in {FOLDERS[0]}", BUNDLE_OURS)
    empty = [
        name for name in names if "kernel" not in metal_source(name) and "template" not in metal_source(name)
    ]
    if empty:
        raise _Wrong(f"{', '.join(empty)} in {FOLDERS[0]} hold no kernels", BUNDLE_OURS)
    return f"{len(names)} files"


def _demo_files() -> str:
    folder = Path(__file__).parent / "demo"
    missing = [
        str(path)
        for part in ("target", "drafter")
        for path in (folder / part / "config.json", folder / part / "model.safetensors")
        if not path.is_file()
    ]
    if missing:
        raise _Wrong(f"{missing[0]} is missing", BUNDLE_OURS)
    return "its files are there"


def _load_demo() -> str:
    from mlx_mtp.api import generate
    from mlx_mtp.pair import load
    from mlx_mtp.sampling import Sampling

    out = generate(load("demo"), "def add(a, b):", max_tokens=4, sampling=Sampling(temperature=0.0))
    return f"loaded, {len(out.tokens)} tokens written"


def _mlx_folders() -> Iterator[Path]:
    """The mlx package's folders, without importing it."""
    spec = importlib.util.find_spec("mlx")
    places = None if spec is None else spec.submodule_search_locations
    yield from map(Path, places or ())


def loaded_libraries() -> list[Path]:
    """Shared libraries in this process, as the system's loader names them."""
    if sys.platform == "darwin":
        dyld = ctypes.CDLL(None)
        dyld._dyld_get_image_name.restype = ctypes.c_char_p
        names = [dyld._dyld_get_image_name(ctypes.c_uint32(i)) for i in range(dyld._dyld_image_count())]
        return [Path(name.decode()) for name in names if name]
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        named = {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if line.count(" /")}
    return [Path(name) for name in sorted(named) if name.startswith("/")]
