"""How many rows to decode together and how many drafts to play, chosen at once: one leaves less for the other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mlx_mtp.cost import CostModel

Goal = Literal["throughput", "latency"]

NEAR = 0.97  # of the best throughput: a narrower batch that reaches it takes less memory
KEPT = 0.8  # of the speed that a reply has alone, which each keeps where latency is the goal


@dataclass(frozen=True, slots=True)
class BatchChoice:
    """A width and a number of drafts, and the tokens a second that are expected of all rows together."""

    width: int
    num_draft_tokens: int
    tokens_per_second: float

    @property
    def of_each(self) -> float:
        return self.tokens_per_second / self.width


def choose_batch(
    cost: CostModel,
    expected_tokens: Callable[[int], float],
    *,
    max_batch: int,
    context: int = 0,
    goal: Goal = "throughput",
    most_drafts: int = 8,
) -> BatchChoice:
    """The narrowest batch near the best throughput, or the widest in which each reply keeps most of its own speed.

    expected_tokens: of a row and round, by number of drafts. context: tokens of each row. A prediction as good as
    `cost` is.
    """
    best = [
        _best_of_width(cost, expected_tokens, width, context, most_drafts)
        for width in range(1, max_batch + 1)
    ]
    if goal == "latency":
        return max((own for own in best if own.of_each >= KEPT * best[0].of_each), key=lambda own: own.width)
    enough = NEAR * max(own.tokens_per_second for own in best)
    return next(own for own in best if own.tokens_per_second >= enough)


def _best_of_width(
    cost: CostModel, expected_tokens: Callable[[int], float], width: int, context: int, most_drafts: int
) -> BatchChoice:
    def choice(drafts: int) -> BatchChoice:
        seconds = cost.seconds(drafts + 1, width, context, drafts)
        return BatchChoice(width, drafts, width * expected_tokens(drafts) / seconds)

    return max(map(choice, range(most_drafts + 1)), key=lambda own: own.tokens_per_second)
