"""What an earlier run found of how long rounds take, read from JSON: checked number by number."""

from collections.abc import Mapping
from typing import Any

from mlx_mtp.state import MAX_DRAFT_TOKENS

# Of each width a plain round's seconds and the ratios of numbers of drafts; experts by rows; the tax of plain rounds.
KeptTimes = tuple[dict[int, tuple[float | None, dict[int, float]]], dict[int, float], float | None]


def read_kept_times(kept: Mapping[str, Any]) -> KeptTimes:
    """The parts of what `RoundTimes.to_json` gave; ValueError where it is no such thing."""
    try:
        if set(kept) != {"widths", "distinct_experts", "plain_tax"}:
            raise ValueError(f"fields {sorted(kept)}")
        widths = {
            _number(batch, 1, 4096): (
                None if one["plain_seconds"] is None else _real(one["plain_seconds"], 1e-6, 3600),
                {_number(k, 1, MAX_DRAFT_TOKENS): _real(r, 0.5, 1000) for k, r in one["ratios"].items()},
            )
            for batch, one in kept["widths"].items()
        }
        experts = {
            _number(rows, 1, 10**6): _real(n, 0, 10**6) for rows, n in kept["distinct_experts"].items()
        }
        tax = None if kept["plain_tax"] is None else _real(kept["plain_tax"], 0.01, 100)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not the times of rounds: {error!r}") from None
    return widths, experts, tax


def _number(text: Any, low: int, high: int) -> int:
    value = int(text)
    if not low <= value <= high:
        raise ValueError(f"{value} is not in {low} .. {high}")
    return value


def _real(value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{value!r} is not in {low} .. {high}")
    return float(value)
