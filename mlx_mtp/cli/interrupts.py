"""Ctrl-C in a chat: the first stops the reply and keeps the session, a second within two seconds leaves."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SECONDS_BETWEEN = 2.0


class Interrupts:
    """Counts Ctrl-C presses; `asked` says that the running reply should stop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = float("-inf")
        self.asked = False

    def note(self) -> None:
        """A press has come; raises KeyboardInterrupt where it means leaving."""
        now = self._clock()
        if self.asked or now - self._last < SECONDS_BETWEEN:
            raise KeyboardInterrupt
        self._last = now
        self.asked = True

    def settled(self) -> None:
        """What was asked is done: the next press counts afresh unless it comes within the two seconds."""
        self.asked = False

    @contextmanager
    def during_reply(self) -> Iterator[None]:
        """Presses set `asked` instead of breaking into the library at any point."""

        def on_signal(signum: int, frame: FrameType | None) -> None:
            self.note()

        self.asked = False
        before = signal.signal(signal.SIGINT, on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
