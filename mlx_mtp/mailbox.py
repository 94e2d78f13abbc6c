"""One request between the thread that computes and whoever waits for its reply, on any thread.

A reader who is slow makes nothing grow: beyond MAX_WAITING chunks the newest are merged into one.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable

from mlx_mtp.errors import EngineError, MtpError
from mlx_mtp.progress import Progress
from mlx_mtp.reply import Chunk, Gathered, Generation

LOG = logging.getLogger(__name__)
MAX_WAITING = 64  # chunks that a reader may be behind before they are merged
LOOK_EVERY_S = 1.0  # how often a reader who waits makes sure that somebody still computes


class Mailbox:
    """What the engine puts in as a row's listener, and what readers take out; every method is safe on any thread."""

    def __init__(self, is_served: Callable[[], bool]):
        self.is_cancelled = False
        self._is_served = is_served
        self._changed = threading.Condition()
        self._items: deque[Progress | Chunk] = deque()
        self._gathered = Gathered()
        self._result: Generation | None = None
        self._error: MtpError | None = None
        self._wakers: list[Callable[[], None]] = []
        self._on_end: list[Callable[[Generation | None], None]] = []
        self._has_ended = False  # those were called, with this
        self._ended_with: Generation | None = None

    @property
    def is_over(self) -> bool:
        """Whether it has a result or an error."""
        return self._result is not None or self._error is not None

    @property
    def so_far(self) -> Chunk | None:
        """The newest chunk, taken or not."""
        return self._gathered.last

    @property
    def has_news(self) -> bool:
        """Whether there is something to take, the end included."""
        return bool(self._items) or self.is_over

    def check_served(self) -> None:
        """Raise EngineError if it is not over and nobody computes any more."""
        if not self.is_over and not self._is_served():
            raise EngineError(
                "this reply's engine does not run any more (its thread ended, or the process was forked); "
                "make another engine in this process"
            )

    def cancel(self) -> None:
        """Ask for the end of the reply; the tokens that it has are kept."""
        self.is_cancelled = True

    # The thread that computes

    def progress(self, done: int, total: int) -> None:
        with self._changed:
            if self._items and isinstance(self._items[-1], Progress):
                self._items.pop()
            self._items.append(Progress("prefill", "reading the prompt", done, total))
            self._changed.notify_all()
        self._wake()

    def chunk(self, chunk: Chunk) -> None:
        self._gathered.add(chunk)
        result = None if chunk.finish_reason is None else self._gathered.generation()
        if result is not None:
            self._end(result)
        with self._changed:
            last = self._items[-1] if len(self._items) >= MAX_WAITING else None
            if isinstance(last, Chunk):
                self._items[-1] = last.followed_by(chunk)
            else:
                self._items.append(chunk)
            self._result = result
            self._changed.notify_all()
        self._wake()

    def failed(self, error: MtpError) -> None:
        if self.is_over:
            return
        self._end(None)
        with self._changed:
            self._error = error
            self._changed.notify_all()
        self._wake()

    # Readers

    def next(self, timeout: float | None = None) -> Progress | Chunk | None:
        """What comes next, None at the end. Raises the request's error, TimeoutError, or as `check_served`."""
        with self._changed:
            self._wait(lambda: self.has_news, timeout)
            return self._pop()

    def take(self) -> tuple[bool, Progress | Chunk | None]:
        """Whether there is something now, and it; as `next` without waiting."""
        with self._changed:
            return (True, self._pop()) if self.has_news else (False, None)

    def result(self, timeout: float | None = None) -> Generation:
        """The whole reply once it has ended, whatever of it was read; raises as `next`."""
        with self._changed:
            self._wait(lambda: self.is_over, timeout)
            if self._error is not None:
                raise self._error
            assert self._result is not None, "a request that is over has a result or an error"
            return self._result

    def when_over(self, call: Callable[[Generation | None], None]) -> None:
        """Call with the result, None for an error, once: now if it is over, else on the thread that computes.

        Then before any reader sees the end, so that what it does is done by then.
        """
        with self._changed:
            if not self._has_ended:
                self._on_end.append(call)
                return
        call(self._ended_with)

    def add_waker(self, waker: Callable[[], None]) -> None:
        """`waker` is called whenever there may be something to take."""
        with self._changed:
            self._wakers.append(waker)

    def remove_waker(self, waker: Callable[[], None]) -> None:
        with self._changed:
            if waker in self._wakers:
                self._wakers.remove(waker)

    def _pop(self) -> Progress | Chunk | None:
        if self._items:
            return self._items.popleft()
        if self._error is not None:
            raise self._error
        return None

    def _wait(self, is_there: Callable[[], bool], timeout: float | None) -> None:
        """Wait in steps, so that a thread that is gone is noticed."""
        left = timeout
        while not is_there():
            self.check_served()
            if left is not None and left <= 0:
                raise TimeoutError(f"the reply took longer than {timeout:g} s; wait longer, or cancel it")
            step = LOOK_EVERY_S if left is None else min(LOOK_EVERY_S, left)
            if self._changed.wait_for(is_there, step):
                return
            left = None if left is None else left - step

    def _wake(self) -> None:
        with self._changed:
            wakers = list(self._wakers)
        for waker in wakers:
            try:
                waker()
            except RuntimeError:  # the reader's event loop was closed: nobody waits any more
                self.remove_waker(waker)
                self.cancel()

    def _end(self, result: Generation | None) -> None:
        with self._changed:
            self._has_ended, self._ended_with = True, result
            calls, self._on_end = self._on_end, []
        for call in calls:
            try:
                call(result)
            except Exception:
                LOG.exception("what was to be called at a reply's end raised")
