"""What `models list` shows: the cache, and every alias with what it takes on this machine."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from mlx_mtp.cli.layout import table, terminal_columns, wrapped
from mlx_mtp.cli.sizes import bytes_text

if TYPE_CHECKING:
    from mlx_mtp.aliases import Alias
    from mlx_mtp.cache import CachedModel

WIDE = 64  # columns from which the aliases' ids are shown beside them


def as_text() -> str:
    """Tables as wide as the terminal that stdout is."""
    from mlx_mtp.aliases import ALIASES
    from mlx_mtp.cache import list_cached

    columns = terminal_columns(sys.stdout)
    known = [_known(alias) for alias in ALIASES]
    return f"{cached_text(list_cached(), time.time(), columns)}\n\n{_known_text(known, columns)}"


def as_json() -> dict[str, Any]:
    """The same as JSON can hold it, sizes in bytes."""
    from mlx_mtp.aliases import ALIASES
    from mlx_mtp.cache import list_cached

    return {
        "cached": [_cached(model) for model in list_cached()],
        "aliases": [_known(alias) for alias in ALIASES],
    }


def cached_text(cached: Sequence["CachedModel"], now: float, columns: int | None) -> str:
    """Targets and drafters, each in a table of its own; what other programs keep there is only counted."""
    from mlx_mtp.cache import hub_cache

    rows: dict[str, list[list[str]]] = {"target": [], "drafter": []}
    for model in cached:
        if model.kind in rows:
            used = _age(now - model.last_used) if model.is_complete else "partial"
            rows[model.kind].append([bytes_text(model.bytes), used, model.commit[:7], model.repo_id])
            if model.kind == "target":
                rows["target"][-1].insert(0, _alias_of(model.repo_id))
    parts = []
    if rows["target"]:
        parts.append(table(("alias", "size", "used", "commit", "model"), rows["target"], columns, title=4))
    if rows["drafter"]:
        parts.append(table(("size", "used", "commit", "drafter"), rows["drafter"], columns, title=3))
    if not parts:
        parts.append("No model is downloaded yet.")
    total = sum(model.bytes for model in cached)
    others = sum(model.kind == "other" for model in cached)
    foreign = f", {others} of other kinds among them" if others else ""
    if cached:
        parts.append(wrapped(f"{bytes_text(total)} in {hub_cache()}{foreign}", columns))
    return "\n\n".join(parts)


def _known_text(known: Sequence[dict[str, Any]], columns: int | None) -> str:
    from mlx_mtp.admission import budget_bytes, gigabytes
    from mlx_mtp.machine import this_machine
    from mlx_mtp.recommend import CONTEXT

    machine = this_machine()
    header = ("alias", "download", "memory", "fits", "model of mlx-community")
    shown = len(header) if columns is None or columns >= WIDE else len(header) - 1
    rows = [
        [
            alias["name"],
            "?" if alias["download_gb"] is None else f"{alias['download_gb']:.1f} GB",
            gigabytes(alias["memory_bytes"]),
            "yes" if alias["fits"] else "no",
            alias["target"].rpartition("/")[2],
        ][:shown]
        for alias in known
    ]
    memory = (
        f"memory: estimated, with the drafter and {CONTEXT:,} tokens of context; models may take "
        f"{gigabytes(budget_bytes(machine))} of this machine's {gigabytes(machine.memory_bytes)}."
    )
    return "\n".join(
        (
            table(header[:shown], rows, columns, title=0),
            "",
            *(wrapped(line, columns) for line in (memory, *_unverified(known))),
        )
    )


def _unverified(known: Sequence[dict[str, Any]]) -> list[str]:
    if all(alias["verified"] for alias in known):
        return []
    return ["ids and download sizes: from public sources, not checked against the hub (--json names them)."]


def _known(alias: "Alias") -> dict[str, Any]:
    from mlx_mtp.admission import budget_bytes
    from mlx_mtp.machine import this_machine
    from mlx_mtp.recommend import estimate_on

    estimate = estimate_on(this_machine(), alias)
    return {
        **asdict(alias),
        "memory_bytes": estimate.total,
        "fits": estimate.total <= budget_bytes(this_machine()),
    }


def _cached(model: "CachedModel") -> dict[str, Any]:
    return {
        "kind": model.kind,
        "alias": _alias_of(model.repo_id),
        "repo_id": model.repo_id,
        "commit": model.commit,
        "bytes": model.bytes,
        "is_complete": model.is_complete,
        "last_used": datetime.fromtimestamp(model.last_used, timezone.utc).isoformat(timespec="seconds"),
        "path": str(model.path),
    }


def _alias_of(repo_id: str) -> str:
    from mlx_mtp.aliases import ALIASES

    return next((alias.name for alias in ALIASES if alias.target == repo_id), "-")


def _age(seconds: float) -> str:
    """today, 3 d ago, 5 w ago, 2 y ago."""
    days = int(seconds // 86_400)
    if days < 1:
        return "today"
    if days < 14:
        return f"{days} d ago"
    return f"{days // 7} w ago" if days < 700 else f"{days // 365} y ago"
