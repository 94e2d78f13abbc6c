"""How far a file of prompts is: one line that is repainted, or on plain output one every ten seconds."""

import sys
import time
from collections.abc import Callable

from mlx_mtp.cli.sizes import columns_of
from mlx_mtp.cli.status import short_count
from mlx_mtp.cli.terminal import is_smart, say, write_aside

PAINT_S, PLAIN_S = 0.2, 10.0


class BatchProgress:
    """Counts lines and tokens; `note` says something without breaking the line."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic):
        self.total, self.answered, self.failed, self.tokens = total, 0, 0, 0
        self._clock = clock
        self._began = self._shown_at = clock()
        self._repaints = is_smart(sys.stderr)
        self._width = 0

    @property
    def rate(self) -> float:
        return self.tokens / max(self._clock() - self._began, 1e-9)

    def ended(self, *, failed: bool) -> None:
        self.failed += failed
        self.answered += not failed

    def round(self, tokens: int) -> None:
        """`tokens` were written so far."""
        self.tokens = tokens
        now = self._clock()
        if now - self._shown_at < (PAINT_S if self._repaints else PLAIN_S):
            return
        self._shown_at = now
        if not self._repaints:
            say(self._line())
            return
        line = self._line()[:78]
        write_aside("\r" + line + " " * (self._width - columns_of(line)))
        self._width = columns_of(line)

    def note(self, text: str) -> None:
        self.clear()
        say(f"({text})")

    def clear(self) -> None:
        if self._width:
            write_aside("\r" + " " * self._width + "\r")
            self._width = 0

    def _line(self) -> str:
        done = self.answered + self.failed
        return f"{done} of {self.total} lines · {short_count(self.tokens)} tok · {self.rate:.1f} tok/s"
