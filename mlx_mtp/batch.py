"""Many replies decoded together: rows join as soon as others have ended, and fewer run while memory is short."""

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_mtp.batch_choice import WidthChooser
from mlx_mtp.conversation import Request
from mlx_mtp.decode import RowLimits, Step, decode
from mlx_mtp.errors import GenerationError, MemoryRefusal, MtpError, ParameterError
from mlx_mtp.pair import Pair
from mlx_mtp.policy import Policy
from mlx_mtp.prefix_cache import Histories, OneHistory
from mlx_mtp.pressure import REMEDY, STOPPED, Guard, Relief, out_of_memory_refused
from mlx_mtp.reply import Chunk, Generation, Reply
from mlx_mtp.row_start import OnProgress, Place, Row, RowCancelled, Starter
from mlx_mtp.rows import add_rows, level_fields, put_rows, row_of
from mlx_mtp.sampling import sampler_class
from mlx_mtp.state import State, StateCell, capacity_of, join_rows, keep_rows
from mlx_mtp.turns import History

LOG = logging.getLogger(__name__)
MAX_BATCH = 64  # rows decoded together at most
LOOK_ROUNDS = 8  # rounds between two looks at whether another width pays
MEANWHILE_S = 0.1  # of rounds between two chunks of a prefill, at least one: rows that run slow down, no more
CALM_ROUNDS = 64  # rounds without a shortage after which a batch that was narrowed takes twice as many rows


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
        self.waiting = deque(rows)
        self.slots: list[Row] = []  # the rows of the state, those that have ended included
        self.cell = StateCell()
        self.sampler = sampler_class([row.request.sampling for row in rows])
        self.chooser = max_batch if isinstance(max_batch, WidthChooser) else None
        self.widest = max_batch.most if isinstance(max_batch, WidthChooser) else check_batch(max_batch)
        self.width = self.widest  # that memory admits
        self.calm = self.played = 0  # rounds since memory was short, and since the width was looked at
        self.tokens = 0
        self.was_noted = False
        self.steps: Generator[Step, None, None] | None = None  # the rounds, while they go on
        self.capacity = 0  # of the state's buffers, which the rounds have then
        self.ready: tuple[list[Row], list[State]] = ([], [])  # rows that were prefilled meanwhile
        self.starter = Starter(pair, guard, self.sampler, watch.on_progress, histories)
        if arrivals is not none_arrive:
            self.starter.meanwhile = self._play_meanwhile

    @property
    def wanted(self) -> int:
        """Rows that are to be decoded together now: as many as memory admits, and as pay."""
        return self.width if self.chooser is None else min(self.width, self.chooser.width)

    @property
    def running(self) -> list[int]:
        """Slots whose rows have not ended."""
        return [i for i, row in enumerate(self.slots) if row.is_running]

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
        self._hand_back()

    def abandon(self) -> list[Row]:
        """Let go of all that run, after `run` raised something -> the rows that were still to begin."""
        self.slots, self.cell, self.ready = [], StateCell(), ([], [])
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
            every = [row for row in (*self.slots, *self.ready[0], *self.waiting) if row.is_running]
            self.sampler = sampler_class([row.request.sampling for row in every])

    def _fill(self) -> None:
        """Let rows that wait join: in the places of those that have ended, then behind them."""
        self._hand_back()
        if not self.running:
            self.slots, self.cell, self.width = [], StateCell(), self.widest
        (joining, states), self.ready = self.ready, ([], [])
        if not joining:
            joining, states = self._start(self.wanted - len(self.running))
        text = self.pair.target.text
        if not self.slots:
            self.slots = joining
            if states:
                self.cell.put(join_rows(text, level_fields(states)))
            return
        if states:
            state, *states = level_fields([self.cell.take(), *states])
            self.cell.put(state)
            del state
        free = [i for i, row in enumerate(self.slots) if not row.is_running]
        if states and free:
            placed = dict(zip(free, states, strict=False))
            put_rows(text, self.cell, placed)
            for i, row in zip(placed, joining, strict=False):
                self.slots[i] = row
        if len(states) > len(free):
            add_rows(text, self.cell, states[len(free) :])
            self.slots += joining[len(free) :]
        if 2 * len(self.running) <= len(self.slots):
            self._keep(self.running)

    def _start(self, room: int) -> tuple[list[Row], list[State]]:
        """Prefill as many waiting rows as there is room and memory for; MemoryRefusal if no row is left to run."""
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
                return self.starter.start(row, others, self._place())
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

    def _place(self) -> Place | None:
        """Where rows would join; None while nothing runs."""
        if not self.slots:
            return None
        if self.steps is None:
            self.capacity = capacity_of(self.pair.target.text, self.cell.peek().kv)
        return Place(len(self.slots), len(self.slots) - len(self.running), self.capacity)

    # Rounds

    def _rounds(self) -> Relief:
        """Rounds until rows can join or leave, or less memory has to be taken -> what the guard said."""
        if not self.slots:
            return "none"
        try:
            for step in self._open_rounds():
                is_seen = self._take(step)
                self._look_for_arrivals()
                self._look_at_width()
                running = len(self.running)
                if not running or not is_seen:
                    return "none"
                if self.waiting and running < self.wanted:
                    if self.starter.meanwhile is not None:
                        self._reopen_rounds()
                        self.ready = self._start(self.wanted - running)
                    return "none"
                relief = self.guard.relief()
                if relief != "none":
                    return relief
                if self._may_widen() or (not self.waiting and 2 * running <= len(self.slots)):
                    return "none"
            return "none"
        finally:
            self._close_rounds()

    def _open_rounds(self) -> Generator[Step, None, None]:
        self._leave_out_ended()
        eos = frozenset(self.pair.prompt_format.eos_ids)
        limits = [
            RowLimits(row.request.max_tokens - len(row.written), eos, is_new=not row.written)
            for row in self.slots
        ]
        state = self.cell.peek()
        self.capacity = capacity_of(self.pair.target.text, state.kv)
        # Rows that wait may need what no row of the state does, and has no arrays for.
        sampler = replace(
            self.sampler,
            penalties=self.sampler.penalties and state.counts is not None,
            bias=self.sampler.bias and "bias" in state.sampling,
        )
        del state
        self.steps = decode(
            self.pair.rounds, self.cell, limits, self.policy, sampler, until_one_ends=bool(self.waiting)
        )
        return self.steps

    def _close_rounds(self) -> None:
        if self.steps is not None:
            self.steps.close()
            self.steps = None

    def _reopen_rounds(self) -> None:
        """Hand back what rows have left that have ended, so that others can begin with it, and go on without them."""
        if any(row.lease is not None and not row.is_running for row in self.slots):
            self._close_rounds()
            self._hand_back()
        if self.steps is None and self.running:
            self._open_rounds()

    def _play_meanwhile(self) -> None:
        """Rounds between two chunks of the prefill of a row that joins later, so that the others do not stand still."""
        until = time.perf_counter() + MEANWHILE_S
        while self.steps is not None and self.running:
            step = next(self.steps, None)
            if step is not None:
                self._take(step)
            else:
                self._close_rounds()
            if step is None or any(not row.is_running and row.lease is not None for row in self.slots):
                self._reopen_rounds()
            if time.perf_counter() >= until:
                return

    def _leave_out_ended(self) -> None:
        """Rows that ended by a stop string, which rounds know nothing of, write no more."""
        if len(self.running) < len(self.slots):
            state = self.cell.take()
            still = mx.array([row.is_running for row in self.slots])
            self.cell.put(state._replace(active=mx.logical_and(state.active, still)))

    def _take(self, step: Step) -> bool:
        """Hand on what a round gave -> whether the rounds know of every row that has ended by it."""
        is_seen = True
        for i, row in enumerate(self.slots):
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
            self._stop([*(self.slots[i] for i in self.running), *self.waiting], STOPPED)
            self.waiting.clear()
        elif relief == "shrink" and self.histories.shrink():
            mx.clear_cache()
        elif relief == "shrink" and self.running:
            kept = self.running[: -(-len(self.running) // 2)]
            aside = [self.slots[i] for i in self.running[len(kept) :]]
            self._hand_back()
            for row in aside:
                self._drop(row)
            self.waiting.extendleft(reversed(aside))
            self.starter.forget()
            self._narrow(len(kept))
            if len(kept) < len(self.slots):
                self._keep(kept)
            mx.clear_cache()

    def _keep(self, slots: list[int]) -> None:
        keep_rows(self.cell, slots)
        self.slots = [self.slots[i] for i in slots]

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

    def _hand_back(self) -> None:
        """Leave the K/V of rows that have ended to later requests; the state itself where no row runs any more."""
        ended = {i: row for i, row in enumerate(self.slots) if not row.is_running}
        for i, row in ended.items():
            if row.lease is None:
                continue
            lease, row.lease = row.lease, None
            if row.reply is None or row.reply.failed or not self.histories.keeps_replies:
                self.histories.dropped(lease)
            elif len(self.slots) == 1:
                self.histories.ended(lease, [*row.request.ids, *row.written], self.cell.take().kv)
                self.slots, self.cell = [], StateCell()
            else:
                self.histories.ended(lease, [*row.request.ids, *row.written], row_of(self.cell.peek(), i))

    def _drop(self, row: Row) -> None:
        if row.lease is not None:
            self.histories.dropped(row.lease)
            row.lease = None
