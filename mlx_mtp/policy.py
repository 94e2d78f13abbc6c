"""How many drafts to verify and to make next round: a fixed number, or what pays by the text and times so far."""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from mlx_mtp.acceptance import Acceptance
from mlx_mtp.errors import ParameterError
from mlx_mtp.fit import Fit
from mlx_mtp.round_times import RoundTimes
from mlx_mtp.state import MAX_DRAFT_TOKENS

MIN_GAIN = 1.03  # below this expected gain over plain decoding, drafting is parked
RESUME_GAIN = 1.05  # from which it is taken up again
MARGIN = 1.03  # by which another number of drafts must be better than the one that is played
CANDIDATES = (0, 1, 2, 3, 4, 6, 8)
FIRST_TRIES = (1, 1, 0, 0)  # drafts made, while nothing was timed
MAX_FIRST_TRIES = 3  # times that they are played: rounds that are compiled have no time
RATE = 0.013  # of the time, in plain rounds, that tries may cost
MOST = 4.0  # plain rounds that tries may cost at once
FIRST_PROBE, LAST_PROBE = (
    6,
    16,
)  # rounds between two looks at a parked text: doubled, up to what is affordable
COST_PROBE, LAST_COST_PROBE = 128, 2048  # the same where no text could pay: only times are measured again
PLAIN_EVERY, LAST_PLAIN = 64, 1024  # rounds between two looks at plain rounds while drafting
DOUBTFUL = 1.5  # gain above which that is looked at less often
LARGER, LARGER_GAIN = (
    4,
    1.2,
)  # drafts that are timed although fewer do not pay, if they would with so much gain
TRIAL = 8  # rounds that a look goes on for while it pays
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

    Whatever it tries beyond that is paid from an allowance, in plain rounds: a little to start with, a hundredth of the
    time, and what drafting has gained of late. No clocks and no chance in here: it is told all that it knows.
    """

    def __init__(self, times: RoundTimes | None = None, fit: Fit | None = None) -> None:
        self.parked = False
        self.reason: str | None = None
        self.fit = fit or Fit()
        self.times = times or RoundTimes()
        self.acceptance = Acceptance(self.fit.usual)
        self._draft = 0
        self._script: deque[int] = deque()  # drafts of the next rounds, whatever is best
        self._batch, self._rounds = 1, 0
        self._first_tries, self._first_until = 0, 0
        self._probe_after, self._next_probe = FIRST_PROBE, FIRST_PROBE
        self._plain_after, self._next_plain = PLAIN_EVERY, PLAIN_EVERY
        self._next_larger = 0
        self._phase_gain = 0.0  # plain rounds gained since drafting was taken up
        self._trial = 0  # rounds that a look at a parked text still goes on for
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
        self._batch = batch or len(accepted)
        self.fit.observe(verified, accepted)
        self.acceptance.observe(verified, accepted)
        self.times.observe(verified, seconds, drafted=drafted, batch=self._batch, distinct=distinct)
        tokens = 1 + sum(accepted) / len(accepted)
        gained = tokens - self.times.ratio(verified, self._batch) if verified else 0.0
        self.times.allowance = min(self.times.allowance + RATE * tokens, MOST)
        if not self.parked:
            self._phase_gain += gained
        elif verified:
            self.times.allowance = min(self.times.allowance + gained, MOST)
            self._look_at(tokens, self.times.ratio(verified, self._batch))
        self._decide()

    def expected_tokens(self, k: int) -> float:
        """Tokens that a round with k drafts gives on this text."""
        return self.acceptance.expected_tokens(k)

    def gain(self, k: int) -> float:
        """Speed with k drafts over that of our plain rounds, as expected on this text."""
        return self.expected_tokens(k) / self.times.ratio(k, self._batch)

    def _decide(self) -> None:
        """Set what the next rounds draft."""
        if self.fit.warning is not None:
            self._park(f"parked: {self.fit.warning}")
            if self._rounds and self._rounds % PROBE_EVERY == 0 and not self._script:
                self._script.append(2)
            return
        if self._script or self._tries_first():
            return
        best = max(self._allowed(), key=self.gain)
        if self.gain(best) < (RESUME_GAIN if self.parked else MIN_GAIN):
            self._park(self._explanation(best))
            if self._trial:
                self._draft = best
            elif not self._times_more() and self._rounds >= self._next_probe:
                self._probe(best)
            return
        if self.parked and self._rounds and self._is_unproven():
            self._probe(best)
            return
        self._play(best)

    def _tries_first(self) -> bool:
        """Whether the first rounds are played to time each kind once; nothing is known of this pair's times yet."""
        if self._first_tries >= MAX_FIRST_TRIES or self.times.is_known(self._batch):
            return False
        if self._batch > 1 and self._first_tries:
            return False  # one look at a width is enough: there are many widths
        if self._rounds >= self._first_until:  # not before the last of them was seen
            self._first_tries += 1
            self._first_until = self._rounds + len(FIRST_TRIES) + 2
            self._script.extend(FIRST_TRIES)
        return True

    def _allowed(self) -> list[int]:
        """Numbers of drafts near enough to those that were timed."""
        measured = self.times.measured(self._batch)
        most = 2 * max(measured) if measured else 2
        return [k for k in CANDIDATES if 0 < k <= most]

    def _play(self, best: int) -> None:
        """Draft what is best, and look at plain rounds now and then: nothing else tells whether it still is."""
        if self.parked or not self._draft:
            self._probe_after, self._trial, self._phase_gain = FIRST_PROBE, 0, 0.0
            self._next_plain = self._rounds + self._plain_after
        self.parked, self.reason = False, None
        if not self._draft or self.gain(best) > MARGIN * self.gain(self._draft):
            self._draft = best
        if self._rounds >= self._next_plain * (1 if self.gain(self._draft) < DOUBTFUL else 4):
            self._script.extend((0, 0))
            self._plain_after = min(2 * self._plain_after, LAST_PLAIN)
            self._next_plain = self._rounds + self._plain_after

    def _park(self, reason: str) -> None:
        if not self.parked:
            # Drafting that had paid before the text changed was no try; what only seemed to pay was one.
            self.times.allowance = min(self.times.allowance + self._phase_gain, MOST)
            self._next_probe = self._rounds + self._probe_after
            self._trial = 0
        self.parked, self.reason, self._draft = True, reason, 0

    def _is_unproven(self) -> bool:
        """Whether nothing speaks for a parked text but what was expected before it was tried."""
        return self.acceptance.tried() < 1 and not self._trial

    def _probe(self, k: int) -> None:
        """Look at a parked text with one round of drafts, where its cost is there."""
        cost, could_pay = self.times.ratio(k, self._batch) - 1, self._could_pay()
        if cost > self.times.allowance:
            return
        self._script.append(k)
        # A text that cannot pay is looked at to time the rounds again, no more.
        first, last = (FIRST_PROBE, LAST_PROBE) if could_pay else (COST_PROBE, LAST_COST_PROBE)
        self._next_probe = self._rounds + max(self._probe_after, first)
        self._probe_after = int(min(2 * max(self._probe_after, first), last))

    def _could_pay(self) -> bool:
        """Whether any number of drafts would pay if all of them were right."""
        if any((k + 1) / self.times.ratio(k, self._batch) >= MIN_GAIN for k in CANDIDATES[1:]):
            return True
        is_timed = max(self.times.measured(self._batch), default=0) >= LARGER
        return not is_timed and (LARGER + 1) / self.times.least_ratio(LARGER, self._batch) >= LARGER_GAIN

    def _times_more(self) -> bool:
        """Whether a larger number of drafts is timed, once: it would pay if it took no longer than a smaller one."""
        measured = self.times.measured(self._batch)
        if not measured or max(measured) >= LARGER or self._rounds < self._next_larger:
            return False
        least, tokens = self.times.least_ratio(LARGER, self._batch), self.expected_tokens(LARGER)
        # Between what it takes at least and what the line through the others says.
        cost = (least + self.times.ratio(LARGER, self._batch)) / 2 - tokens
        if tokens < LARGER_GAIN * least or cost > self.times.allowance:
            return False
        self._script.append(LARGER)
        self._next_larger = self._rounds + PROBE_EVERY
        return True

    def _look_at(self, tokens: float, ratio: float) -> None:
        """What a round with drafts says of a parked text: it goes on while that pays."""
        if tokens >= RESUME_GAIN * ratio:
            if not self._trial:
                self.acceptance.doubt()
                self._trial = TRIAL
            self._probe_after = FIRST_PROBE
        if self._trial:
            self._trial -= 1
            if self.times.allowance < 0:
                self._trial = 0
        self._next_probe = max(self._next_probe, self._rounds + self._probe_after)

    def _explanation(self, best: int) -> str:
        ratio, tokens = self.times.ratio(best, self._batch), self.expected_tokens(best)
        # Without these words a text that gives a little more than break-even would seem to be parked by mistake.
        little = "" if tokens < ratio else f", less than the {RESUME_GAIN:.2f}x from which drafts are made"
        tax = self.plain_tax
        taxed = "" if tax is None or tax <= 1.01 else f" (exactness tax {tax:.2f}x)"
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
