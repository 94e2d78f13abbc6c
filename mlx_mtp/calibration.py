"""Time a few rounds of each kind after a first reply, for those who ask, so that the next need not try them."""

import math
from typing import TYPE_CHECKING

from mlx_mtp.errors import ParameterError
from mlx_mtp.pressure import Guard
from mlx_mtp.progress import OnProgress, Progress, silent
from mlx_mtp.round_times import RoundTimes
from mlx_mtp.state import kv_shapes
from mlx_mtp.timed_rounds import TimedRounds, capacity_of_rounds

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair

NUMBERS = (0, 1, 2, 4, 8)  # of drafts
WARM_UPS, TIMED = 1, 3
ROUNDS = len(NUMBERS) * (WARM_UPS + TIMED)  # 20 at most: a reply's worth
ROOM = ROUNDS * (NUMBERS[-1] + 1)  # tokens that they write at most


class Calibration:
    """At most 20 rounds with 0 to 8 drafts, one a call of `step`: whoever waits can stop between any two.

    times: what is told of them; the pair's own unless given. Raises ParameterError for a pair without a drafter, which
    has one kind of round only, and MemoryRefusal where the K/V of its text would not fit now.
    """

    def __init__(self, pair: "Pair", times: RoundTimes | None = None) -> None:
        if pair.drafter is None:
            raise ParameterError(
                "times are compared with and without drafts, but the model was loaded without a drafter; "
                "load it with its assistant"
            )
        self.times = pair.rounds.times if times is None else times
        self.played = 0
        target = pair.target
        shapes = kv_shapes(target.text, 1, capacity_of_rounds(ROOM))
        Guard().admit(2 * target.dtype.size * sum(math.prod(shape) for shape in shapes))
        self._rounds = pair.rounds
        self._timed: TimedRounds | None = None

    @property
    def is_over(self) -> bool:
        return self.played == ROUNDS

    @property
    def progress(self) -> Progress:
        """How far it is, for whoever shows it."""
        what = "timed rounds"
        if not self.is_over:
            what = f"timing rounds with {self._next} drafts"
        return Progress("calibrate", what, self.played, ROUNDS)

    def step(self) -> None:
        """Play the next round and tell the times."""
        if self._timed is None:
            self._timed = TimedRounds(self._rounds, room=ROOM)
        drafts, turn = self._next, self.played % (WARM_UPS + TIMED)
        seconds = self._timed.play(drafts)
        self.times.observe(drafts, seconds if turn >= WARM_UPS else None)
        self.played += 1

    @property
    def _next(self) -> int:
        return NUMBERS[self.played // (WARM_UPS + TIMED)]


def calibrate(pair: "Pair", on_progress: OnProgress = silent, times: RoundTimes | None = None) -> RoundTimes:
    """Play a whole `Calibration` and tell `times`, or else the pair's own; -> those times."""
    calibration = Calibration(pair, times)
    while not calibration.is_over:
        on_progress(calibration.progress)
        calibration.step()
    on_progress(calibration.progress)
    return calibration.times


def is_calibrated(times: RoundTimes) -> bool:
    """Whether every number of drafts that a calibration plays has been timed already."""
    return set(NUMBERS[1:]) <= set(times.measured())
