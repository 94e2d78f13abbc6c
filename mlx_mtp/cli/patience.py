"""A word for whoever waits: the first reply on a machine is slow, because MLX compiles what it runs."""

import threading
from typing import Protocol

SECONDS = 4.0
EARLY_CHUNKS = 12  # by then every number of drafts has been tried, so slowness has another cause


class Remarks(Protocol):
    """What can show a remark in the middle of a reply, from any thread."""

    def note(self, text: str) -> None: ...


class Patience:
    """Says once that compiling takes time, if a reply has hardly begun after a few seconds."""

    def __init__(self, writer: Remarks, seconds: float = SECONDS) -> None:
        self._writer = writer
        self._chunks = 0
        self._timer = threading.Timer(seconds, self._explain)
        self._timer.daemon = True

    def __enter__(self) -> "Patience":
        self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()

    def heard(self) -> None:
        """A chunk has come."""
        self._chunks += 1

    def _explain(self) -> None:
        if self._chunks < EARLY_CHUNKS:
            self._writer.note("(the first reply on a machine is slow: MLX compiles what it runs, once)")
