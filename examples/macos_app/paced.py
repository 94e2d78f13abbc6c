"""From threads that compute to the one that draws: what they report is shown together, at most 30 times a second."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Generic, Protocol, TypeVar

LOG = logging.getLogger(__name__)
INTERVAL_S = 1 / 30

Item = TypeVar("Item")
Call = Callable[[], None]


class MainThread(Protocol):
    """The thread that draws. In the app this is AppKit's, in tests a list of calls."""

    def soon(self, call: Call) -> None:
        """Run `call` there, in the order of asking; may be asked on any thread, and returns at once."""

    def after(self, seconds: float, call: Call) -> None:
        """Run `call` there later; asked on that thread only."""


class Paced(Generic[Item]):
    """Gathers items from any thread and hands them to `show` on the main thread, in order, none lost."""

    def __init__(
        self,
        main: MainThread,
        show: Callable[[list[Item]], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._main, self._show, self._clock = main, show, clock
        self._lock = threading.Lock()
        self._items: list[Item] = []
        self._is_due = False
        self._shown_at = float("-inf")

    def put(self, item: Item) -> None:
        """From any thread."""
        with self._lock:
            self._items.append(item)
            if self._is_due:
                return
            self._is_due = True
        self._main.soon(self._plan)

    def flush(self) -> None:
        """Show what is there now; main thread only."""
        with self._lock:
            items, self._items = self._items, []
            self._is_due = False
        if items:
            self._shown_at = self._clock()
            self._show(items)

    def _plan(self) -> None:
        wait = self._shown_at + INTERVAL_S - self._clock()
        if wait > 0:
            self._main.after(wait, self.flush)
        else:
            self.flush()


class Work:
    """A thread for what takes long, one thing after the other; it does not keep the process alive.

    What a call raises is told on the main thread, and the next call has its turn.
    """

    def __init__(self, main: MainThread, on_error: Callable[[Exception], None]) -> None:
        self._main, self._on_error = main, on_error
        self._calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="work", daemon=True).start()

    def do(self, call: Call) -> None:
        """From any thread."""
        self._calls.put(call)

    def _run(self) -> None:
        while True:
            call = self._calls.get()
            try:
                call()
            except Exception as error:
                LOG.exception("what was done in the background raised")
                self._main.soon(partial(self._on_error, error))
