"""How often a draft is right, by position, as the text so far says; recent rounds weigh more."""

from collections.abc import Sequence
from math import log, prod

from mlx_mtp.fit import USUAL
from mlx_mtp.state import MAX_DRAFT_TOKENS

MEMORY = 0.95  # weight that a round with drafts keeps after each later one
IDLE_MEMORY = 0.985  # and after one without: the text may have changed meanwhile
LONG_MEMORY = 0.99  # weight of a first draft in the pair's own average, which stands for what was never tried
DOUBTED = 0.2  # weight that is left of counts from what seems to be another text
UNLIKELY = 0.003  # chance of a row of rounds at which it is another text rather than luck
LEANING = 2.0  # drafts that the expectation of a position counts for, before it was tried


class Acceptance:
    """Exponentially weighted counts; a position that was hardly tried is taken to be like the one before it.

    usual: how often a first draft is right, before this text says so.
    """

    def __init__(self, usual: float = USUAL) -> None:
        self._right = [0.0] * MAX_DRAFT_TOKENS
        self._tried = [0.0] * MAX_DRAFT_TOKENS
        self._long_right, self._long_tried = 3 * usual, 3.0
        self._wrong, self._right_throughout = 0.0, 0.0  # log of the chance of a row of rounds as bad, as good

    def observe(self, verified: int, accepted: Sequence[int]) -> None:
        """A round: drafts verified, drafts accepted in each active row; all rows count as one moment."""
        if verified and accepted:
            self._notice(verified, accepted)
        memory = MEMORY if verified else IDLE_MEMORY
        for position in range(MAX_DRAFT_TOKENS):
            self._right[position] *= memory
            self._tried[position] *= memory
        for n in accepted:
            for position in range(min(n + 1, verified)):
                self._right[position] += n > position
                self._tried[position] += 1
            if verified:
                self._long_right = LONG_MEMORY * self._long_right + (n > 0)
                self._long_tried = LONG_MEMORY * self._long_tried + 1

    def _notice(self, verified: int, accepted: Sequence[int]) -> None:
        """Doubt what is known when rounds one after another are all wrong, or all right, against expectation."""
        chances = self.chances(verified)
        if max(accepted) == 0:
            self._wrong += log(max(1 - chances[0], 1e-3))
        else:
            self._wrong = 0.0
        if min(accepted) == verified:
            self._right_throughout += log(max(prod(chances), 1e-3))
        else:
            self._right_throughout = 0.0
        if self._wrong < log(UNLIKELY):
            self.doubt(1 - USUAL)
        elif self._right_throughout < log(UNLIKELY):
            self.doubt()

    def doubt(self, expected: float = USUAL) -> None:
        """The text seems to be another one: what was seen before hardly counts."""
        self._wrong = self._right_throughout = 0.0
        for counts in (self._right, self._tried):
            counts[:] = [DOUBTED * count for count in counts]
        self._long_right = DOUBTED * self._long_right + 3 * expected
        self._long_tried = DOUBTED * self._long_tried + 3

    def tried(self, position: int = 0) -> float:
        """The weight of what was seen at a position."""
        return self._tried[position]

    def chances(self, k: int) -> list[float]:
        """For each of k positions, the chance that its draft is right if those before it were."""
        chance, all_of_them = self._long_right / self._long_tried, []
        for position in range(k):
            chance = (self._right[position] + LEANING * chance) / (self._tried[position] + LEANING)
            all_of_them.append(chance)
        return all_of_them

    def expected_tokens(self, k: int) -> float:
        """Tokens a round gives with k drafts: 1 + sum over j of the chance that the first j are right."""
        total, reached = 1.0, 1.0
        for chance in self.chances(k):
            reached *= chance
            total += reached
        return total
