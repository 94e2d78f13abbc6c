"""Where a bench is and how long it will still take: one line painted over, or plain lines now and then."""

import os
import sys
import time
from collections.abc import Callable

from mlx_mtp.cli.sizes import columns_of, cut, time_text
from mlx_mtp.cli.terminal import is_smart, say, write_aside
from mlx_mtp.measure.run import Step

PAINT_S = 0.2
PLAIN_S = 15.0
FIRST_GUESS = 0.02  # of the work, before which no time left is told


class BenchProgress:
    """Takes `Step`s; leave the `with` block to clear the line."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._repaints = is_smart(sys.stderr)
        self._began: tuple[float, float] | None = None  # when the first step came, and the share then
        self._spoke = float("-inf")
        self._shown = 0

    def __enter__(self) -> "BenchProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear()

    def __call__(self, step: Step) -> None:
        now = self._clock()
        if self._began is None:
            self._began = (now, step.share)
            if not self._repaints:
                say(self._line(step, now))
                self._spoke = now
        if self._repaints and now - self._spoke >= PAINT_S:
            columns = self._columns()
            line = cut(self._line(step, now), columns)
            write_aside("\r" + line + " " * max(0, min(self._shown, columns) - columns_of(line)))
            self._shown, self._spoke = columns_of(line), now
        elif not self._repaints and now - self._spoke >= PLAIN_S:
            say(self._line(step, now))
            self._spoke = now

    def note(self, text: str) -> None:
        """A remark on lines of its own."""
        self.clear()
        say(text)

    def clear(self) -> None:
        if self._shown:
            write_aside("\r" + " " * min(self._shown, self._columns()) + "\r")
            self._shown = 0

    def _line(self, step: Step, now: float) -> str:
        """The most important first, for narrow terminals."""
        turn = "warming up" if step.turn == 0 else f"pass {step.turn}"
        case = step.case
        parts = [case.workload, case.sampling]
        if case.context:
            parts.append(f"{case.context} tokens")
        if case.batch > 1:
            parts.append(f"{case.batch} at once")
        head = f"{100 * step.share:3.0f} %"
        left = self._left(step.share, now)
        return f"bench {head}{left}  {step.number}/{step.cases} {' '.join(parts)}: {turn}, {step.arm}"

    def _left(self, share: float, now: float) -> str:
        assert self._began is not None
        began, at = self._began
        if share - at < FIRST_GUESS:
            return ""
        seconds = (now - began) * (1 - share) / (share - at)
        return f", {time_text(max(seconds, 1.0))} left"

    def _columns(self) -> int:
        try:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
        except OSError:
            columns = 0
        return (columns or 80) - 1
