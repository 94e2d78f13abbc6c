"""How many drafts to verify and to make next round: a fixed number, or what pays by the text and times so far."""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from mlx_mtp.acceptance import Acceptance
from mlx_mtp.cost import UNKNOWN
from mlx_mtp.errors import ParameterError
from mlx_mtp.fit import Fit
from mlx_mtp.probing import Probing
from mlx_mtp.round_times import RoundTimes
from mlx_mtp.state import MAX_DRAFT_TOKENS

MIN_GAIN = 1.03  # below this expected gain over plain decoding, drafting is parked
RESUME_GAIN = 1.05  # from which it is taken up again
TRIAL_GAIN = 0.97  # from which a look that paid goes on
OPTIMISM = 1.0  # spreads by which a number of drafts may take less than expected, when one is chosen
MARGIN = 1.015  # by which another number of drafts must be better than the one that is played
NEAR = 0.85  # of the best expected gain, below which a number is not played for that
CANDIDATES = tuple(range(9))
BEYOND = 3  # times the largest number that was timed, that may be played: six times lost twenty plain rounds at once
OPENING_LOSS = 1.0  # plain rounds lost by a first round with drafts at most, if each row costs one after all
LARGER, LARGER_GAIN = (
    4,
    1.2,
)  # drafts that are timed although fewer do not pay, if they would with so much gain
CLOSE, BY_OTHERS = 1.06, 1.05  # times a gain that must be above the one that is played, for a second look
SECOND_LOOK, LOOK_GAIN = 4, 1.1  # rounds of it, and the gain of what is played from which there is one
PROBE_EVERY = 64  # rounds between two looks at a drafter that seems to be another model's


class Plan(NamedTuple):
    """What the next round does: verify that many of the pending drafts, then make that many new ones."""

    verify: int
    draft: int


class Policy(Protocol):
    """Chooses a plan each round from what it was told of earlier ones."""

    parked: bool
    reason: str | None

    def plan(self, pending: int) -> Plan: ...

    def observe(
        self,
        verified: int,
        accepted: list[int],
        seconds: float | None,
        *,
        drafted: int | None = None,
        batch: int | None = None,
        distinct: float | None = None,
    ) -> None: ...


@dataclass(slots=True)
class FixedPolicy:
    """The same number of drafts every round, whether they are right or not; 0 is plain decoding."""

    num_draft_tokens: int
    parked: bool = False
    reason: str | None = None
    fit: Fit = field(default_factory=Fit)
    times: RoundTimes = field(default_factory=RoundTimes)

    def plan(self, pending: int) -> Plan:
        return Plan(pending, self.num_draft_tokens)

    def observe(
        self,
        verified: int,
        accepted: list[int],
        seconds: float | None,
        *,
        drafted: int | None = None,
        batch: int | None = None,
        distinct: float | None = None,
    ) -> None:
        """A fixed number changes nothing, but a pair that is wired wrongly is noticed, and its times are kept."""
        self.fit.observe(verified, accepted)
        if accepted:
            width = batch or len(accepted)
            self.times.observe(verified, seconds, drafted=drafted, batch=width, distinct=distinct)


class AutoPolicy:
    """Plays the number of drafts with the most expected tokens per second, or none where drafting does not pay.

    It compares with our own plain rounds: they are what is played instead, also where there is a faster plain path
    that is not exact (`plain_tax`). What it tries beyond what seems best `Probing` pays for. No clocks and no chance
    in here: it is told all that it knows.
    """

    def __init__(self, times: RoundTimes | None = None, fit: Fit | None = None) -> None:
        self.parked = False
        self.reason: str | None = None
        self.fit = fit or Fit()
        self.times = times or RoundTimes()
        self.acceptance = Acceptance(self.fit.usual)
        self._probing = Probing(self.times)
        self._draft = 0
        self._script: deque[int] = deque()  # drafts of the next rounds, whatever is best
        self._batch, self._rounds = 1, 0
        self._is_trial = False  # the last look at a parked text paid
        self._decide()

    @property
    def plain_tax(self) -> float | None:
        """Time of our plain rounds over that of the fastest plain path there is; None: not measured."""
        return self.times.plain_tax

    def plan(self, pending: int) -> Plan:
        # Pending drafts are always verified: those of a probe are how a parked policy learns that a text pays again.
        return Plan(pending, self._script.popleft() if self._script else self._draft)

    def observe(
        self,
        verified: int,
        accepted: list[int],
        seconds: float | None,
        *,
        drafted: int | None = None,
        batch: int | None = None,
        distinct: float | None = None,
    ) -> None:
        """One round: drafts verified, drafts accepted per active row, its time (None where it cannot be compared).

        drafted: drafts made in it for the next one; None: the time is that of a round which makes what it verifies.
        batch: rows computed, those that have ended included. distinct: experts read in a layer, where counted.
        """
        if not accepted:
            return
        self._rounds += 1
        before, self._batch = self._batch, batch or len(accepted)
        if self._batch != before and self._rounds > 1:
            self._probing.width_changes()
        self.fit.observe(verified, accepted)
        self.acceptance.observe(verified, accepted)
        self.times.observe(verified, seconds, drafted=drafted, batch=self._batch, distinct=distinct)
        tokens, ratio = 1 + sum(accepted) / len(accepted), self.times.ratio(verified, self._batch)
        if not self.times.is_known(self._batch):
            ratio = max(ratio, UNKNOWN.ratio(verified))  # gains that a prior promises pay for nothing
        self._probing.observe(tokens, tokens - ratio if verified else 0.0, is_try=self.parked)
        if self.parked and verified and tokens >= RESUME_GAIN * ratio:
            self._is_trial = True
            self._probing.look_paid()
        if verified or not self._rests():
            self._decide()

    def expected_tokens(self, k: int) -> float:
        """Tokens that a round with k drafts gives on this text."""
        return self.acceptance.expected_tokens(k)

    def gain(self, k: int) -> float:
        """Speed with k drafts over that of our plain rounds, as expected on this text."""
        return self.expected_tokens(k) / self.times.ratio(k, self._batch)

    def _rests(self) -> bool:
        """Whether a parked text has nothing to weigh yet, as after most plain rounds."""
        is_waiting = self.parked and not (self._is_trial or self._script or self.fit.warning)
        return is_waiting and not self._probing.is_look_due() and self.times.is_known(self._batch)

    def _decide(self) -> None:
        """Set what the next rounds draft."""
        if self.fit.warning is not None:
            self._park(f"parked: {self.fit.warning}")
            if self._rounds and self._rounds % PROBE_EVERY == 0 and not self._script:
                self._script.append(2)
            return
        if self._script:
            return
        if self._probing.is_opening(self._batch):
            self._script.extend(self._probing.opening(self._batch, self._opening_drafts()))
            return
        best = max(self._allowed(), key=self.gain)
        needed = MIN_GAIN
        if self.parked and self._rounds:
            # A parked text is expected to become a usual one with time: it is taken up when a look says so.
            needed = RESUME_GAIN if self._is_trial else math.inf
        if self.gain(best) >= needed:
            self._play(best)
        else:
            self._park(self._explanation(best))
            self._probe(best)

    def _opening_drafts(self) -> int:
        """The best number by the chip's prior of which not too much is lost if that is wrong; 1 without one."""
        able = [k for k in CANDIDATES[1:] if UNKNOWN.ratio(k) - self.expected_tokens(k) <= OPENING_LOSS]
        return max(able, key=self.gain) if able and self.times.has_prior and self._batch == 1 else 1

    def _allowed(self) -> list[int]:
        """Numbers of drafts near enough to those that were timed."""
        measured = self.times.measured(self._batch)
        most = BEYOND * max(measured) if measured else 2
        return [k for k in CANDIDATES if 0 < k <= most]

    def _play(self, best: int) -> None:
        if self.parked or not self._draft:
            self._probing.drafting_starts()
        self.parked, self.reason, self._is_trial = False, None, False
        near = [k for k in self._allowed() if self.gain(k) >= NEAR * self.gain(best)]
        best = max(near, key=self._promise)
        if not self._draft or self._promise(best) > MARGIN * self._promise(self._draft):
            self._draft = best
        if self._probing.looks_at_plain_rounds(self.gain(self._draft), self._batch):
            self._script.extend((0, 0))
        elif self.gain(self._draft) >= LOOK_GAIN and self._probing.is_second_look_due():
            self._script.extend(self._second_look())

    def _second_look(self) -> list[int]:
        """Rounds with a number of drafts that may be better than the one that is played; empty where none may be.

        One slow time would put a number out of play for good, and whether more drafts than are made would be right is
        seen only by making them. So what is nearly as good is looked at, or would be by the times of other numbers,
        first what was timed least.
        """
        now, lost = self.gain(self._draft), {}  # by number: plain rounds that one such round may lose
        for k in set(self.times.measured(self._batch)).intersection(self._allowed()) - {self._draft}:
            own, others = self.times.ratio(k, self._batch), self.times.ratio_by_others(k, self._batch)
            tokens = self.expected_tokens(k)
            if CLOSE * tokens > now * own or BY_OTHERS * tokens > now * others:
                lost[k] = max((own + others) / 2 - tokens / now, 0.0)
        if not lost:
            return []
        least = min(lost, key=lambda k: self.times.timed(k, self._batch))
        return [least] * SECOND_LOOK if self._probing.looks_again(SECOND_LOOK * lost[least]) else []

    def _promise(self, k: int) -> float:
        """The gain if rounds take as little as they may: what was timed seldom is played until its time is known."""
        return self.gain(k) * math.exp(OPTIMISM * self.times.spread(k, self._batch))

    def _park(self, reason: str) -> None:
        if not self.parked:
            self._probing.drafting_ends()
            self._is_trial = False
        self.parked, self.reason, self._draft = True, reason, 0

    def _probe(self, best: int) -> None:
        """What a parked text is tried with: rounds of drafts while they seem to pay, else now and then."""
        self._is_trial = self._is_trial and self.gain(best) >= TRIAL_GAIN and self._probing.allowance > 0
        if self._is_trial:
            self._draft = best
            return
        cost = self.times.ratio(best, self._batch) - 1
        if self._wants_larger():
            self._script.append(LARGER)
        elif self._probing.looks_at_drafts(cost, self._batch, could_pay=self._could_pay()):
            self._script.append(best)

    def _could_pay(self) -> bool:
        """Whether any number of drafts would pay if all of them were right."""
        if any((k + 1) / self.times.ratio(k, self._batch) >= MIN_GAIN for k in CANDIDATES[1:]):
            return True
        is_timed = max(self.times.measured(self._batch), default=0) >= LARGER
        return not is_timed and (LARGER + 1) / self.times.least_ratio(LARGER, self._batch) >= LARGER_GAIN

    def _wants_larger(self) -> bool:
        """Whether a larger number of drafts is timed, once: it would pay if it took no longer than a smaller one."""
        measured = self.times.measured(self._batch)
        if not measured or max(measured) >= LARGER:
            return False
        least, tokens = self.times.least_ratio(LARGER, self._batch), self.expected_tokens(LARGER)
        # Between what it takes at least and what the line through the others says.
        cost = (least + self.times.ratio(LARGER, self._batch)) / 2 - tokens
        return tokens >= LARGER_GAIN * least and self._probing.tries_larger(cost)

    def _explanation(self, best: int) -> str:
        ratio, tokens = self.times.ratio(best, self._batch), self.expected_tokens(best)
        # Without these words a text that gives a little more than break-even would seem to be parked by mistake.
        little = ""
        if tokens >= RESUME_GAIN * ratio:
            little = ", to be seen in a look before drafts are made again"
        elif tokens >= ratio:
            little = f", less than the {RESUME_GAIN:.2f}x from which drafts are made"
        tax = self.plain_tax
        taxed = (
            ""
            if tax is None or tax <= 1.01
            else f"; plain decoding takes {tax:.2f}x the time of stock operations (exactness tax {tax:.2f}x)"
        )
        figures = f"break-even {ratio:.1f} tokens a round, this text gives {tokens:.1f}"
        return f"parked: {figures}{little}{taxed}{self.fit.hint}"


def make_policy(
    num_draft_tokens: int | str, *, has_drafter: bool, fit: Fit | None = None, times: RoundTimes | None = None
) -> Policy:
    """The policy for a request: "auto" or 0 .. MAX_DRAFT_TOKENS; anything else is refused.

    `fit` is what the pair's earlier requests say about its drafter, `times` what they say about its rounds.
    """
    if num_draft_tokens == "auto":
        return (
            AutoPolicy(times, fit)
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
    return FixedPolicy(k, fit=fit or Fit(), times=times or RoundTimes())
