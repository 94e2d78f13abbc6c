"""Time a few rounds of each kind after a first reply, for those who ask, so that the next need not try them."""

from typing import TYPE_CHECKING

from mlx_mtp.errors import ParameterError
from mlx_mtp.progress import OnProgress, Progress, silent
from mlx_mtp.round_times import RoundTimes
from mlx_mtp.timed_rounds import TimedRounds

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair

NUMBERS = (0, 1, 2, 4, 8)  # of drafts
WARM_UPS, TIMED = 1, 3
ROUNDS = len(NUMBERS) * (WARM_UPS + TIMED)  # 20 at most: a reply's worth


def calibrate(pair: "Pair", on_progress: OnProgress = silent) -> RoundTimes:
    """Play at most 20 rounds with 0 to 8 drafts and tell the pair's times; -> those times.

    Raises ParameterError for a pair without a drafter: it has one kind of round only.
    """
    if pair.drafter is None:
        raise ParameterError(
            "times are compared with and without drafts, but the model was loaded without a drafter; "
            "load it with its assistant"
        )
    timed = TimedRounds(pair.rounds, room=ROUNDS * (NUMBERS[-1] + 1))
    times, played = pair.rounds.times, 0
    for drafts in NUMBERS:
        for turn in range(WARM_UPS + TIMED):
            on_progress(Progress("calibrate", f"timing rounds with {drafts} drafts", played, ROUNDS))
            seconds = timed.play(drafts)
            times.observe(drafts, seconds if turn >= WARM_UPS else None)
            played += 1
    on_progress(Progress("calibrate", "timed rounds", played, ROUNDS))
    return times
