"""What the times of a pair's rounds mean: where drafting breaks even, and what pays for which share of right drafts.

Everything here is worked out from `RoundTimes`; nothing is measured.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from mlx_mtp.batch_choice import BatchChoice, Goal, choose_batch, predicted_seconds
from mlx_mtp.cost import UNKNOWN, CostModel, independent_experts
from mlx_mtp.policy import CANDIDATES, MIN_GAIN
from mlx_mtp.round_times import RoundTimes

LEVELS = (
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.9,
    0.95,
)  # shares of right drafts, each given that those before it were
BATCH_LEVELS = (0.5, 0.7, 0.9)
GOALS: tuple[Goal, ...] = ("throughput", "latency")
MAX_WIDTH = 8  # rows that a batch is chosen from; 4 to 8 suit most machines

Known = Literal["measured", "between", "expected"]


@dataclass(frozen=True, slots=True)
class Point:
    """A round with so many drafts. Its time in plain rounds is also the tokens at which it breaks even."""

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
    gain: float  # speed over that of plain decoding


@dataclass(frozen=True, slots=True)
class Width:
    """What a batch is expected to take best: a prediction from rounds of one row."""

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
    plain, measured = times.plain_seconds(), times.measured()

    def point(drafts: int) -> Point:
        ratio = times.ratio(drafts)
        known: Known = "expected"
        if drafts in measured or (not drafts and plain is not None):
            known = "measured"
        elif measured and drafts < max(measured):
            known = "between"
        seconds = None if plain is None else plain * ratio
        return Point(drafts, seconds, ratio, share_needed(drafts, ratio), known)

    return [point(drafts) for drafts in CANDIDATES]


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
        return tokens(drafts) / times.ratio(drafts)

    best = max(CANDIDATES, key=gain)
    if gain(best) < MIN_GAIN:
        best = 0
    return Choice(acceptance, best, tokens(best), gain(best))


def widths_of(times: RoundTimes) -> list[Width]:
    """Width and drafts of a batch, for both goals; [] where nothing says how long a round takes."""
    cost = fitted_cost(times)
    if cost is None:
        return []
    return [
        Width(
            goal,
            level,
            choose_batch(
                predicted_seconds(cost), expected_tokens(level), widths=range(1, MAX_WIDTH + 1), goal=goal
            ),
        )
        for goal in GOALS
        for level in BATCH_LEVELS
    ]


def fitted_cost(times: RoundTimes) -> CostModel | None:
    """The prior, scaled to what rounds of one row took: their time as a whole, and apart from it how it grows.

    None where neither a round was timed nor anything is published of the chip.
    """
    plain, measured, prior = times.plain_seconds(), times.measured(), times.prior
    if plain is None:
        return None if prior == UNKNOWN else prior
    scale = plain / prior.seconds(1)
    if not measured:
        return _grown(prior, scale, 1.0)
    # By least squares: how much steeper rounds are than expected.
    pairs = [(prior.ratio(drafts) - 1, times.ratio(drafts) - 1) for drafts in measured]
    growth = sum(x * y for x, y in pairs) / sum(x * x for x, _ in pairs)
    return _grown(prior, scale, growth)


def _grown(prior: CostModel, scale: float, growth: float) -> CostModel:
    """Everything `scale` times as long, and what comes with rows and drafts `growth` times beyond that."""
    one_row = independent_experts(1, prior.experts, prior.top_k)
    return replace(
        prior,
        launch_s=scale * prior.launch_s,
        # A row's own experts are part of a plain round, whose time stands.
        weights_s=scale * max(0.0, prior.weights_s + (1 - growth) * prior.expert_s * one_row),
        row_s=scale * growth * prior.row_s,
        expert_s=scale * growth * prior.expert_s,
        context_s_per_token=scale * prior.context_s_per_token,
        draft_s=scale * growth * prior.draft_s,
    )
