"""How far predicted gains are from published ones: in all, by model and source, and with one thing taken away."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from predicted_gains import Predicted, predict
from published_gains import GAINS, Gain
from sim_texts import tokens_of

SPREAD = 1.10  # implied costs of one setup that differ by more are listed


def score(rows: Sequence[Predicted]) -> tuple[float | None, int, int]:
    """Median error of the rows with a value (None without any); rows on the right side of 1.0, rows that have one."""
    errors = [abs(row.stock / row.gain.value - 1) for row in rows if row.gain.value is not None]
    sided = [row for row in rows if row.gain.pays is not None]
    right = sum((row.stock > 1) == row.gain.pays for row in sided)
    return statistics.median(errors) if errors else None, right, len(sided)


def project(gain: Gain) -> str:
    """Who published it: one project's pages count as one source."""
    return (
        gain.source.split(" #")[0]
        .split(",")[0]
        .removesuffix(" docs/benchmarks.md")
        .removesuffix(" gemma4-31b-mtp-exactness")
    )


def by_source(rows: Sequence[Predicted]) -> dict[str, tuple[list[Predicted], list[Predicted]]]:
    """For each source its rows and all others."""
    names = dict.fromkeys(project(row.gain) for row in rows)
    return {
        name: (
            [row for row in rows if project(row.gain) == name],
            [row for row in rows if project(row.gain) != name],
        )
        for name in names
    }


HOST, BOTH = "time of the host", "these two"
BY_TEXT = "each source's own acceptance"


def _by_text(gain: Gain) -> Gain:
    return replace(gain, tokens=None, accepted=None)


# What each input that is not a chip's or a model's does: the same rows without it.
WITHOUT: dict[str, Callable[[Gain], Predicted]] = {
    HOST: lambda gain: predict(gain, has_host=False),
    "bfloat16 dearer on M1 and M2": lambda gain: predict(gain, is_emulated=False),
    BOTH: lambda gain: predict(gain, has_host=False, is_emulated=False),
    "old MLX where it was old": lambda gain: predict(replace(gain, has_wide=True)),
    BY_TEXT: lambda gain: predict(_by_text(gain)),
    "all of these": lambda gain: predict(
        replace(_by_text(gain), has_wide=True), has_host=False, is_emulated=False
    ),
}


def without() -> dict[str, list[Predicted]]:
    """All rows, predicted again with one thing taken away."""
    return {name: [predict_one(gain) for gain in GAINS] for name, predict_one in WITHOUT.items()}


def implied_cost(row: Predicted) -> float:
    """Of a round, in plain steps, by what was published: tokens a round over the gain."""
    assert row.gain.value is not None
    return tokens_of(row.chance, row.gain.drafts) / row.gain.value


def contradictions(rows: Sequence[Predicted]) -> list[tuple[Gain, list[float]]]:
    """Setups for which one source's own figures imply rounds of different cost, which no prediction can meet."""
    setups = defaultdict(list)
    for row in rows:
        if row.gain.value is not None and row.gain.has_acceptance:
            same = replace(row.gain, text="", value=None, tokens=None, accepted=None, note="")
            setups[same].append(row)
    found = []
    for own in setups.values():
        costs = sorted(implied_cost(row) for row in own)
        if costs[-1] > SPREAD * costs[0]:
            found.append((own[0].gain, costs))
    return found
