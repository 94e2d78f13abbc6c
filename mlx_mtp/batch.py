"""Many replies decoded together: rows join as soon as others have ended, and fewer run while memory is short."""

import time
from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_mtp.batch_choice import WidthChooser
from mlx_mtp.batch_queue import Meanwhile, Queue
from mlx_mtp.batch_slots import Slots
from mlx_mtp.batch_watch import SILENT, Teller, Watch
from mlx_mtp.batch_width import MAX_BATCH, Width
from mlx_mtp.conversation import Request
from mlx_mtp.decode import Step
from mlx_mtp.errors import MemoryRefusal
from mlx_mtp.pair import Pair
from mlx_mtp.policy import Policy
from mlx_mtp.prefix_cache import Histories, OneHistory
from mlx_mtp.pressure import STOPPED, Guard, Relief, out_of_memory_refused
from mlx_mtp.reply import Generation
from mlx_mtp.row_start import Row, Starter
from mlx_mtp.sampling import sampler_class
from mlx_mtp.turns import History

MEANWHILE_S = 0.1  # of rounds between two chunks of a prefill, at least one: rows that run slow down, no more


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
        self._policy, self._guard, self._histories, self._watch = policy, guard, histories, watch
        # Rows that run do not wait for the prefills of those that arrive.
        self._is_live = arrivals is not none_arrive
        self._teller = Teller(pair, policy, watch)
        self._width = Width(max_batch, watch.on_note)
        self._slots = Slots(pair, policy, histories)
        sampler = sampler_class([row.request.sampling for row in rows])
        starter = Starter(pair, guard, sampler, watch.on_progress, histories)
        self._queue = Queue(rows, self._slots, starter, self._width, self._teller, arrivals)
        self._tokens = 0

    @property
    def running(self) -> list[Row]:
        """Rows that are decoded now."""
        return self._slots.running_rows

    @property
    def waiting(self) -> Sequence[Row]:
        """Rows that are not prefilled yet."""
        return self._queue.waiting

    @property
    def _meanwhile(self) -> Meanwhile | None:
        """What is done while other rows are prefilled; not kept, or the batch would outlive its end."""
        return self._play_meanwhile if self._is_live else None

    def run(self) -> None:
        """Until all rows have ended and none has arrived."""
        self._queue.look_for_arrivals()
        while self._queue or self.running:
            try:
                self._fill()
                relief = self._rounds()
            except MemoryRefusal as refusal:
                self._give_up(refusal)
                continue
            self._relieve(relief)
            self._queue.look_for_arrivals()
        self._slots.hand_back()
        self._slots.clear()

    def abandon(self) -> list[Row]:
        """Let go of all that run, after `run` raised something -> the rows that were still to begin."""
        self._slots.clear()
        return self._queue.let_go()

    # Rounds

    def _fill(self) -> None:
        """Let rows that wait join: in the places of those that have ended, then behind them."""
        self._slots.hand_back()
        if not self.running:
            self._slots.clear()
            self._width.reset()
        self._slots.join(*self._queue.take(self._meanwhile))
        if 0 < 2 * len(self.running) <= len(self._slots.rows):
            self._slots.keep(self._slots.running)

    def _rounds(self) -> Relief:
        """Rounds until rows can join or leave, or less memory has to be taken -> what the guard said."""
        if not self._slots.rows:
            return "none"
        try:
            for step in self._slots.open(self._queue.sampler, until_one_ends=bool(self.waiting)):
                is_seen = self._take(step)
                self._queue.look_for_arrivals()
                running = len(self.running)
                self._width.look(running + len(self.waiting))
                if not running or not is_seen:
                    return "none"
                if self.waiting and running < self._width.wanted:
                    if self._meanwhile is not None:
                        self._reopen_rounds()
                        self._queue.prepare(self._meanwhile)
                    return "none"
                relief = self._guard.relief()
                if relief != "none":
                    return relief
                if self._width.widens(rows_wait=bool(self.waiting)):
                    return "none"
                if not self.waiting and 2 * running <= len(self._slots.rows):
                    return "none"
            return "none"
        finally:
            self._slots.close()

    def _take(self, step: Step) -> bool:
        """Hand on what a round gave -> whether the rounds know of every row that has ended by it."""
        is_seen = True
        for i, row in enumerate(self._slots.rows):
            if not row.is_running or row.reply is None:
                continue
            row.reply.row = i
            chunk = row.reply.take(step, self._policy, is_cancelled=row.is_cancelled)
            self._tokens += len(chunk.tokens)
            self._teller.chunk(row, chunk)
            is_seen = is_seen and (row.is_running or step.finish[i] is not None)
        if self._watch.on_round is not None:
            self._watch.on_round(self._tokens)
        return is_seen

    def _play_meanwhile(self) -> None:
        """Rounds between two chunks of the prefill of a row that joins later, so that the others do not stand still."""
        until = time.perf_counter() + MEANWHILE_S
        while self.running and self._slots.is_open:
            step = self._slots.next()
            if step is None:
                self._slots.close()
            else:
                self._take(step)
            self._reopen_rounds()
            if time.perf_counter() >= until:
                return

    def _reopen_rounds(self) -> None:
        """Hand back what rows have left that have ended, so that others can begin with it, and go on without them."""
        if self._slots.has_leavings:
            self._slots.close()
            self._slots.hand_back()
        if self.running and not self._slots.is_open:
            self._slots.open(self._queue.sampler, until_one_ends=False)

    # Memory is short

    def _relieve(self, relief: Relief) -> None:
        """Carry out what the guard said."""
        if relief == "stop":
            self._histories.shrink()
            self._stop_all(STOPPED)
        elif relief == "shrink" and self._histories.shrink():
            mx.clear_cache()
        elif relief == "shrink" and self.running:
            self._put_half_aside()
            mx.clear_cache()

    def _put_half_aside(self) -> None:
        """The later half of the rows waits again, with what it has written."""
        places = self._slots.running
        kept = places[: -(-len(places) // 2)]
        aside = [self._slots.rows[i] for i in places[len(kept) :]]
        self._slots.hand_back()
        for row in aside:
            row.drop_lease(self._histories)
        self._queue.put_back(aside)
        self._width.narrow(len(kept))
        if len(kept) < len(self._slots.rows):
            self._slots.keep(kept)

    def _give_up(self, refusal: MemoryRefusal) -> None:
        """No row runs, and the next that waits does not fit."""
        note = f"{refusal}; what was written is kept"
        first = self._queue.waiting[0]
        if first.listener is not None and not first.written:
            self._queue.waiting.popleft().fail(refusal)
        elif self._watch.on_done is not None or first.listener is not None:
            self._teller.stop([self._queue.waiting.popleft()], note)
        elif self._tokens:
            self._stop_all(note)
        else:
            raise refusal
        mx.clear_cache()

    def _stop_all(self, note: str) -> None:
        self._teller.stop([*self.running, *self.waiting], note)
        self._queue.waiting.clear()
