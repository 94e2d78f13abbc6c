"""How long rounds take by their drafts, from noisy times on a machine whose speed drifts: a Kalman filter of logs.

What is kept is the logarithm of a plain round's seconds, which drifts, and for each number of drafts that of its time
over a plain round's, which hardly does. Each time says something of both at once; how unsure they are, and how much of
that they share, says how much of each. So no number of drafts is judged by a slow moment of the machine.
"""

from math import exp, log, sqrt

DRIFT = 4e-4  # variance that the machine's speed gains a round: 2 % of it
CHANGE = 1e-6  # and that of the ratios: with context they change little by little
NOISE = 0.05  # spread of a time about what is expected, before any says so
LEAST_NOISE, MOST_NOISE = 0.02, 0.3
NOISE_WEIGHT = 0.05  # of a time in what the spread is taken to be
FAR = 3.0  # spreads beyond which a time is moved nearer: something else ran meanwhile
BELIEVED = 2  # such times in a row, and all on one side, after which they are believed
RATIO_SHARE = (
    0.25  # of what they are off by (squares), in how unsure the ratio is then: the machine changes oftener
)
UNSURE = 3.0  # spread of what a plain round takes, before any was timed


class TimeFilter:
    """State: logarithms of a plain round's seconds and of the ratios of numbers of drafts that were added."""

    def __init__(self) -> None:
        self._index: dict[int, int] = {}  # drafts -> place in the state; the level is at 0
        self._mean = [0.0]
        self._cov = [[UNSURE**2]]
        self._noise = NOISE**2
        self._far = 0  # times in a row that were far too long, or less than zero, too short
        self.timed: dict[int, int] = {}  # times by drafts

    def add(self, drafts: int, ratio: float, spread: float) -> None:
        """Start with a number of drafts from what it is expected to take; `spread` of the logarithm."""
        self._index[drafts] = len(self._mean)
        self._mean.append(log(ratio))
        for row in self._cov:
            row.append(0.0)
        self._cov.append([0.0] * (len(self._mean) - 1) + [spread**2])

    def knows(self, drafts: int) -> bool:
        """Whether this number was added."""
        return drafts in self._index

    def ratio(self, drafts: int) -> float:
        """Time of a round with so many drafts, which were added, over a plain one's."""
        return exp(self._mean[self._index[drafts]])

    def spread(self, drafts: int) -> float:
        """How unsure the logarithm of that is."""
        i = self._index[drafts]
        return sqrt(self._cov[i][i])

    @property
    def plain_seconds(self) -> float:
        """Seconds of a plain round now."""
        return exp(self._mean[0])

    def pass_rounds(self, rounds: int) -> None:
        """So many rounds went by, timed or not: the machine may be faster or slower now."""
        if self._cov[0][0] < UNSURE**2:  # no more: but what is more unsure already is not made surer
            self._cov[0][0] += DRIFT * rounds
        for i in range(1, len(self._mean)):
            self._cov[i][i] += CHANGE * rounds

    def forget_level(self) -> None:
        """The machine is another: only the ratios are kept."""
        self.timed.clear()
        self._unsure_of_level()

    def _unsure_of_level(self) -> None:
        n = len(self._mean)
        self._cov[0] = [UNSURE**2] + [0.0] * (n - 1)
        for row in self._cov[1:]:
            row[0] = 0.0

    def observe(self, drafts: int, seconds: float) -> None:
        """A round with so many drafts, 0 or a number that was added, took `seconds`."""
        places = (0,) if drafts == 0 else (0, self._index[drafts])
        first = not self.timed
        self.timed[drafts] = self.timed.get(drafts, 0) + 1
        if first:  # nothing is known of the level: by what such rounds are expected to take
            self._mean[0] = log(seconds) - sum(self._mean[i] for i in places[1:])
        off = log(seconds) - sum(self._mean[i] for i in places)
        self._believe(off, self._variance(places), places)
        shared = [sum(row[i] for i in places) for row in self._cov]
        known = sum(shared[i] for i in places)
        spread = known + self._noise
        if not first:
            off = max(-FAR * sqrt(spread), min(off, FAR * sqrt(spread)))
            seen = min(max(off * off - known, LEAST_NOISE**2), MOST_NOISE**2)
            self._noise += NOISE_WEIGHT * (seen - self._noise)
        gains = [own / spread for own in shared]
        self._mean = [mean + gain * off for mean, gain in zip(self._mean, gains, strict=True)]
        self._cov = [
            [own - gain * other for own, other in zip(row, shared, strict=True)]
            for row, gain in zip(self._cov, gains, strict=True)
        ]

    def _variance(self, places: tuple[int, ...]) -> float:
        return self._noise + sum(self._cov[i][j] for i in places for j in places)

    def _believe(self, off: float, variance: float, places: tuple[int, ...]) -> None:
        """One time that is far off means nothing, several in a row that the machine, or such rounds, have changed."""
        if off * off <= FAR**2 * variance:
            self._far = 0
            return
        self._far = max(self._far, 0) + 1 if off > 0 else min(self._far, 0) - 1
        if abs(self._far) >= BELIEVED:
            self._unsure_of_level()
            for i in places[1:]:
                if self._cov[i][i] < UNSURE**2:
                    self._cov[i][i] += RATIO_SHARE * off * off
            self._far = 0
