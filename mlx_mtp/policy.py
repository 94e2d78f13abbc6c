"""How many drafts to verify and to make next round: a fixed number, or what pays by the text and times so far."""

from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple, Protocol

from mlx_mtp.errors import ParameterError
from mlx_mtp.fit import Fit
from mlx_mtp.state import MAX_DRAFT_TOKENS

MIN_GAIN = 1.03  # below this expected gain over plain decoding, drafting is parked
CANDIDATES = (0, 1, 2, 3, 4, 6, 8)
FIRST_TRIES = (4, 4, 0, 0, 4, 2, 0)  # a few rounds of each kind give the first estimates
PROBE_EVERY = 64  # rounds between two looks at whether a parked text would pay again
MEMORY = 0.9  # weight that a round keeps after each later one
RECENT = 9  # rounds of a kind whose median time counts: a busy machine moves it little
PAUSE = (
    10  # so many times what a round can take, compared with others: the machine slept, or the clock jumped
)


class Plan(NamedTuple):
    """What the next round does: verify that many of the pending drafts, then make that many new ones."""

    verify: int
    draft: int


class Policy(Protocol):
    """Chooses a plan each round from what it was told of earlier ones."""

    parked: bool
    reason: str | None

    def plan(self, pending: int) -> Plan: ...

    def observe(self, verified: int, accepted: list[int], seconds: float | None) -> None: ...


@dataclass(slots=True)
class FixedPolicy:
    """The same number of drafts every round, whether they are right or not; 0 is plain decoding."""

    num_draft_tokens: int
    parked: bool = False
    reason: str | None = None
    fit: Fit = field(default_factory=Fit)

    def plan(self, pending: int) -> Plan:
        return Plan(pending, self.num_draft_tokens)

    def observe(self, verified: int, accepted: list[int], seconds: float | None) -> None:
        """A fixed number learns nothing, but a pair that is wired wrongly is noticed."""
        self.fit.observe(verified, accepted)


class AutoPolicy:
    """Plays the number of drafts with the most expected tokens per second, or none where drafting does not pay.

    Acceptance by position is an exponentially weighted average, the time of a round a median; a round that compiled is
    not timed.
    """

    def __init__(self, fit: Fit | None = None) -> None:
        self.parked = False
        self.reason: str | None = None
        self.fit = fit or Fit()
        self._agreed = [1.4] * MAX_DRAFT_TOKENS  # a weak prior of 0.7 at every position
        self._tried = [2.0] * MAX_DRAFT_TOKENS
        self._seconds: dict[int, deque[float]] = {}
        self._rounds = 0
        self._draft = self._choose()

    def plan(self, pending: int) -> Plan:
        # Pending drafts are always verified: those of a probe are how a parked policy learns that a text pays again.
        return Plan(pending, self._draft)

    def observe(self, verified: int, accepted: list[int], seconds: float | None) -> None:
        """One round: drafts verified, drafts accepted per active row, its time (None where it cannot be compared)."""
        self._rounds += 1
        self.fit.observe(verified, accepted)
        for n in accepted:
            for position in range(min(n + 1, verified)):
                self._agreed[position] = MEMORY * self._agreed[position] + (n > position)
                self._tried[position] = MEMORY * self._tried[position] + 1
        if seconds is not None and 0 < seconds < PAUSE * self._most_seconds(verified):
            self._seconds.setdefault(verified, deque(maxlen=RECENT)).append(seconds)
        self._draft = self._choose()

    def expected_tokens(self, k: int) -> float:
        """Tokens a round gives with k drafts: 1 + sum over j of the chance that the first j all agree."""
        total, chance = 1.0, 1.0
        for position in range(k):
            chance *= self._agreed[position] / self._tried[position]
            total += chance
        return total

    def round_seconds(self, k: int) -> float | None:
        """Estimated time of a round, on the line between the nearest measured numbers of drafts.

        More drafts never take less time, so a measured time is at most that of any larger number.
        """
        times: dict[int, float] = {}
        for number in sorted(self._seconds, reverse=True):
            times[number] = min(median(self._seconds[number]), *times.values(), float("inf"))
        known = sorted(times)
        if not known:
            return None
        if k in times or len(known) == 1:
            return times.get(k, times[known[0]])
        low = max((x for x in known[:-1] if x < k), default=known[0])
        high = min(x for x in known if x > low and (x > k or x == known[-1]))
        slope = (times[high] - times[low]) / (high - low)
        return max(times[low] + slope * (k - low), min(times.values()))

    def _most_seconds(self, k: int) -> float:
        """What a round with k drafts takes at most by the times of others: their time, in proportion to its rows."""
        return min(
            (median(times) * max(1, (k + 1) / (other + 1)) for other, times in self._seconds.items()),
            default=float("inf"),
        )

    def _choose(self) -> int:
        if self.fit.warning is not None:
            self.parked = True
            self.reason = f"parked: {self.fit.warning}"
            return FIRST_TRIES[0] if self._rounds and self._rounds % PROBE_EVERY == 0 else 0
        if self._rounds < len(FIRST_TRIES):
            return FIRST_TRIES[self._rounds]
        plain = self.round_seconds(0)
        if plain is None or plain <= 0:
            return FIRST_TRIES[0]
        times = {k: self.round_seconds(k) or plain for k in CANDIDATES}
        gains = {k: self.expected_tokens(k) * plain / times[k] for k in CANDIDATES}
        best = max(gains, key=lambda k: gains[k])
        self.parked = gains[best] < MIN_GAIN
        if not self.parked:
            self.reason = None
            return best
        k = max(CANDIDATES[1:], key=lambda k: gains[k])
        self.reason = (
            f"parked: {k} drafts need {times[k] / plain:.1f} tokens a round to break even, "
            f"this text gives {self.expected_tokens(k):.1f}{self.fit.hint}"
        )
        return k if self._rounds % PROBE_EVERY == 0 else 0


def make_policy(num_draft_tokens: int | str, *, has_drafter: bool, fit: Fit | None = None) -> Policy:
    """The policy for a request: "auto" or 0 .. MAX_DRAFT_TOKENS; anything else is refused.

    `fit` is what the pair's earlier requests say about its drafter.
    """
    if num_draft_tokens == "auto":
        return (
            AutoPolicy(fit)
            if has_drafter
            else FixedPolicy(0, parked=True, reason="parked: no drafter is loaded")
        )
    k = num_draft_tokens
    if not isinstance(k, int) or isinstance(k, bool) or not 0 <= k <= MAX_DRAFT_TOKENS:
        raise ParameterError(
            f'num_draft_tokens must be "auto" or 0 .. {MAX_DRAFT_TOKENS}, got {k!r}; use "auto" to let '
            "the policy choose"
        )
    if k and not has_drafter:
        raise ParameterError(
            f"{k} draft tokens were asked for but the model was loaded without a drafter; "
            'load it with its assistant, or use num_draft_tokens="auto" or 0'
        )
    return FixedPolicy(k, fit=fit or Fit())
