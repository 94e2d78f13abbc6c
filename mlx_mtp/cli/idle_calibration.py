"""Timing rounds between two turns of a chat: after the first reply, for a few seconds, until a key is pressed."""

import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mlx_mtp.cli.progress_line import ProgressLine
from mlx_mtp.errors import MemoryRefusal

if TYPE_CHECKING:
    from mlx_mtp.calibration import Calibration
    from mlx_mtp.pair import Pair

SECONDS = 5.0  # after one reply; what is left goes on after the next


class IdleCalibration:
    """A calibration played piece by piece while nobody types; rounds of the pair are timed once, and kept.

    is_typing: whether a key waits, asked between rounds: a round is the longest that anybody is kept waiting.
    """

    def __init__(
        self,
        pair: "Pair",
        *,
        is_typing: Callable[[], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from mlx_mtp.calibration import is_calibrated

        self._pair, self._clock = pair, clock
        self._is_typing = is_typing or _a_key_waits
        self._calibration: Calibration | None = None
        somebody = is_typing is not None or (sys.stdin is not None and sys.stdin.isatty())
        self.is_over = not somebody or pair.drafter is None or is_calibrated(pair.rounds.times)

    def play(self) -> None:
        """Go on for a few seconds, with a progress line; what Ctrl-C interrupts is not taken up again."""
        if self.is_over:
            return
        from mlx_mtp.calibration import Calibration

        end = self._clock() + SECONDS
        try:
            with keys_kept(), ProgressLine() as line:
                if self._calibration is None:
                    self._calibration = Calibration(self._pair)
                while not self._calibration.is_over and self._clock() < end and not self._is_typing():
                    line(self._calibration.progress)
                    self._calibration.step()
            self.is_over = self._calibration.is_over
        except MemoryRefusal:  # replies teach the same, only later
            self.is_over = True
        except KeyboardInterrupt:
            self.is_over = True
            raise
        finally:
            if self.is_over:
                self._calibration = None  # its K/V


@contextmanager
def keys_kept() -> Iterator[None]:
    """Keys typed meanwhile are not shown, and wait for whoever reads next; without a terminal nothing changes."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd, termios.TCSANOW)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, before)


def _a_key_waits() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])
