"""Many replies decoded together: rows join as soon as others have ended, and fewer run while memory is short."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_mtp.batch_choice import WidthChooser
from mlx_mtp.batch_slots import Slots
from mlx_mtp.batch_watch import MAX_BATCH, SILENT, Watch, check_batch
from mlx_mtp.conversation import Request
from mlx_mtp.decode import Step
from mlx_mtp.errors import GenerationError, MemoryRefusal, MtpError
from mlx_mtp.pair import Pair
from mlx_mtp.policy import Policy
from mlx_mtp.prefix_cache import Histories, OneHistory
from mlx_mtp.pressure import REMEDY, STOPPED, Guard, Relief, out_of_memory_refused
from mlx_mtp.reply import Chunk, Generation, Reply
from mlx_mtp.row_start import Row, RowCancelled, Starter
from mlx_mtp.sampling import sampler_class
from mlx_mtp.state import State
from mlx_mtp.turns import History

__all__ = [
    "CALM_ROUNDS",
    "LOOK_ROUNDS",
    "MAX_BATCH",
    "SILENT",
    "Batch",
    "Watch",
    "check_batch",
    "generate_rows",
    "none_arrive",
]

LOG = logging.getLogger(__name__)
LOOK_ROUNDS = 8  # rounds between two looks at whether another width pays
MEANWHILE_S = 0.1  # of rounds between two chunks of a prefill, at least one: rows that run slow down, no more
JOIN_AFTER_S = (
    0.25  # of prefills: those that are ready join, so that their first tokens do not wait for the others
)
CALM_ROUNDS = 64  # rounds without a shortage after which a batch that was narrowed takes twice as many rows


def generate_rows(
    pair: Pair,
    requests: Sequence[Request],
    policy: Policy,
    guard: Guard,
    watch: Watch = SILENT,
    *,
    max_batch: int | WidthChooser = MAX_BATCH,
    history: History | None = None,
) -> list[Generation]:
    """Replies to all requests, each the text of its own solo run where rows are invariant (see `exactness`).

    At most `max_batch` are decoded together, or as many as pay; the others wait, and one joins at the end of a round in
    which another has ended. Requests with the same ids that follow one another share a prefill. `history` is what
    their prompts have in common with earlier ones, and keeps the rows of the last.

    While memory is short the later half of the rows is put aside, again and again; their tokens are kept, and they are
    prefilled and go on when there is room. A row that was put aside has the same text where prefill and rounds round
    alike (as on a CPU in float32); elsewhere each token is still the target's own choice. Where nothing helps, rows end
    with finish_reason "error" and a `note`; MemoryRefusal is raised where no row could even start. With
    `watch.on_done` nothing is raised: a row that does not fit ends alone, and the others go on.
    """
    rows = [Row(index, request) for index, request in enumerate(requests)]
    histories = OneHistory(pair.target, history)
    with out_of_memory_refused(lambda: None):
        Batch(pair, rows, policy, guard, histories, watch=watch, max_batch=max_batch).run()
    return [row.result for row in rows if row.result is not None]


def none_arrive() -> Sequence[Row]:
    """For batches whose rows are all there when they begin."""
    return ()


class Batch:
    """The rows that are decoded together and those that wait; more may arrive between two rounds."""

    def __init__(
        self,
        pair: Pair,
        rows: Sequence[Row],
        policy: Policy,
        guard: Guard,
        histories: Histories,
        *,
        watch: Watch = SILENT,
        max_batch: int | WidthChooser = MAX_BATCH,
        arrivals: Callable[[], Sequence[Row]] = none_arrive,
    ):
        self.pair, self.policy, self.guard, self.watch = pair, policy, guard, watch
        self.histories, self.arrivals = histories, arrivals
        # Rows that run do not wait for the prefills of those that arrive.
        self.is_live = arrivals is not none_arrive
        self.waiting = deque(rows)
        self.slots = Slots(pair, policy, histories)
        self.sampler = sampler_class([row.request.sampling for row in rows])
        self.chooser = max_batch if isinstance(max_batch, WidthChooser) else None
        self.widest = max_batch.most if isinstance(max_batch, WidthChooser) else check_batch(max_batch)
        self.width = self.widest  # that memory admits
        self.calm = self.played = 0  # rounds since memory was short, and since the width was looked at
        self.tokens = 0
        self.was_noted = False
        self.ready: tuple[list[Row], list[State]] = ([], [])  # rows that were prefilled meanwhile
        self.starter = Starter(pair, guard, self.sampler, watch.on_progress, histories)

    @property
    def wanted(self) -> int:
        """Rows that are to be decoded together now: as many as memory admits, and as pay."""
        return self.width if self.chooser is None else min(self.width, self.chooser.width)

    @property
    def running(self) -> list[Row]:
        """Rows that are decoded now."""
        return [row for row in self.slots.rows if row.is_running]

    def run(self) -> None:
        """Until all rows have ended and none has arrived."""
        self._look_for_arrivals()
        while self.waiting or self.running or self.ready[0]:
            try:
                self._fill()
                relief = self._rounds()
            except MemoryRefusal as refusal:
                self._give_up(refusal)
                continue
            self._relieve(relief)
            self._look_for_arrivals()
        self.slots.hand_back()
        self.slots.clear()

    def abandon(self) -> list[Row]:
        """Let go of all that run, after `run` raised something -> the rows that were still to begin."""
        self.slots.clear()
        self.ready = ([], [])
        self.starter.forget()
        return list(self.waiting)

    # Rows join

    def _look_for_arrivals(self) -> None:
        arrived = self.arrivals()
        for row in [row for row in self.waiting if row.is_cancelled]:
            self.waiting.remove(row)
            self._stop([row], None, "cancelled")
        if arrived:
            self.waiting.extend(arrived)
            every = (*self.running, *self.ready[0], *self.waiting)
            self.sampler = sampler_class([row.request.sampling for row in every])

    def _fill(self) -> None:
        """Let rows that wait join: in the places of those that have ended, then behind them."""
        self.slots.hand_back()
        if not self.running:
            self.slots.clear()
            self.width = self.widest
        (joining, states), self.ready = self.ready, ([], [])
        if not joining:
            joining, states = self._start(self.wanted - len(self.running))
        self.slots.join(joining, states)
        del states
        if 0 < 2 * len(self.running) <= len(self.slots.rows):
            self.slots.keep(self.slots.running)

    def _start(self, room: int) -> tuple[list[Row], list[State]]:
        """Prefill waiting rows while there is room, memory and time; MemoryRefusal if no row is left to run."""
        began = time.perf_counter()
        joining: list[Row] = []
        states: list[State] = []
        is_short = False
        while self.waiting and len(states) < room and not is_short:
            row = self.waiting[0]
            try:
                state = self._start_row(row, len(states))
            except MemoryRefusal:
                self.starter.forget()
                if not states and not self.running:
                    raise
                is_short = True
                break
            self.waiting.popleft()
            if state is None:
                continue
            states.append(state)
            joining.append(row)
            is_short = self.starter.is_short
            if self.is_live and not is_short:
                if time.perf_counter() - began > JOIN_AFTER_S:
                    break
                self._play_meanwhile()
        if is_short and self.waiting:
            self._narrow(len(self.running) + len(states))
        self.starter.forget_unless(self.waiting[0] if self.waiting else None)
        return joining, states

    def _start_row(self, row: Row, others: int) -> State | None:
        """Its state; None for a row with a listener that was cancelled or whose prefill failed: the others go on."""
        try:
            if row.is_cancelled:
                raise RowCancelled
            with out_of_memory_refused(self.starter.forget):
                meanwhile = self._play_meanwhile if self.is_live else None
                return self.starter.start(row, others, self.slots.place, meanwhile)
        except RowCancelled:
            self._stop([row], None, "cancelled")
        except MtpError:
            raise
        except Exception as error:
            if row.listener is None:
                raise
            row.fail(GenerationError(f"this reply could not begin ({error!r}); others are not affected"))
            LOG.exception("a reply could not begin")
        return None

    # Rounds

    def _rounds(self) -> Relief:
        """Rounds until rows can join or leave, or less memory has to be taken -> what the guard said."""
        if not self.slots.rows:
            return "none"
        try:
            for step in self.slots.open(self.sampler, until_one_ends=bool(self.waiting)):
                is_seen = self._take(step)
                self._look_for_arrivals()
                self._look_at_width()
                running = len(self.running)
                if not running or not is_seen:
                    return "none"
                if self.waiting and running < self.wanted:
                    if self.is_live:
                        self._reopen_rounds()
                        self.ready = self._start(self.wanted - running)
                    return "none"
                relief = self.guard.relief()
                if relief != "none":
                    return relief
                if self._may_widen() or (not self.waiting and 2 * running <= len(self.slots.rows)):
                    return "none"
            return "none"
        finally:
            self.slots.close()

    def _reopen_rounds(self) -> None:
        """Hand back what rows have left that have ended, so that others can begin with it, and go on without them."""
        if self.slots.has_leavings:
            self.slots.close()
            self.slots.hand_back()
        if self.running and not self.slots.is_open:
            self.slots.open(self.sampler, until_one_ends=False)

    def _play_meanwhile(self) -> None:
        """Rounds between two chunks of the prefill of a row that joins later, so that the others do not stand still."""
        until = time.perf_counter() + MEANWHILE_S
        while self.running and self.slots.is_open:
            step = self.slots.next()
            if step is None:
                self.slots.close()
            else:
                self._take(step)
            self._reopen_rounds()
            if time.perf_counter() >= until:
                return

    def _take(self, step: Step) -> bool:
        """Hand on what a round gave -> whether the rounds know of every row that has ended by it."""
        is_seen = True
        for i, row in enumerate(self.slots.rows):
            if not row.is_running or row.reply is None:
                continue
            row.reply.row = i
            chunk = row.reply.take(step, self.policy, is_cancelled=row.is_cancelled)
            self.tokens += len(chunk.tokens)
            self._end_with(row, chunk)
            is_seen = is_seen and (row.is_running or step.finish[i] is not None)
        if self.watch.on_round is not None:
            self.watch.on_round(self.tokens)
        return is_seen

    def _look_at_width(self) -> None:
        self.played += 1
        if self.chooser is not None and self.played >= LOOK_ROUNDS:
            self.played = 0
            self.chooser.look(len(self.running) + len(self.waiting))

    def _may_widen(self) -> bool:
        self.calm += 1
        if self.width >= self.widest or not self.waiting or self.calm < CALM_ROUNDS:
            return False
        self.calm, self.width = 0, min(2 * self.width, self.widest)
        return True

    # Rows leave

    def _relieve(self, relief: Relief) -> None:
        """Carry out what the guard said."""
        if relief == "stop":
            self.histories.shrink()
            self._stop([*self.running, *self.waiting], STOPPED)
            self.waiting.clear()
        elif relief == "shrink" and self.histories.shrink():
            mx.clear_cache()
        elif relief == "shrink" and self.running:
            places = self.slots.running
            kept = places[: -(-len(places) // 2)]
            aside = [self.slots.rows[i] for i in places[len(kept) :]]
            self.slots.hand_back()
            for row in aside:
                self.slots.drop(row)
            self.waiting.extendleft(reversed(aside))
            self.starter.forget()
            self._narrow(len(kept))
            if len(kept) < len(self.slots.rows):
                self.slots.keep(kept)
            mx.clear_cache()

    def _narrow(self, width: int) -> None:
        self.calm, self.width = 0, max(width, 1)
        if self.watch.on_note is not None and not self.was_noted:
            self.was_noted = True
            most = (
                f"the {self.widest} asked for" if self.chooser is None else f"{self.chooser.width} that pay"
            )
            self.watch.on_note(f"memory admits {self.width} rows at a time for now, of {most}; {REMEDY}")

    def _give_up(self, refusal: MemoryRefusal) -> None:
        """No row runs, and the next that waits does not fit."""
        note = f"{refusal}; what was written is kept"
        first = self.waiting[0]
        if first.listener is not None and not first.written:
            self.waiting.popleft().fail(refusal)
        elif self.watch.on_done is not None or first.listener is not None:
            self._stop([self.waiting.popleft()], note)
        elif self.tokens:
            self._stop(list(self.waiting), note)
            self.waiting.clear()
        else:
            raise refusal
        mx.clear_cache()

    def _stop(self, rows: list[Row], note: str | None, reason: str = "error") -> None:
        for row in rows:
            if row.reply is None:
                row.reply = Reply(self.pair, row.request, 0, time.perf_counter())
            self._end_with(row, row.reply.stop(self.policy, note, reason))

    def _end_with(self, row: Row, chunk: Chunk) -> None:
        """Add a chunk, which may be the row's last."""
        row.take(chunk)
        if self.watch.on_chunk is not None:
            self.watch.on_chunk(row.index, chunk)
        if row.result is not None and self.watch.on_done is not None:
            self.watch.on_done(row.index, row.result)
