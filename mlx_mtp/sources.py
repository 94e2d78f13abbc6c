"""Names -> folders on this disk: downloaded where missing, if they would fit; quantised where that was asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from mlx_mtp.admission import admit_model
from mlx_mtp.cache import cached_snapshot
from mlx_mtp.checkpoint import check_pair, read_drafter_config, read_target_config
from mlx_mtp.errors import HubError, ParameterError
from mlx_mtp.hub import AUTO, ModelName, drafter_for, parse_name
from mlx_mtp.machine import Machine
from mlx_mtp.memory import MemoryEstimate, estimate_memory
from mlx_mtp.progress import OnProgress
from mlx_mtp.quantize import is_sound, kept_copies, quantized_copy

ADMITTED_CONTEXT = 4096  # tokens that memory must suffice for where no max_context is given


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `load` was asked for, as far as files and memory depend on it; `dtype` is that of activations."""

    target: str | Path
    drafter: str | Path | None
    revision: str | None
    quantize: int | None
    drafter_bits: Literal["auto"] | int | None
    dtype: mx.Dtype
    max_context: int | None

    def __post_init__(self) -> None:
        if self.quantize not in (None, 4, 8):
            raise ParameterError(f"quantize must be 4, 8 or None (as the files are), got {self.quantize!r}")
        if self.drafter_bits not in ("auto", None, 4, 8):
            raise ParameterError(
                f'drafter_bits must be 4, 8, "auto" (4 with a quantised target) or None (as the files are), '
                f"got {self.drafter_bits!r}"
            )

    @property
    def context(self) -> int:
        return self.max_context or ADMITTED_CONTEXT


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a pair's files lie; `drafter` is None for plain decoding."""

    target: Path
    drafter: Path | None
    warnings: tuple[str, ...]


def find_sources(wanted: Wanted, machine: Machine, on_progress: OnProgress) -> Sources:
    """Find, download or make what `wanted` names; what is on disk opens no socket.

    Raises CheckpointError, PairError or ParameterError for names, MemoryRefusal before weights are downloaded that this
    machine could never run, HubError and StorageError from the download itself.
    """
    name = parse_name(wanted.target, wanted.revision)
    warnings = list(name.warnings)
    copy = copy_without_source(name, wanted.quantize)
    folder = copy or _on_disk(name)
    if folder is None:
        if name.alias is not None:
            admit(wanted, machine, name.alias.name)
        folder = _download(name, on_progress, lambda files: admit(wanted, machine, files))
    drafter = drafter_for(name, folder, wanted.drafter)
    if drafter is None and wanted.drafter is not None:
        warnings.append(
            f"no drafter was found beside {folder}: decoding is plain; give drafter=NAME or PATH to use MTP"
        )
    drafter_folder = None
    if drafter is not None:
        warnings += drafter.warnings
        try:
            drafter_folder = _find_drafter(drafter, folder, on_progress)
        except HubError as error:
            if wanted.drafter != AUTO:
                raise
            warnings.append(f"decoding is plain, because the drafter cannot be had: {error}")
    if wanted.quantize is not None and copy is None:
        folder = quantized_copy(
            folder,
            wanted.quantize,
            key=_key(name, folder),
            on_progress=on_progress,
            on_warning=warnings.append,
        )
    return Sources(folder, drafter_folder, tuple(warnings))


def admit(
    wanted: Wanted, machine: Machine, model: str | Path, *, free: int | None = None, **parts: Any
) -> None:
    """Refuse a model (an alias, or a folder with its config.json) without memory for it; raises MemoryRefusal.

    free: what can be taken now, None for what this machine could ever give. parts: more for `estimate_memory`.
    """

    def estimate_at(context: int) -> MemoryEstimate:
        own: dict[str, Any] = {"drafter": None if wanted.drafter is None else "auto", **parts}
        return estimate_memory(
            model, context, bits=wanted.quantize, drafter_bits=wanted.drafter_bits, dtype=wanted.dtype, **own
        )

    admit_model(
        estimate_at(wanted.context),
        machine,
        free=free,
        name=str(wanted.target),
        context=wanted.context,
        estimate_at=estimate_at,
    )


def _on_disk(name: ModelName) -> Path | None:
    """The folder of a model that needs no download."""
    if name.repo_id is None:
        return name.folder
    return cached_snapshot(name.repo_id, name.revision)


def _download(name: ModelName, on_progress: OnProgress, before_weights: Callable[[Path], None]) -> Path:
    from mlx_mtp.download import fetch, plan_download

    assert name.repo_id is not None, "folders and the demo pair are on disk"
    plan = plan_download(name.repo_id, name.revision)
    return fetch(plan, on_progress, before_weights=before_weights)


def _find_drafter(drafter: ModelName, target: Path, on_progress: OnProgress) -> Path:
    """The drafter's folder; one that is downloaded must fit the target by its configuration first."""
    config = read_target_config(target)
    return _on_disk(drafter) or _download(
        drafter, on_progress, lambda files: check_pair(config, read_drafter_config(files))
    )


def _key(name: ModelName, folder: Path) -> str | None:
    """What a quantised copy is kept under: the commit for a snapshot of the hub, else the files themselves."""
    return None if name.repo_id is None else f"{name.repo_id}@{folder.name}"


def copy_without_source(name: ModelName, bits: int | None) -> Path | None:
    """A quantised copy made earlier from a model of the hub whose own files have been removed since."""
    if bits is None or name.repo_id is None or _on_disk(name) is not None:
        return None
    source = f"{name.repo_id}@{name.revision or ''}"
    fitting = [copy for copy in kept_copies() if copy.bits == bits and copy.source.startswith(source)]
    copies = [
        copy.path for copy in fitting if is_sound(copy)
    ]  # a damaged one has to be made again from the source
    return max(copies, key=lambda path: path.stat().st_mtime, default=None)
