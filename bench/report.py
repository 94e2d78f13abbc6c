"""What every measurement here shares: alternated arms, medians and spread, and the record of where it ran."""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlx_mtp.machine import this_machine

CPU_LABEL = "host and dispatch overhead and BLAS on a Linux CPU; says nothing about a Mac's GPU"
METAL_LABEL = "on Metal"
PACKAGES = ("mlx", "mlx-lm", "mlx-vlm", "numpy")


@dataclass(frozen=True, slots=True)
class Run:
    """One timed run of one arm: the tokens that prove it did the same work, and what the clock said."""

    tokens: list[int]
    seconds: float
    notes: dict[str, float]  # rounds, accepted drafts and the like


def alternate(
    arms: Mapping[str, Callable[[], Run]], *, repeats: int, warm_ups: int = 1
) -> dict[str, list[Run]]:
    """Run the arms A B .. A B .., the first `warm_ups` passes discarded; refuse arms that disagree on the tokens."""
    runs: dict[str, list[Run]] = {name: [] for name in arms}
    for turn in range(warm_ups + repeats):
        print(f"pass {turn + 1} of {warm_ups + repeats}", file=sys.stderr, flush=True)
        for name, arm in arms.items():
            run = arm()
            if turn >= warm_ups:
                runs[name].append(run)
    refuse_different_text(runs)
    return runs


def refuse_different_text(runs: Mapping[str, list[Run]]) -> None:
    """Times of different texts cannot be compared: end with exit code 1 and name the first difference."""
    first_name, first = next((name, own[0]) for name, own in runs.items())
    for name, own in runs.items():
        for run in own:
            if run.tokens != first.tokens:
                at = next(
                    (i for i, (a, b) in enumerate(zip(run.tokens, first.tokens, strict=False)) if a != b),
                    min(len(run.tokens), len(first.tokens)),
                )
                sys.exit(
                    f"{name} and {first_name} give different tokens from number {at} on: nothing is reported"
                )


def milliseconds_a_token(runs: list[Run], timed: int) -> dict[str, Any]:
    """Median and extremes over the runs of `timed` tokens each (those that prefill gives are not timed)."""
    return spread([1e3 * run.seconds / timed for run in runs])


def spread(values: list[float]) -> dict[str, Any]:
    """Median, smallest, largest and all values, to four digits."""
    return {
        "median": rounded(statistics.median(values)),
        "min": rounded(min(values)),
        "max": rounded(max(values)),
        "all": [rounded(value) for value in values],
    }


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def record(what: str, settings: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """The results with everything needed to judge or repeat them."""
    return {
        "what": what,
        "label": METAL_LABEL if this_machine().has_metal else CPU_LABEL,
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        "results": results,
    }


def machine() -> dict[str, Any]:
    """System, processor, cores that this process may use, and how busy they are."""
    here = this_machine()
    allowed = os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)
    return {
        "system": platform.platform(),
        "processor": here.chip,
        "gpu_cores": here.gpu_cores,
        "memory_bytes": here.memory_bytes,
        "cores": len(allowed),
        "load_average": [rounded(value) for value in os.getloadavg()],
    }


def commit() -> str:
    """What was measured; a working copy with changes says so."""
    root = Path(__file__).parent.parent
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return said.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def save(result: dict[str, Any], path: Path | None) -> None:
    """Write the record as JSON where asked."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {path}")
