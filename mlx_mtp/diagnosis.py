"""What this machine is, what it can run, what is kept where, and what works: the data behind `mlx-mtp doctor`."""

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_mtp.errors import KernelError, MemoryRefusal, StorageError
from mlx_mtp.health import (
    Check,
    check_device,
    check_folder,
    check_free,
    check_hardware,
    check_memory,
    check_network,
    check_packages,
    check_records,
    check_system,
)

if TYPE_CHECKING:
    from mlx_mtp.aliases import Alias
    from mlx_mtp.cache import CachedModel
    from mlx_mtp.kernels.listing import KernelLine
    from mlx_mtp.machine import Machine
    from mlx_mtp.store import Kept

SCHEMA_VERSION = 1
STOCK_HERE = "stock MLX operations: no Metal here"
UNKNOWN_THERE = "stock MLX operations until our kernels were tested on that Mac, after its first chat"
UNTESTED = (
    "stock MLX operations: our kernels were not tested here yet; that is done while a chat waits for its second "
    "message, or by: mlx-mtp doctor --kernels MODEL"
)


@dataclass(frozen=True, slots=True)
class Fit:
    """One alias on a machine: what it takes with `context` tokens, and whether that is admitted."""

    name: str
    memory_bytes: int
    context: int
    fits: bool
    is_recommended: bool
    is_cached: bool
    download_gb: float | None


@dataclass(frozen=True, slots=True)
class Software:
    """What runs this: only known for the machine at hand."""

    mlx_mtp: str
    python: str
    executable: str
    packages: dict[str, str | None]
    free_bytes: int
    footprint_bytes: int
    pressure: str


@dataclass(frozen=True, slots=True)
class Places:
    """Where files live; None where this user has no such place."""

    downloads: str
    data: str | None
    cache: str | None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything; `software`, `places`, `cached` and `kept` are empty for a machine that is only described."""

    machine: "Machine"
    budget_bytes: int
    dtype: str
    dtype_reason: str
    kernels: str
    recommended: str | None
    reason: str
    models: tuple[Fit, ...]
    checks: tuple[Check, ...]
    software: Software | None = None
    places: Places | None = None
    cached: "tuple[CachedModel, ...]" = ()
    kept: "tuple[Kept, ...]" = ()
    kernel_lines: "tuple[KernelLine, ...]" = ()  # operations of any model that were tested here

    @property
    def is_usable(self) -> bool:
        """Whether models can run here."""
        return all(check.status != "problem" for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Plain values; sizes in bytes."""
        return {
            "schema": SCHEMA_VERSION,
            "usable": self.is_usable,
            **{name: _plain(value) for name, value in asdict(self).items()},
        }


def diagnose(machine: "Machine | None" = None) -> Diagnosis:
    """Look at this machine, or say what a described one would run. Loads no model and opens no socket."""
    from mlx_mtp.machine import this_machine

    return _here(this_machine()) if machine is None else _described(machine)


def _described(machine: "Machine") -> Diagnosis:
    """Only what follows from the description."""
    checks = [check_hardware(machine), check_system(machine), check_memory(machine)]
    kernels = UNKNOWN_THERE if machine.has_metal else STOCK_HERE
    return _diagnosis(machine, checks, cached=(), kernels=kernels)


def _here(machine: "Machine") -> Diagnosis:
    from mlx_mtp.cache import hub_cache, list_cached
    from mlx_mtp.machine import free_bytes, pressure_level
    from mlx_mtp.store import cache_folder, data_folder, everything_kept

    cached = list_cached()
    models = fits_on(machine, cached)
    choice = next((fit for fit in models if fit.is_recommended), None)
    needed = choice.memory_bytes if choice is not None else None
    missing = choice is not None and not choice.is_cached
    download = int((choice.download_gb or 0) * 1e9) if choice is not None and missing else 0
    kernels, lines, damage = _kernels(machine)
    checks = [
        check_hardware(machine),
        check_system(machine),
        *check_packages(),
        *check_device(machine),
        check_memory(machine),
        check_free(free_bytes(), pressure_level(), needed, choice.name if choice else None),
        check_folder("downloads", hub_cache, download),
        check_folder("records", data_folder),
        check_folder("kept results", cache_folder),
        check_network(),
        *check_records(),
        *damage,
    ]
    return _diagnosis(
        machine,
        checks,
        cached=cached,
        kernels=kernels,
        kernel_lines=lines,
        software=_software(),
        places=_places(),
        kept=tuple(everything_kept()),
    )


def _diagnosis(machine: "Machine", checks: Sequence[Check], *, cached: Any, **here: Any) -> Diagnosis:
    from mlx_mtp.admission import budget_bytes
    from mlx_mtp.recommend import recommend

    dtype, dtype_reason = _dtype(machine)
    try:
        choice = recommend(machine)
        name, reason = choice.alias.name, choice.reason
    except MemoryRefusal as error:
        name, reason = None, str(error)
    return Diagnosis(
        machine=machine,
        budget_bytes=budget_bytes(machine),
        dtype=dtype,
        dtype_reason=dtype_reason,
        recommended=name,
        reason=reason,
        models=fits_on(machine, cached),
        checks=tuple(checks),
        cached=cached,
        **here,
    )


def _kernels(machine: "Machine") -> "tuple[str, tuple[KernelLine, ...], list[Check]]":
    """In a line which kernels are used here, what was found of each, and what is wrong with that file."""
    if not machine.has_metal:
        return STOCK_HERE, (), []
    try:
        from mlx_mtp.kernels.listing import lines_of_outcomes, summary
        from mlx_mtp.kernels.results import place_of, read_outcomes

        outcomes, warning = read_outcomes(place_of(machine))
    except (ImportError, OSError, KernelError) as error:  # without MLX, or without the kernels' files
        return f"stock MLX operations: {str(error)[:200]}", (), []
    damage = (
        [Check("kernel results", "warning", warning, "nothing: kernels are tested again")] if warning else []
    )
    lines = lines_of_outcomes(outcomes)
    return summary(lines) if lines else UNTESTED, lines, damage


def fits_on(machine: "Machine", cached: "Sequence[CachedModel]" = ()) -> tuple[Fit, ...]:
    """Every alias on `machine`, in the table's order, at the context that recommendations are made for."""
    from mlx_mtp.admission import budget_bytes
    from mlx_mtp.aliases import ALIASES
    from mlx_mtp.recommend import CONTEXT, estimate_on, recommend

    budget = budget_bytes(machine)
    try:
        chosen: Alias | None = recommend(machine).alias
    except MemoryRefusal:
        chosen = None
    complete = {model.repo_id for model in cached if model.is_complete}
    fits = []
    for alias in ALIASES:
        total = estimate_on(machine, alias).total
        fits.append(
            Fit(
                name=alias.name,
                memory_bytes=total,
                context=CONTEXT,
                fits=total <= budget,
                is_recommended=alias == chosen,
                is_cached=alias.target in complete,
                download_gb=alias.download_gb,
            )
        )
    return tuple(fits)


def _dtype(machine: "Machine") -> tuple[str, str]:
    """What activations are computed in; unknown where MLX cannot be imported, which `checks` then says."""
    try:
        import mlx.core as mx

        from mlx_mtp.dtypes import activation_dtype
    except (ImportError, OSError):
        return "unknown", "MLX cannot be started"
    dtype, reason = activation_dtype(machine, mx.bfloat16)
    return str(dtype).rpartition(".")[2], reason


def _software() -> Software:
    import sys

    import mlx_mtp
    from mlx_mtp.machine import footprint_bytes, free_bytes, pressure_level
    from mlx_mtp.versions import find_versions

    return Software(
        mlx_mtp=mlx_mtp.__version__,
        python=platform.python_version(),
        executable=sys.executable,
        packages={finding.tested.package: finding.version for finding in find_versions()},
        free_bytes=free_bytes(),
        footprint_bytes=footprint_bytes(),
        pressure=pressure_level(),
    )


def _places() -> Places:
    from mlx_mtp.cache import hub_cache
    from mlx_mtp.store import cache_folder, data_folder

    own: list[str | None] = []
    for folder in (data_folder, cache_folder):
        try:
            own.append(str(folder()))
        except StorageError:
            own.append(None)
    return Places(downloads=str(hub_cache()), data=own[0], cache=own[1])


def _plain(value: Any) -> Any:
    """Paths as text, through lists and dicts."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
