"""What the times of a pair's rounds mean: where drafting breaks even, and what pays for which share of right drafts.

Everything here is worked out from `RoundTimes`; nothing is measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mlx_mtp.batch_choice import GOALS, BatchChoice, Goal, choose_batch, measured_seconds, widths_up_to
from mlx_mtp.policy import CANDIDATES, MIN_GAIN
from mlx_mtp.round_times import RoundTimes

# Shares of right drafts, each given that those before it were.
LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
BATCH_LEVELS = (0.5, 0.7, 0.9)
MAX_WIDTH = 8  # rows that a batch is chosen from; 4 to 8 suit most machines

Known = Literal["timed", "between", "expected"]


@dataclass(frozen=True, slots=True)
class Point:
    """A round with so many drafts. Its time in the fastest plain rounds is also the tokens at which it breaks even."""

    drafts: int
    seconds: float | None  # None where no round was timed
    break_even: float
    pays_from: (
        float | None
    )  # share of right drafts from which it is faster than plain decoding; None: from none
    known: Known  # between two that were timed; expected from published figures


@dataclass(frozen=True, slots=True)
class Choice:
    """What `auto` comes to on a text with this share of right drafts; 0 drafts: parked."""

    acceptance: float
    drafts: int
    tokens_per_round: float
    gain: float  # speed over that of the fastest plain decoding there is, exact or not


@dataclass(frozen=True, slots=True)
class Width:
    """What a batch is expected to do best with; widths that were never timed are taken to grow as expected."""

    goal: Goal
    acceptance: float
    choice: BatchChoice


def expected_tokens(acceptance: float) -> Callable[[int], float]:
    """Tokens of a round by number of drafts, if each is right with this chance once those before it were."""

    def tokens(drafts: int) -> float:
        return sum(acceptance**j for j in range(drafts + 1))

    return tokens


def curve_of(times: RoundTimes) -> list[Point]:
    """Every number of drafts that `auto` considers."""
    plain, measured = times.usual_seconds(), times.measured()

    def point(drafts: int) -> Point:
        ratio = times.ratio(drafts)
        break_even = ratio * tax_of(times)
        known: Known = "expected"
        if drafts in measured or (not drafts and plain is not None):
            known = "timed"
        elif measured and drafts < max(measured):
            known = "between"
        seconds = None if plain is None else plain * ratio
        return Point(drafts, seconds, break_even, share_needed(drafts, break_even), known)

    return [point(drafts) for drafts in CANDIDATES]


def tax_of(times: RoundTimes) -> float:
    """How many times longer our plain rounds take than the fastest there are; 1 where they are the fastest."""
    return max(times.plain_tax or 1.0, 1.0)


def share_needed(drafts: int, ratio: float) -> float | None:
    """The least share of right drafts at which a round that takes `ratio` plain rounds gives as many tokens."""
    if not drafts or ratio >= drafts + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle)(drafts) < ratio else (low, middle)
    return high


def choices_of(times: RoundTimes) -> list[Choice]:
    """For each of `LEVELS`, the number of drafts with the most tokens a second, or none where that gains too little."""
    return [_choice(times, level) for level in LEVELS]


def _choice(times: RoundTimes, acceptance: float) -> Choice:
    tokens = expected_tokens(acceptance)

    def gain(drafts: int) -> float:
        return tokens(drafts) / (times.ratio(drafts) * tax_of(times))

    best = max(CANDIDATES, key=gain)
    if gain(best) < MIN_GAIN:
        best = 0
    return Choice(acceptance, best, tokens(best), gain(best))


def widths_of(times: RoundTimes) -> list[Width]:
    """Width and drafts of a batch, for both goals; [] where nothing says how long a round takes."""
    usual = times.usual_seconds()
    if usual is None and not times.has_prior:
        return []
    relative, widths = measured_seconds(times), widths_up_to(MAX_WIDTH)
    scale = (
        1.0 if usual is None else usual / relative(1, 0)
    )  # times of an earlier run have no part in `relative`

    def seconds(width: int, drafts: int) -> float:
        return scale * relative(width, drafts)

    return [
        Width(goal, level, choose_batch(seconds, expected_tokens(level), widths=widths, goal=goal))
        for goal in GOALS
        for level in BATCH_LEVELS
    ]
