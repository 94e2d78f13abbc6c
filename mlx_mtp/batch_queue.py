"""The rows that wait for a place in a batch: they arrive, and are prefilled while there is room, memory and time."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

from mlx_mtp.batch_slots import Slots
from mlx_mtp.batch_watch import Teller
from mlx_mtp.batch_width import Width
from mlx_mtp.errors import GenerationError, MemoryRefusal, MtpError
from mlx_mtp.pressure import out_of_memory_refused
from mlx_mtp.row_start import Row, RowCancelled, Starter
from mlx_mtp.sampling import sampler_class
from mlx_mtp.state import State

LOG = logging.getLogger(__name__)
# Of prefills: those that are ready join, so that their first tokens do not wait for the others.
JOIN_AFTER_S = 0.25

Meanwhile = Callable[[], None]  # what is done between the prefills of rows that others do not wait for


class Queue:
    """Rows that are still to join those in `slots`, in their order."""

    def __init__(
        self,
        rows: Sequence[Row],
        slots: Slots,
        starter: Starter,
        width: Width,
        teller: Teller,
        arrivals: Callable[[], Sequence[Row]],
    ):
        self.waiting = deque(rows)
        self.ready: tuple[list[Row], list[State]] = ([], [])  # rows that were prefilled meanwhile
        self.sampler = sampler_class(
            [row.request.sampling for row in rows]
        )  # which serves all rows there are
        self._slots, self._starter, self._width, self._teller = slots, starter, width, teller
        self._arrivals = arrivals

    def __bool__(self) -> bool:
        return bool(self.waiting or self.ready[0])

    def look_for_arrivals(self) -> None:
        """Take in rows that have arrived, and let go of those that nobody waits for any more."""
        arrived = self._arrivals()
        for row in [row for row in self.waiting if row.is_cancelled]:
            self.waiting.remove(row)
            self._teller.stop([row], None, "cancelled")
        if arrived:
            self.waiting.extend(arrived)
            every = (*self._slots.running_rows, *self.ready[0], *self.waiting)
            self.sampler = sampler_class([row.request.sampling for row in every])

    def put_back(self, rows: list[Row]) -> None:
        """Rows that were put aside go on before all others."""
        self.waiting.extendleft(reversed(rows))
        self._starter.forget()

    def let_go(self) -> list[Row]:
        """Forget what was prefilled -> the rows that were still to begin."""
        self.ready = ([], [])
        self._starter.forget()
        return list(self.waiting)

    def prepare(self, meanwhile: Meanwhile) -> None:
        """Prefill rows that join once the rounds that go on meanwhile are closed."""
        self.ready = self._start(meanwhile)

    def take(self, meanwhile: Meanwhile | None) -> tuple[list[Row], list[State]]:
        """The rows that join now, with their states: those that are ready, else prefilled here.

        MemoryRefusal if no row is left to run.
        """
        ready, self.ready = self.ready, ([], [])
        return ready if ready[0] else self._start(meanwhile)

    def _start(self, meanwhile: Meanwhile | None) -> tuple[list[Row], list[State]]:
        """Prefill waiting rows while there is room, memory and time; MemoryRefusal if no row is left to run."""
        room = self._width.wanted - len(self._slots.running)
        began = time.perf_counter()
        joining: list[Row] = []
        states: list[State] = []
        is_short = False
        while self.waiting and len(states) < room and not is_short:
            row = self.waiting[0]
            try:
                state = self._start_row(row, len(states), meanwhile)
            except MemoryRefusal:
                self._starter.forget()
                if not states and not self._slots.running:
                    raise
                is_short = True
                break
            self.waiting.popleft()
            if state is None:
                continue
            states.append(state)
            joining.append(row)
            is_short = self._starter.is_short
            if meanwhile is not None and not is_short:
                if time.perf_counter() - began > JOIN_AFTER_S:
                    break
                meanwhile()
        if is_short and self.waiting:
            self._width.narrow(len(self._slots.running) + len(states))
        self._starter.forget_unless(self.waiting[0] if self.waiting else None)
        return joining, states

    def _start_row(self, row: Row, others: int, meanwhile: Meanwhile | None) -> State | None:
        """Its state; None for a row with a listener that was cancelled or whose prefill failed: the others go on."""
        try:
            if row.is_cancelled:
                raise RowCancelled
            with out_of_memory_refused(self._starter.forget):
                return self._starter.start(row, others, self._slots.place, meanwhile)
        except RowCancelled:
            self._teller.stop([row], None, "cancelled")
        except MtpError:
            raise
        except Exception as error:
            if row.listener is None:
                raise
            row.fail(GenerationError(f"this reply could not begin ({error!r}); others are not affected"))
            LOG.exception("a reply could not begin")
        return None
