"""Figures after a reply: one line of them, and all of them for `/stats` and `--json`."""

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_mtp.stats import Stats


def short_count(count: int) -> str:
    """999, 3.1k, 32k, 1.2M."""
    if count < 1000:
        return str(count)
    scaled, unit = (count / 1e3, "k") if count < 999_950 else (count / 1e6, "M")
    return f"{scaled:.1f}".removesuffix(".0") + unit


CONTEXT_WARNINGS = ((0.95, "almost full"), (0.8, "filling up"))  # shares of the context


def status_line(stats: "Stats", context_size: int, *, plain_tps: float | None = None) -> str:
    """`412 tok · 38.2 tok/s (plain 24.9, ×1.53) · 2.9 tok/round · accept 71 % · ctx 3.1k/32k · 17.8 GB`, and parking.

    plain_tps: tokens a second without drafts, None where it was not measured.
    """
    speed = f"{stats.generation_tps:.1f} tok/s"
    if plain_tps is not None and stats.drafted and stats.generation_tps:
        speed += f" (plain {plain_tps:.1f}, ×{stats.generation_tps / plain_tps:.2f})"
    parts = [f"{stats.generation_tokens} tok", speed]
    if stats.drafted:
        parts.append(f"{stats.tokens_per_round:.1f} tok/round")
        parts.append(f"accept {100 * stats.draft_acceptance_rate:.0f} %")
    used = stats.prompt_tokens + stats.generation_tokens
    parts.append(f"ctx {short_count(used)}/{short_count(context_size)}")
    if stats.reused_tokens:
        parts.append(f"reused {stats.reused_tokens}")
    if stats.peak_memory_bytes:
        parts.append(f"{stats.peak_memory_bytes / 1e9:.1f} GB")
    if stats.reason is not None:
        parts.append(stats.reason)
    return " · ".join(parts)


def context_warning(stats: "Stats", context_size: int) -> str | None:
    """What to say of a context that comes to its end, None while there is room."""
    share = (stats.prompt_tokens + stats.generation_tokens) / context_size
    for limit, words in CONTEXT_WARNINGS:
        if share >= limit:
            return f"(the context is {words}: over {100 * limit:.0f} % is used; /clear, /undo or a larger --context)"
    return None


def figures(stats: "Stats") -> dict[str, Any]:
    """Every figure by name, as JSON can hold it."""
    return {
        **dataclasses.asdict(stats),
        "tokens_per_round": stats.tokens_per_round,
        "draft_acceptance_rate": stats.draft_acceptance_rate,
    }


def figures_table(stats: "Stats") -> str:
    """`figures`, one a line; the long per-round list is summed up."""
    shown = figures(stats)
    per_round = shown.pop("num_draft_tokens")
    played = {k: per_round.count(k) for k in sorted(set(per_round))}
    shown["rounds by draft tokens"] = ", ".join(f"{k}: {count}" for k, count in played.items()) or "none"
    shown["peak_memory_bytes"] = f"{shown['peak_memory_bytes']:,}"
    lines = []
    for name, value in shown.items():
        if isinstance(value, float):
            value = f"{value:.3g}"
        lines.append(f"{name:24}{value}")
    return "\n".join(lines)
