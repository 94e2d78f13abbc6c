"""How often a draft is right, by what this text has shown so far and by how often texts change: a filter.

A text is taken to have one chance with which a draft is right while those before it in its round were, and to change
into another kind of text now and then. What is kept is how likely each of a few such chances is now. So rounds that do
not fit what was seen outweigh it within a few, and what was seen long ago no longer counts.
"""

from collections.abc import Sequence
from math import exp, log
from operator import mul

from mlx_mtp.fit import USUAL
from mlx_mtp.state import MAX_DRAFT_TOKENS

CHANCES = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.78, 0.86, 0.92, 0.97)
SPREAD = 1.0  # of texts about the usual one, in log odds
ANY = 0.4  # share of texts that are of any kind
CHANGE = 0.004
IDLE_CHANGE = 0.002
BELIEF = (
    0.8  # power of what a round says: rounds next to each other are alike, so they say less than they seem to
)
MEMORY = 0.98  # weight that counts by position keep with each round of drafts
LEANING = 3.0  # drafts that a position is taken to have been like the one before it for

USED = 8  # positions computed at once
LOGS = [(log(a), log(1 - a)) for a in CHANCES]
POWERS = [[a**j for a in CHANCES] for j in range(MAX_DRAFT_TOKENS + 1)]


class Acceptance:
    """Chances by position from what was accepted; a position that was hardly tried is like the one before it.

    usual: how often a first draft is right, before this text says so.
    """

    def __init__(self, usual: float = USUAL) -> None:
        self._any_text = _texts(usual)
        self._likely = list(self._any_text)
        self._right = [0.0] * MAX_DRAFT_TOKENS
        self._expected = [0.0] * MAX_DRAFT_TOKENS  # of those tried, by the filter alone
        self._faded = 1.0  # of what was counted by position, since drafts were last seen
        self._tried = 0.0
        self._reached: list[float] = []

    def observe(self, verified: int, accepted: Sequence[int]) -> None:
        """A round: drafts verified, drafts accepted in each active row; all rows count as one moment."""
        self._reached = []
        if not verified:
            self._faded *= 1 - IDLE_CHANGE
        elif accepted:
            self._count(verified, accepted)
            self._learn(verified, accepted)
            self._tried = MEMORY * self._tried + len(accepted)
        change = CHANGE if verified else IDLE_CHANGE
        self._likely = [
            own + change * (new - own) for own, new in zip(self._likely, self._any_text, strict=True)
        ]

    def _learn(self, verified: int, accepted: Sequence[int]) -> None:
        """What makes this round likely becomes likelier itself."""
        right = BELIEF * sum(min(n, verified) for n in accepted)
        wrong = BELIEF * sum(n < verified for n in accepted)
        logs = [right * good + wrong * bad for good, bad in LOGS]
        most = max(logs)
        likely = [own * exp(one - most) for own, one in zip(self._likely, logs, strict=True)]
        total = sum(likely)
        self._likely = [own / total for own in likely]

    def _count(self, verified: int, accepted: Sequence[int]) -> None:
        """Right drafts by position, and how many the filter expected."""
        expected = conditional(self._alike(verified))
        kept, self._faded = MEMORY * self._faded, 1.0
        for position in range(MAX_DRAFT_TOKENS):
            self._right[position] *= kept
            self._expected[position] *= kept
        for n in accepted:
            for position in range(min(n + 1, verified)):
                self._right[position] += n > position
                self._expected[position] += expected[position]

    def tried(self) -> float:
        """The weight of rounds with drafts that were seen."""
        return self._tried

    def chances(self, k: int) -> list[float]:
        """For each of k positions, the chance that its draft is right if those before it were."""
        return conditional(self._reach(k))

    def expected_tokens(self, k: int) -> float:
        """Tokens a round gives with k drafts: 1 + sum over j of the chance that the first j are right."""
        return 1.0 + sum(self._reach(k))

    def _reach(self, k: int) -> list[float]:
        """For 1 .. k drafts, the chance that all of them are right."""
        if len(self._reached) < k:
            more, reached, self._reached = 1.0, 1.0, []
            positions = max(k, USED)
            leaning = LEANING / self._faded
            for position, chance in enumerate(conditional(self._alike(positions))):
                more = (self._right[position] + leaning * more) / (self._expected[position] + leaning)
                reached *= min(chance * more, 0.995)
                self._reached.append(reached)
        return self._reached[:k]

    def _alike(self, k: int) -> list[float]:
        """The same if drafts at all positions were alike."""
        return [sum(map(mul, self._likely, POWERS[j])) for j in range(1, k + 1)]


def _texts(usual: float) -> list[float]:
    """How likely each chance is in a text of which nothing is known."""
    middle = min(max(usual, 0.03), 0.95)
    near = [exp(-(((_odds(a) - _odds(middle)) / SPREAD) ** 2) / 2) for a in CHANCES]
    return [(1 - ANY) * own / sum(near) + ANY / len(CHANCES) for own in near]


def _odds(chance: float) -> float:
    return log(chance / (1 - chance))


def conditional(reached: Sequence[float]) -> list[float]:
    """Of each position, the chance that it is right if those before it were."""
    return [own / before for own, before in zip(reached, (1.0, *reached), strict=False)]
