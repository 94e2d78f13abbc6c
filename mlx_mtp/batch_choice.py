"""How many rows to decode together and how many drafts to play, chosen at once: one leaves less for the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from mlx_mtp.errors import ParameterError
from mlx_mtp.fit import Fit
from mlx_mtp.round_times import RoundTimes

Goal = Literal["throughput", "latency"]
GOALS: tuple[Goal, ...] = ("throughput", "latency")
Seconds = Callable[[int, int], float]  # of a round, by width and drafts

NEAR = 0.97  # of the best throughput: a narrower batch that reaches it takes less memory
KEPT = 0.8  # of the speed that a reply has alone, which each keeps where latency is the goal
MOST_DRAFTS = 8
AUTO_MOST = 16  # rows, unless more are asked for: each takes memory, and replies get slower
START = {"throughput": 4, "latency": 1}  # rows, while nothing was timed and nothing is predicted
TIMED = 4  # rounds of one kind at a width, from which it is compared with others


@dataclass(frozen=True, slots=True)
class BatchChoice:
    """A width and a number of drafts, and the tokens a second that are expected of all rows together."""

    width: int
    num_draft_tokens: int
    tokens_per_second: float

    @property
    def of_each(self) -> float:
        return self.tokens_per_second / self.width


def check_goal(goal: str) -> Goal:
    """`goal` if it is one; ParameterError otherwise."""
    for own in GOALS:
        if own == goal:
            return own
    raise ParameterError(f'goal must be "throughput" or "latency", got {goal!r}; choose one of the two')


def choose_batch(
    seconds: Seconds,
    expected_tokens: Callable[[int], float],
    *,
    widths: Sequence[int],
    drafts: Sequence[int] = range(MOST_DRAFTS + 1),
    goal: Goal = "throughput",
) -> BatchChoice:
    """The narrowest batch near the best throughput, or the widest in which each reply keeps most of its best speed.

    expected_tokens: of a row and round, by number of drafts. widths, drafts: those that may be chosen. As good as
    `seconds` is.
    """

    def choice(width: int, k: int) -> BatchChoice:
        return BatchChoice(width, k, width * expected_tokens(k) / seconds(width, k))

    best = [
        max((choice(width, k) for k in drafts), key=lambda own: own.tokens_per_second)
        for width in sorted(widths)
    ]
    if goal == "latency":
        enough = KEPT * max(own.of_each for own in best)
        return max((own for own in best if own.of_each >= enough), key=lambda own: own.width)
    enough = NEAR * max(own.tokens_per_second for own in best)
    return next(own for own in best if own.tokens_per_second >= enough)


def measured_seconds(times: RoundTimes, context: int = 0) -> Seconds:
    """What was timed, drafts compared with plain rounds of the same width; widths between two timed ones on a line.

    Beyond them the prior's growth is scaled; where nothing was timed it is the prior alone.
    """
    timed = {width: own for width in times.widths if (own := times.plain_seconds(width)) is not None}

    def prior(width: int) -> float:
        return times.prior.seconds(1, width, context)

    def plain(width: int) -> float:
        for low, high in pairwise(sorted(timed)):
            if low <= width <= high:
                return timed[low] + (width - low) / (high - low) * (timed[high] - timed[low])
        if not timed:
            return prior(width)
        near = min(timed, key=lambda own: abs(own - width))
        return timed[near] * prior(width) / prior(near)

    return lambda width, drafts: plain(width) * times.ratio(drafts, width)


def widths_up_to(most: int) -> list[int]:
    """1, 2, 4, .. and `most`: each width is compiled anew, so that few are better."""
    return sorted({*(1 << i for i in range(most.bit_length())), most})


class WidthChooser:
    """The width of a batch while it runs: from what is known, then by trying the next wider one once.

    `width` is what may be decoded together now, `most` what it never exceeds. A wider batch is tried only while as many
    rows are left, and kept if it was worth it once it was timed.
    """

    def __init__(
        self,
        times: RoundTimes,
        expected_tokens: Callable[[int], float],
        *,
        most: int,
        goal: Goal = "throughput",
        drafts: Sequence[int] = range(MOST_DRAFTS + 1),
        context: int = 0,
    ) -> None:
        self.most, self._times, self._goal, self._context = most, times, goal, context
        self._expected, self._drafts = expected_tokens, drafts
        timed = self._timed()
        if times.has_prior:
            self.width = self._choose(widths_up_to(most))
        elif len(timed) > 1:
            self.width = self._choose(timed)
        else:
            self.width = min(START[goal], most)

    def look(self, left: int) -> int:
        """Choose anew for `left` rows that run or wait -> the width."""
        timed = self._timed()
        if self.width not in timed:
            return self.width
        best, wider = self._choose(timed), self._wider(max(timed))
        # Without a prediction for this machine nothing but a try tells what a wider batch gives.
        if best == max(timed) and wider is not None and left >= wider:
            if not self._times.has_prior or self._choose([*timed, wider]) == wider:
                best = wider
        self.width = best
        return best

    def _timed(self) -> list[int]:
        """Widths of which enough rounds were timed."""
        times = self._times
        return [
            width
            for width in times.widths
            if width <= self.most and any(times.timed(k, width) >= TIMED for k in self._drafts)
        ]

    def _wider(self, width: int) -> int | None:
        """The next width, None beyond the widest."""
        return next((own for own in widths_up_to(self.most) if own > width), None)

    def _choose(self, widths: Sequence[int]) -> int:
        seconds = measured_seconds(self._times, self._context)
        choice = choose_batch(seconds, self._expected, widths=widths, drafts=self._drafts, goal=self._goal)
        return choice.width


def make_chooser(
    times: RoundTimes, fit: Fit, num_draft_tokens: int | str, goal: Goal = "throughput"
) -> WidthChooser:
    """What chooses the width of a batch that is given none; the policy chooses the drafts, if it may.

    times, fit: what the pair's requests so far say of its rounds and of its drafts.
    """
    drafts = [num_draft_tokens] if isinstance(num_draft_tokens, int) else range(MOST_DRAFTS + 1)

    def expected_tokens(k: int) -> float:
        return sum(fit.usual**i for i in range(k + 1))

    return WidthChooser(times, expected_tokens, most=AUTO_MOST, goal=goal, drafts=drafts)
