"""One sample's figures: what an arm's groups took, and what their rounds did."""

import resource
import sys
from typing import Any

from mlx_mtp.measure.clock import Timed
from mlx_mtp.measure.intervals import percentile
from mlx_mtp.stats import Stats


def figures_of(groups: list[Timed]) -> dict[str, Any]:
    """The sums of a sample's groups; first tokens come from the prefill and count as its own."""
    rounds = [seconds for group in groups for seconds in group.round_s]
    gaps = [seconds for group in groups for seconds in group.gap_s]
    prefill, decode = sum(g.prefill_s for g in groups), sum(g.decode_s for g in groups)
    return {
        "prefill_s": prefill,
        "decode_s": decode,
        "total_s": prefill + decode,
        "prompt_tokens": sum(g.prompt_tokens for g in groups),
        "tokens": sum(g.tokens for g in groups),
        "ttft_s": [g.prefill_s for g in groups],
        "round_ms": _percentiles(rounds),
        "gap_ms": _percentiles(gaps),
        "counts": _counts([stats for g in groups for stats in g.stats], len(rounds)),
        "peak_bytes": max(g.peak_bytes for g in groups),
    }


def _percentiles(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {"p50": 1e3 * percentile(seconds, 0.5), "p95": 1e3 * percentile(seconds, 0.95)}


def _counts(rows: list[Stats], passes: int) -> dict[str, Any]:
    """`passes`: rounds of all groups; the others are counted for each row by itself."""
    played = [k for stats in rows for k in stats.num_draft_tokens]
    most = max(played, default=0)
    kept = [
        sum(s.accepted_by_position[i : i + 1][0] for s in rows if len(s.accepted_by_position) > i)
        for i in range(most)
    ]
    return {
        "passes": passes,
        "rounds": sum(stats.rounds for stats in rows),
        "drafted": sum(stats.drafted for stats in rows),
        "accepted": sum(stats.accepted for stats in rows),
        "accepted_by_position": kept,
        "drafted_by_position": [sum(k > i for k in played) for i in range(most)],
        "by_drafts": {str(k): played.count(k) for k in sorted(set(played))},
        "reason": rows[0].reason if rows else None,
    }


def process_peak() -> int:
    """The most that this process ever held, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
