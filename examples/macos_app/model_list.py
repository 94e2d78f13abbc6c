"""Which models the picker offers: those inside the bundle first, then the demo pair, then every published size."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_mtp.aliases import Alias
    from mlx_mtp.machine import Machine

BUNDLED = "models"  # in the bundle's Resources: models/NAME/config.json, its drafter in models/NAME/assistant
SIZES = {"e2b": "E2B", "e4b": "E4B", "12b": "12B", "26b": "26B-A4B", "31b": "31B"}
STORED = {4: "4-bit", 8: "8-bit", 16: "bfloat16"}
GIB = 2**30  # what macOS calls a GB of memory


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One line of the picker; sizes in bytes. `name` is what `Engine` takes, `key` what is remembered of it."""

    key: str
    name: str | Path
    title: str
    memory_bytes: int | None  # None: its files cannot be read, and opening it says why
    fits: bool
    is_here: bool  # needs no download
    download_bytes: int | None = None  # None: not known, or nothing to download

    @property
    def line(self) -> str:
        """Title, whether it must be downloaded, and what it takes."""
        here = "on this Mac" if self.is_here else "not downloaded"
        if self.download_bytes is not None and not self.is_here:
            here = f"{gigabytes(self.download_bytes, 1e9)} to download"
        return " · ".join((self.title, here, self.memory))

    @property
    def memory(self) -> str:
        """What it takes, in words."""
        if self.memory_bytes is None:
            return "cannot be read"
        needs = f"needs {gigabytes(self.memory_bytes)} of memory"
        return needs if self.fits else f"{needs}: too much for this Mac"


def list_models(resources: Path | None) -> list[ModelRow]:
    """All rows, in order. Looks at the disk and at the machine, opens no socket; takes some tenths of a second.

    Imports MLX: ask on a thread of its own, after `selfcheck` has found nothing.
    """
    from mlx_mtp.aliases import ALIASES
    from mlx_mtp.hub import demo_folder
    from mlx_mtp.machine import this_machine

    machine = this_machine()
    demo = folder_row("demo", "demo", demo_folder() / "target", "Demo (tiny, to try the app)", machine)
    bundled = [
        folder_row(f"bundled/{folder.name}", folder, folder, f"{folder.name} (in this app)", machine)
        for folder in bundled_folders(resources)
    ]
    return [*bundled, demo, *(alias_row(alias, machine) for alias in ALIASES)]


def bundled_folders(resources: Path | None) -> list[Path]:
    """Models inside the app, by name."""
    folder = None if resources is None else resources / BUNDLED
    if folder is None or not folder.is_dir():
        return []
    return sorted(path.parent for path in folder.glob("*/config.json"))


def folder_row(key: str, name: str | Path, folder: Path, title: str, machine: "Machine") -> ModelRow:
    """A model that is on this disk."""
    from mlx_mtp import MtpError, estimate_memory
    from mlx_mtp.admission import budget_bytes

    try:
        needed = estimate_memory(folder, dtype=None if machine.has_metal else "float32").total
    except MtpError:  # opening it says what is wrong; one row must not hide the others
        needed = None
    fits = needed is not None and needed <= budget_bytes(machine)
    return ModelRow(key=key, name=name, title=title, memory_bytes=needed, fits=fits, is_here=True)


def alias_row(alias: "Alias", machine: "Machine") -> ModelRow:
    """A published model, downloaded or not."""
    from mlx_mtp import MtpError
    from mlx_mtp.admission import budget_bytes
    from mlx_mtp.cache import cached_snapshot
    from mlx_mtp.recommend import estimate_on

    estimate = estimate_on(machine, alias)
    try:
        is_here = cached_snapshot(alias.target) is not None
    except MtpError:  # a damaged copy: as above
        is_here = False
    return ModelRow(
        key=alias.name,
        name=alias.name,
        title=f"Gemma 4 {SIZES[alias.size]}, {STORED[alias.bits]}",
        memory_bytes=estimate.total,
        fits=estimate.total <= budget_bytes(machine),
        is_here=is_here,
        download_bytes=None if alias.download_gb is None else round(alias.download_gb * 1e9),
    )


def first_choice(rows: list[ModelRow], last: str | None) -> int | None:
    """The row to begin with: the last one used, else one in the app, else a downloaded one, else the recommended."""
    from mlx_mtp import MemoryRefusal
    from mlx_mtp.machine import this_machine
    from mlx_mtp.recommend import recommend

    places = {row.key: at for at, row in enumerate(rows)}
    if last in places:
        return places[last]
    here = [at for at, row in enumerate(rows) if row.is_here and row.fits and row.key != "demo"]
    if here:
        return here[0]
    try:
        return places.get(recommend(this_machine()).alias.name)
    except MemoryRefusal:
        return places.get("demo")


def gigabytes(count: float, unit: float = GIB) -> str:
    """Of memory as macOS counts it; downloads are counted in 10^9 bytes."""
    return f"{count / unit:.1f} GB"
