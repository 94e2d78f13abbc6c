"""Opens one model after the other: the old one is freed first, a load can be given up, progress reaches the window."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from model_list import ModelRow
from paced import MainThread, Work

if TYPE_CHECKING:
    from mlx_mtp import Engine, MtpError, Progress

Opened = Callable[["Load", "Engine | None", "MtpError | None"], None]


@dataclass(slots=True)
class Load:
    """One model that is being opened; `engine` is there once its thread runs."""

    row: ModelRow
    is_cancelled: bool = False
    engine: "Engine | None" = field(default=None, repr=False)


class Opener:
    """Holds what is open. `then` is called on the main thread with an engine, with an error, or with neither.

    Neither: the load was cancelled. Everything slow happens on `work`, one thing after the other, so that two models
    never lie in memory at once.
    """

    def __init__(self, main: MainThread, work: Work, then: Opened):
        self._main, self._work, self._then = main, work, then
        self._load: Load | None = None

    def open(self, row: ModelRow, on_progress: "Callable[[Load, Progress], None]") -> Load:
        """Close what is open or being opened, then open this; main thread, returns at once."""
        old, self._load = self._load, Load(row)
        if old is not None:
            self.cancel(old)
        self._work.do(partial(self._open, self._load, on_progress, old))
        return self._load

    def cancel(self, load: Load) -> None:
        """Give a load up, at its next report of progress; also closes an engine that is there. Returns at once."""
        load.is_cancelled = True
        engine = load.engine
        if engine is not None:  # else `_open` sees the flag once it has one
            threading.Thread(target=engine.close, name="close", daemon=True).start()

    def close(self, then: Callable[[], None]) -> None:
        """End everything; `then` on the main thread once that is done."""
        if self._load is not None:
            self.cancel(self._load)
        self._work.do(partial(self._close, self._load, then))

    def _open(self, load: Load, on_progress: "Callable[[Load, Progress], None]", old: Load | None) -> None:
        """On the work thread."""
        from mlx_mtp import Engine, MtpError

        if old is not None and old.engine is not None:
            old.engine.close()  # waits for a close that is under way
            old.engine = None
        error: MtpError | None = None
        try:
            # The app owns this process, so MLX's limits are its own to set: without them a model that is too large for
            # the moment can take the memory that the system needs.
            load.engine = Engine(
                load.row.name, wait=False, on_progress=partial(on_progress, load), set_memory_limits=True
            )
            if load.is_cancelled:
                load.engine.close()
            load.engine.wait_ready()
        except MtpError as failure:
            error = failure
        if load.is_cancelled and load.engine is not None:
            load.engine.close()
        is_there = error is None and not load.is_cancelled
        shown = None if load.is_cancelled else error
        self._main.soon(partial(self._then, load, load.engine if is_there else None, shown))

    def _close(self, load: Load | None, then: Callable[[], None]) -> None:
        """On the work thread."""
        if load is not None and load.engine is not None:
            load.engine.close()
        self._main.soon(then)
