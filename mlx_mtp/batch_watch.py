"""How wide a batch may be, and what its caller is told of it."""

from collections.abc import Callable
from dataclasses import dataclass

from mlx_mtp.errors import ParameterError
from mlx_mtp.reply import Chunk, Generation
from mlx_mtp.row_start import OnProgress

MAX_BATCH = 64  # rows decoded together at most


def check_batch(max_batch: object) -> int:
    """`max_batch` if it is a width that can be asked for; ParameterError otherwise."""
    if not isinstance(max_batch, int) or isinstance(max_batch, bool) or not 1 <= max_batch <= MAX_BATCH:
        raise ParameterError(
            f"a batch is 1 .. {MAX_BATCH} rows wide, got {max_batch!r}; 4 to 8 suit most machines"
        )
    return max_batch


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
