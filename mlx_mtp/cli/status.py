"""The one line after a reply: how much, how fast, and whether drafting helped."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_mtp.stats import Stats


def short_count(count: int) -> str:
    """999, 3.1k, 32k, 1.2M."""
    if count < 1000:
        return str(count)
    scaled, unit = (count / 1e3, "k") if count < 999_950 else (count / 1e6, "M")
    return f"{scaled:.1f}".removesuffix(".0") + unit


def status_line(stats: "Stats", context_used: int, context_size: int) -> str:
    """`412 tok · 38.2 tok/s · 2.9 tok/round · accept 71 % · ctx 3.1k/32k · reused 812`, and any parking."""
    parts = [f"{stats.generation_tokens} tok", f"{stats.generation_tps:.1f} tok/s"]
    if stats.drafted:
        parts.append(f"{stats.tokens_per_round:.1f} tok/round")
        parts.append(f"accept {100 * stats.draft_acceptance_rate:.0f} %")
    parts.append(f"ctx {short_count(context_used)}/{short_count(context_size)}")
    if stats.reused_tokens:
        parts.append(f"reused {stats.reused_tokens}")
    if stats.parked:
        parts.append(f"MTP parked: {stats.reason}")
    return " · ".join(parts)
