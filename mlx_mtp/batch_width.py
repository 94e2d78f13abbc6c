"""How many rows a batch decodes together: as many as were asked for, or pay, and as memory admits."""

from collections.abc import Callable

from mlx_mtp.batch_choice import WidthChooser
from mlx_mtp.errors import ParameterError
from mlx_mtp.pressure import REMEDY

MAX_BATCH = 64  # rows decoded together at most
LOOK_ROUNDS = 8  # rounds between two looks at whether another width pays
CALM_ROUNDS = 64  # rounds without a shortage after which a batch that was narrowed takes twice as many rows


def check_batch(max_batch: object) -> int:
    """`max_batch` if it is a width that can be asked for; ParameterError otherwise."""
    if not isinstance(max_batch, int) or isinstance(max_batch, bool) or not 1 <= max_batch <= MAX_BATCH:
        raise ParameterError(
            f"a batch is 1 .. {MAX_BATCH} rows wide, got {max_batch!r}; 4 to 8 suit most machines"
        )
    return max_batch


class Width:
    """The number of rows to decode together: what pays or was asked for, less while memory is short.

    on_note(text): said once, where memory admits fewer. Raises ParameterError for an impossible width.
    """

    def __init__(self, max_batch: int | WidthChooser, on_note: Callable[[str], None] | None = None):
        self._chooser = max_batch if isinstance(max_batch, WidthChooser) else None
        self._widest = max_batch.most if isinstance(max_batch, WidthChooser) else check_batch(max_batch)
        self._admitted = self._widest  # by memory
        self._calm = self._played = 0  # rounds since memory was short, and since the width was looked at
        self._on_note = on_note

    @property
    def wanted(self) -> int:
        """Rows that are to be decoded together now."""
        return self._admitted if self._chooser is None else min(self._admitted, self._chooser.width)

    def look(self, left: int) -> None:
        """Count a round; now and then choose what pays for the rows that are left, running or waiting."""
        self._played += 1
        if self._chooser is not None and self._played >= LOOK_ROUNDS:
            self._played = 0
            self._chooser.look(left)

    def widens(self, *, rows_wait: bool) -> bool:
        """Count a round without a shortage of memory -> whether more rows are admitted from now on."""
        self._calm += 1
        if self._admitted >= self._widest or not rows_wait or self._calm < CALM_ROUNDS:
            return False
        self._calm, self._admitted = 0, min(2 * self._admitted, self._widest)
        return True

    def narrow(self, rows: int) -> None:
        """Memory admits only so many."""
        self._calm, self._admitted = 0, max(rows, 1)
        if self._on_note is not None:
            most = (
                f"the {self._widest} asked for"
                if self._chooser is None
                else f"{self._chooser.width} that pay"
            )
            self._on_note(f"memory admits {self._admitted} rows at a time for now, of {most}; {REMEDY}")
            self._on_note = None

    def reset(self) -> None:
        """No row runs: as many as ever may be tried."""
        self._admitted = self._widest
