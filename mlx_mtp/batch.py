"""Many replies decoded together: rows join as soon as others have ended, and fewer run while memory is short."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.conversation import Request
from mlx_mtp.decode import RowLimits, Step, decode
from mlx_mtp.errors import MemoryRefusal, ParameterError
from mlx_mtp.pair import Pair
from mlx_mtp.policy import Policy
from mlx_mtp.pressure import REMEDY, STOPPED, Guard, Relief, out_of_memory_refused
from mlx_mtp.reply import Generation, Reply, collect
from mlx_mtp.row_start import OnProgress, Place, Row, Starter
from mlx_mtp.rows import add_rows, put_rows
from mlx_mtp.sampling import sampler_class
from mlx_mtp.state import State, StateCell, capacity_of, join_rows, keep_rows
from mlx_mtp.turns import History

MAX_BATCH = 64  # rows decoded together at most
CALM_ROUNDS = 64  # rounds without a shortage after which a batch that was narrowed takes twice as many rows


def check_batch(max_batch: int) -> int:
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
    rows. on_done(index, reply): a request's reply has ended. on_note(text): said once, where memory admits fewer rows.
    """

    on_progress: OnProgress | None = None
    on_round: Callable[[int], None] | None = None
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
    max_batch: int = MAX_BATCH,
    history: History | None = None,
) -> list[Generation]:
    """Replies to all requests, each the text of its own solo run where rows are invariant (see `exactness`).

    At most `max_batch` are decoded together; the others wait, and one joins at the end of a round in which another has
    ended. Requests with the same ids that follow one another share a prefill. `history` is what their prompts have in
    common with earlier ones, and keeps the rows of the last.

    While memory is short the later half of the rows is put aside, again and again; their tokens are kept, and they are
    prefilled and go on when there is room. A row that was put aside has the same text where prefill and rounds round
    alike (as on a CPU in float32); elsewhere each token is still the target's own choice. Where nothing helps, rows end
    with finish_reason "error" and a `note`; MemoryRefusal is raised where no row could even start. With
    `watch.on_done` nothing is raised: a row that does not fit ends alone, and the others go on.
    """
    with out_of_memory_refused(lambda: None):
        return _Batch(pair, requests, policy, guard, watch, check_batch(max_batch), history).run()


class _Batch:
    def __init__(
        self,
        pair: Pair,
        requests: Sequence[Request],
        policy: Policy,
        guard: Guard,
        watch: Watch,
        max_batch: int,
        history: History | None,
    ):
        self.pair, self.policy, self.guard, self.watch = pair, policy, guard, watch
        self.rows = [Row(index, request) for index, request in enumerate(requests)]
        self.waiting = deque(self.rows)
        self.slots: list[Row] = []  # the rows of the state, those that have ended included
        self.cell = StateCell()
        self.sampler = sampler_class([request.sampling for request in requests])
        self.width, self.widest = max_batch, max_batch
        self.calm = 0  # rounds since memory was short
        self.tokens = 0
        self.was_noted = False
        self.starter = Starter(pair, guard, self.sampler, watch.on_progress, history)

    @property
    def running(self) -> list[int]:
        """Slots whose rows have not ended."""
        return [i for i, row in enumerate(self.slots) if row.is_running]

    def run(self) -> list[Generation]:
        while self.waiting or self.running:
            try:
                self._fill()
            except MemoryRefusal as refusal:
                self._give_up(refusal)
                continue
            self._relieve(self._rounds())
        return [row.result for row in self.rows if row.result is not None]

    # Rows join

    def _fill(self) -> None:
        """Let rows that wait join: in the places of those that have ended, then behind them."""
        if not self.running:
            self.slots, self.cell, self.width = [], StateCell(), self.widest
        joining, states = self._start(self.width - len(self.running))
        text = self.pair.target.text
        if states and not self.slots:
            self.slots = joining
            self.cell.put(join_rows(text, states))
            return
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
                states.append(self.starter.start(row, len(states), self._place()))
            except MemoryRefusal:
                self.starter.forget()
                if not states and not self.running:
                    raise
                is_short = True
                break
            joining.append(self.waiting.popleft())
            is_short = self.starter.is_short
        if is_short and self.waiting:
            self._narrow(len(self.running) + len(states))
        self.starter.forget_unless(self.waiting[0] if self.waiting else None)
        return joining, states

    def _place(self) -> Place | None:
        """Where rows would join; None while nothing runs."""
        if not self.slots:
            return None
        capacity = capacity_of(self.pair.target.text, self.cell.peek().kv)
        return Place(len(self.slots), len(self.slots) - len(self.running), capacity)

    # Rounds

    def _rounds(self) -> Relief:
        """Rounds until rows can join or leave, or less memory has to be taken -> what the guard said."""
        if not self.slots:
            return "none"
        began_with = len(self.running)
        self._leave_out_ended()
        eos = frozenset(self.pair.prompt_format.eos_ids)
        limits = [
            RowLimits(row.request.max_tokens - len(row.written), eos, is_new=not row.written)
            for row in self.slots
        ]
        steps = decode(
            self.pair.rounds, self.cell, limits, self.policy, self.sampler, until_one_ends=bool(self.waiting)
        )
        try:
            for step in steps:
                self._take(step)
                running = len(self.running)
                if not running or (self.waiting and running < began_with):
                    return "none"
                relief = self.guard.relief()
                if relief != "none":
                    return relief
                if self._may_widen() or (not self.waiting and 2 * running <= len(self.slots)):
                    return "none"
            return "none"
        finally:
            steps.close()

    def _leave_out_ended(self) -> None:
        """Rows that ended by a stop string, which rounds know nothing of, write no more."""
        if len(self.running) < len(self.slots):
            state = self.cell.take()
            still = mx.array([row.is_running for row in self.slots])
            self.cell.put(state._replace(active=mx.logical_and(state.active, still)))

    def _take(self, step: Step) -> None:
        for i, row in enumerate(self.slots):
            if not row.is_running or row.reply is None:
                continue
            row.reply.row = i
            chunk = row.reply.take(step, self.policy)
            self.tokens += len(chunk.tokens)
            row.chunks.append(chunk)
            if chunk.finish_reason is not None:
                self._end(row)
        if self.watch.on_round is not None:
            self.watch.on_round(self.tokens)

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
            self._stop([*(self.slots[i] for i in self.running), *self.waiting], STOPPED)
            self.waiting.clear()
        elif relief == "shrink" and self.running:
            kept = self.running[: -(-len(self.running) // 2)]
            aside = [self.slots[i] for i in self.running[len(kept) :]]
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
            self.watch.on_note(
                f"memory admits {self.width} rows at a time for now, of the {self.widest} asked for; {REMEDY}"
            )

    def _give_up(self, refusal: MemoryRefusal) -> None:
        """No row runs, and the next that waits does not fit."""
        note = f"{refusal}; what was written is kept"
        if self.watch.on_done is not None:
            self._stop([self.waiting.popleft()], note)
        elif any(row.written for row in self.rows):
            self._stop(list(self.waiting), note)
            self.waiting.clear()
        else:
            raise refusal
        mx.clear_cache()

    def _stop(self, rows: list[Row], note: str) -> None:
        for row in rows:
            if row.reply is None:
                row.reply = Reply(self.pair, row.request, 0, time.perf_counter())
            row.chunks.append(row.reply.stop(self.policy, note))
            self._end(row)

    def _end(self, row: Row) -> None:
        row.result, row.chunks = collect(row.chunks), []
        if self.watch.on_done is not None:
            self.watch.on_done(row.index, row.result)
