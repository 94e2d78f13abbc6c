"""What a run's figures hold for: machine, power, versions, model files, quantisation, kernels, prompts."""

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_mtp
from mlx_mtp.headers import weight_files
from mlx_mtp.kept_quantized import seal_of
from mlx_mtp.kernels.operations import format_of
from mlx_mtp.machine import this_machine
from mlx_mtp.measure.conditions import Machine as Conditions
from mlx_mtp.measure.workloads import PROMPT_SET, prompt_set_hash
from mlx_mtp.pair import Pair

PACKAGES = ("mlx", "mlx-lm", "numpy")
OWN_VERSION = "versions.mlx-mtp"  # may differ between runs that are compared: that is what is compared


def fingerprint(pair: Pair, conditions: Conditions) -> dict[str, Any]:
    """Everything but the settings; reads a megabyte and samples of each weight file."""
    machine = this_machine()
    found = pair.exactness()
    return {
        "machine": {**asdict(machine), "processors": os.cpu_count()},
        "device": str(mx.default_device().type).rpartition(".")[2],
        "power": {"source": conditions.power, "low_power": conditions.low_power},
        "versions": {
            "mlx-mtp": mlx_mtp.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "target": _files(pair.folder) | {"format": format_of(pair.target.embedding)},
        "drafter": None
        if pair.drafter is None
        else _files(pair.drafter_folder) | {"format": format_of(pair.drafter.embedding)},
        "dtype": str(pair.target.dtype).rpartition(".")[2],
        "kernels": {
            "ours": sorted(str(row.operation) for row in pair.kernel_table if row.by == "ours"),
            "stock": sorted(str(row.operation) for row in pair.kernel_table if row.by == "stock"),
        },
        "preloaded": Path(os.environ.get("LD_PRELOAD", "")).name or None,
        "promise": found.promise if found.holds or found.promise == "b" else "b",
        "prompts": {"version": PROMPT_SET, "hash": prompt_set_hash()},
    }


def _files(folder: Path | None) -> dict[str, Any]:
    """Revision on the hub, where the folder is one of its cache's, and hashes of configuration and weights."""
    if folder is None:
        return {"revision": None, "files": {}}
    is_snapshot = folder.parent.name == "snapshots"
    files = [folder / "config.json", *weight_files(folder)[0]]
    return {
        "revision": folder.name if is_snapshot else None,
        "files": {file.name: seal_of(file)[:16] for file in files if file.is_file()},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Where two fingerprints differ, as `machine.chip: Apple M2, Apple M4`; our own version does not count."""
    left, right = dict(_flat(one)), dict(_flat(other))
    return [
        f"{name}: {left.get(name)}, {right.get(name)}"
        for name in sorted(left.keys() | right.keys())
        if name != OWN_VERSION and left.get(name) != right.get(name)
    ]


def _flat(value: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, entry in value.items():
        if isinstance(entry, Mapping):
            pairs += _flat(entry, f"{before}{name}.")
        else:
            pairs.append((f"{before}{name}", entry))
    return pairs
