"""When a policy tries what does not seem best, and what that may cost: an allowance in plain rounds.

The allowance starts small, grows by `RATE` of the time, and by what drafting has gained of late; every try that does
not pay for itself is taken from it. It is kept with the times of a pair, so that all its requests share one.
"""

from math import inf

from mlx_mtp.round_times import RoundTimes

RATE = 0.014  # of the time, in plain rounds, that tries may cost
MOST = 6.0  # plain rounds that tries may cost at once
OPENING = 4  # rounds with drafts, and as many without, that time them first: of those that are traced none has a time
OPENINGS = 3  # times that they are played at most
FIRST_PROBE, LAST_PROBE = 6, 10  # rounds between two looks at a parked text: doubled, up to the second
AGAIN = 1  # rounds until another look after one that paid
COST_PROBE, LAST_COST_PROBE = 128, 2048  # rounds where no text could pay: only times are measured again
PLAIN_EVERY, LAST_PLAIN = 64, 1024  # rounds between two looks at plain rounds while drafting
NEW_PLAIN = 4  # rounds until that of a width where drafts were never compared with them
DOUBTFUL = 1.5  # gain above which that is looked at a quarter as often
SECOND_EVERY = 128  # rounds of all texts between two second looks at numbers of drafts
LARGER_EVERY = 64  # rounds between two tries of a larger number of drafts than pays


class Probing:
    """The schedule of one text's tries, paid from the allowance of its pair."""

    def __init__(self, times: RoundTimes) -> None:
        self._times = times
        self._rounds = 0
        self._openings, self._opened_until = 0, 0
        self._probe_after, self._next_probe = FIRST_PROBE, FIRST_PROBE
        self._plain_after, self._next_plain = PLAIN_EVERY, PLAIN_EVERY
        self._next_larger = 0
        self._new_plain = inf  # the round from which plain rounds of a new width are timed
        self._phase_gain = 0.0  # plain rounds gained since drafting was taken up

    @property
    def allowance(self) -> float:
        """Plain rounds that tries may cost now."""
        return self._times.allowance

    def observe(self, tokens: float, gained: float, *, is_try: bool) -> None:
        """A round: its tokens, and plain rounds that its drafts gained; less than zero, lost."""
        self._rounds += 1
        self._times.unlooked += 1
        self._times.allowance = min(self.allowance + RATE * tokens, MOST)
        if is_try:
            self._times.allowance = min(self.allowance + gained, MOST)
        else:
            self._phase_gain += gained

    def width_changes(self) -> None:
        """What was found with more rows or fewer says little: another look, also at plain rounds, comes soon."""
        self._probe_after = FIRST_PROBE
        self._next_probe = min(self._next_probe, self._rounds + FIRST_PROBE)
        self._new_plain = self._rounds + NEW_PLAIN

    def is_opening(self, batch: int) -> bool:
        """Whether the first rounds of this width are played to time drafts and plain rounds; nothing was timed yet."""
        return not self._times.is_known(batch) and (
            self._rounds < self._opened_until or self._may_open(batch)
        )

    def opening(self, batch: int, drafts: int) -> list[int]:
        """Drafts of the rounds that open, empty until the last opening was seen."""
        if self._rounds < self._opened_until:
            return []
        rounds = OPENING if batch == 1 else OPENING // 2
        self._openings += 1
        self._opened_until = self._rounds + 2 * rounds + 2
        return [drafts] * rounds + [0] * rounds

    def _may_open(self, batch: int) -> bool:
        return self._openings < (OPENINGS if batch == 1 else 1)  # one look is enough: there are many widths

    def drafting_starts(self) -> None:
        self._probe_after, self._phase_gain = FIRST_PROBE, 0.0
        self._next_plain = self._rounds + self._plain_after

    def drafting_ends(self) -> None:
        """Drafting that had paid before the text changed was no try; what only seemed to pay was one."""
        self._times.allowance = min(self.allowance + self._phase_gain, MOST)
        self._next_probe = self._rounds + self._probe_after

    def looks_at_plain_rounds(self, gain: float, batch: int) -> bool:
        """Whether plain rounds are timed now: nothing else tells whether drafting still pays."""
        if self._rounds >= self._new_plain and not self._times.is_known(batch):
            self._new_plain = self._rounds + PLAIN_EVERY
            return True
        if self._rounds < self._next_plain * (1 if gain < DOUBTFUL else 4):
            return False
        self._plain_after = min(2 * self._plain_after, LAST_PLAIN)
        self._next_plain = self._rounds + self._plain_after
        return True

    def is_look_due(self) -> bool:
        """Whether a parked text may be looked at now: until then nothing of it has to be weighed."""
        return self._rounds >= self._next_probe

    def looks_at_drafts(self, cost: float, batch: int, *, could_pay: bool) -> bool:
        """Whether a parked text is looked at now, with a round that costs so many plain rounds more than one.

        could_pay: a text that cannot is looked at to time the rounds again, no more, and not soon after another text.
        """
        if not self.is_look_due() or cost > self.allowance:
            return False
        first, last = (FIRST_PROBE, LAST_PROBE) if could_pay else (COST_PROBE, LAST_COST_PROBE)
        unseen = self._times.rounds_unseen(batch)
        if not could_pay and unseen < COST_PROBE:
            self._next_probe = self._rounds + COST_PROBE - unseen
            return False
        wait = self._probe_after if self._probe_after == AGAIN else max(self._probe_after, first)
        self._next_probe = self._rounds + wait
        self._probe_after = min(2 * wait, last)
        return True

    def look_paid(self) -> None:
        """The next look comes soon."""
        self._probe_after, self._next_probe = AGAIN, self._rounds

    def is_second_look_due(self) -> bool:
        """Whether it is time to look again at a number of drafts that is not played; if so, time is counted anew."""
        if self._times.unlooked < SECOND_EVERY:
            return False
        self._times.unlooked = 0
        return True

    def looks_again(self, cost: float) -> bool:
        """Whether that is done, for so many plain rounds: for as many as there may be, if it seems to take more."""
        cost = min(cost, MOST)
        if cost > self.allowance:
            return False
        self._times.allowance -= cost
        return True

    def tries_larger(self, cost: float) -> bool:
        """Whether a larger number of drafts than pays is timed now."""
        if self._rounds < self._next_larger or cost > self.allowance:
            return False
        self._next_larger = self._rounds + LARGER_EVERY
        return True
