"""What is told of a batch: to its caller, and to whoever listens to one of its rows."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_mtp.pair import Pair
from mlx_mtp.policy import Policy
from mlx_mtp.reply import Chunk, Generation, Reply
from mlx_mtp.row_start import OnProgress, Row


@dataclass(frozen=True, slots=True)
class Watch:
    """What a caller wants to be told of a batch; what any of these raises ends it.

    on_progress(done, total): tokens of the prompt that is being prefilled. on_round(tokens): written so far, by all
    rows. on_chunk(index, chunk): what a round gave a request. on_done(index, reply): a request's reply has ended.
    on_note(text): said once, where memory admits fewer rows.
    """

    on_progress: OnProgress | None = None
    on_round: Callable[[int], None] | None = None
    on_chunk: Callable[[int, Chunk], None] | None = None
    on_done: Callable[[int, Generation], None] | None = None
    on_note: Callable[[str], None] | None = None


SILENT = Watch()


class Teller:
    """Hands on what rows have written, and ends rows before their time."""

    def __init__(self, pair: Pair, policy: Policy, watch: Watch):
        self._pair, self._policy, self._watch = pair, policy, watch

    def chunk(self, row: Row, chunk: Chunk) -> None:
        """Add a chunk, which may be the row's last."""
        row.take(chunk)
        if self._watch.on_chunk is not None:
            self._watch.on_chunk(row.index, chunk)
        if row.result is not None and self._watch.on_done is not None:
            self._watch.on_done(row.index, row.result)

    def stop(self, rows: Sequence[Row], note: str | None, reason: str = "error") -> None:
        """End rows with what they have written."""
        for row in rows:
            if row.reply is None:
                row.reply = Reply(self._pair, row.request, 0, time.perf_counter())
            self.chunk(row, row.reply.stop(self._policy, note, reason))
