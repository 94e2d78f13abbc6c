"""Many replies decoded together, fewer at a time while memory is short: rows put aside go on later."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_mtp.conversation import Request, start_row
from mlx_mtp.decode import RowLimits, decode
from mlx_mtp.errors import MemoryRefusal
from mlx_mtp.memory_parts import prefill_bytes
from mlx_mtp.pair import Pair
from mlx_mtp.policy import Policy
from mlx_mtp.pressure import REMEDY, STOPPED, Guard, StoppedForMemory, out_of_memory_refused
from mlx_mtp.reply import Chunk, Generation, Reply, collect
from mlx_mtp.sampling import sampler_class
from mlx_mtp.state import KeysValues, State, StateCell, join_rows, keep_rows
from mlx_mtp.turns import History

OnProgress = Callable[[int, int], None]


@dataclass(slots=True)
class Row:
    """One reply of the batch; `reply` from when it is started."""

    request: Request
    reply: Reply | None = None
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def written(self) -> list[int]:
        return [] if self.reply is None else self.reply.tokens

    @property
    def is_running(self) -> bool:
        return self.reply is None or self.reply.finish_reason is None

    @property
    def context(self) -> list[int]:
        """The tokens whose rows it needs before it can start or go on."""
        return [*self.request.ids, *self.written[:-1]]


def generate_rows(
    pair: Pair,
    requests: Sequence[Request],
    policy: Policy,
    guard: Guard,
    on_progress: OnProgress | None = None,
) -> list[Generation]:
    """Replies to all requests, each the text of its own solo run where rows are invariant (see `exactness`).

    While memory is short the later half of the rows is put aside, again and again; their tokens are kept, and they are
    prefilled and go on when the others have ended. A row that was put aside has the same text where prefill and rounds
    round alike (as on a CPU in float32); elsewhere each token is still the target's own choice. Where nothing helps,
    rows end with finish_reason "error" and a `note`; MemoryRefusal is raised where no row could even start.
    """
    with out_of_memory_refused(lambda: None):
        return _Batch(pair, requests, policy, guard, on_progress).run()


class _Batch:
    def __init__(
        self,
        pair: Pair,
        requests: Sequence[Request],
        policy: Policy,
        guard: Guard,
        on_progress: OnProgress | None,
    ):
        self.pair, self.policy, self.guard, self.on_progress = pair, policy, guard, on_progress
        self.rows = [Row(request) for request in requests]
        self.sampler = sampler_class([request.sampling for request in requests])
        self.started = time.perf_counter()
        self.is_short = False  # memory was short while rows were being prefilled

    def run(self) -> list[Generation]:
        while waiting := [row for row in self.rows if row.is_running]:
            try:
                together, states = self._start(waiting)
            except MemoryRefusal as refusal:
                if not any(row.written for row in self.rows):
                    raise
                self._stop(waiting, f"{refusal}; what was written is kept")
                mx.clear_cache()
                break
            cell = StateCell(join_rows(self.pair.target.text, states))
            del states
            self._decode(together, cell)
        return [collect(row.chunks) for row in self.rows]

    def _start(self, waiting: list[Row]) -> tuple[list[Row], list[State]]:
        """Prefill as many rows as memory admits -> those rows and their states; raises MemoryRefusal if none fits.

        Rows with the same context share its prefill, and its K/V until they are joined.
        """
        states: list[State] = []
        shared: tuple[KeysValues, mx.array] | None = None
        context: list[int] = []
        self.is_short = False
        for row in waiting:
            try:
                if shared is None or row.context != context:
                    context, shared = row.context, self._prefill(row, len(states))
                else:
                    self.guard.admit(_bytes_of(shared[0]) * (len(states) + 1))
            except MemoryRefusal:
                if not states:
                    raise
                break
            states.append(self._state(row, *shared))
            if self.is_short:
                break
        return waiting[: len(states)], states

    def _prefill(self, row: Row, others: int) -> tuple[KeysValues, mx.array]:
        text, context = self.pair.target.text, row.context
        scratch = prefill_bytes(text, len(context), len(context), self.pair.target.dtype.size)

        def admit(new_bytes: int) -> None:
            joined = new_bytes * (others + 1) if others else 0  # joining copies every row
            self.guard.admit(new_bytes + joined + scratch)

        kv, hidden, _ = History(self.pair.target).extend(
            context,
            room=row.request.max_tokens - max(len(row.written) - 1, 0),
            on_progress=self._watched,
            admit=admit,
        )
        return kv, hidden

    def _watched(self, done: int, total: int) -> None:
        relief = self.guard.relief()
        if relief == "shrink":
            self.is_short = True
            mx.clear_cache()
        elif relief == "stop" and done < total:
            raise StoppedForMemory(
                f"this machine is short of memory, a prompt was given up at token {done:,} of {total:,}; {REMEDY}"
            )
        if self.on_progress is not None:
            self.on_progress(done, total)

    def _state(self, row: Row, kv: KeysValues, hidden: mx.array) -> State:
        state = start_row(
            self.pair,
            row.request,
            kv,
            hidden,
            with_bias=self.sampler.bias,
            with_counts=self.sampler.penalties,
            written=row.written,
        )
        if row.reply is None:
            row.reply = Reply(self.pair, row.request, 0, self.started)
        return state

    def _decode(self, rows: list[Row], cell: StateCell) -> None:
        """Rounds until the rows have ended, stopped or been put aside."""
        while rows:
            relief = self._rounds(rows, cell)
            running = [i for i, row in enumerate(rows) if row.is_running]
            if relief == "stop":
                self._stop([row for row in self.rows if row.is_running], STOPPED)
            if relief != "shrink" or not running:
                return
            kept = running[: -(-len(running) // 2)]
            if len(kept) < len(rows):
                keep_rows(cell, kept)
                rows = [rows[i] for i in kept]
            mx.clear_cache()

    def _rounds(self, rows: list[Row], cell: StateCell) -> str:
        """Rounds until all rows have ended, or less memory has to be taken -> what the guard said."""
        eos = frozenset(self.pair.prompt_format.eos_ids)
        limits = [
            RowLimits(row.request.max_tokens - len(row.written), eos, is_new=not row.written) for row in rows
        ]
        steps = decode(self.pair.rounds, cell, limits, self.policy, self.sampler)
        relief = "none"
        for step in steps:
            for i, row in enumerate(rows):
                if row.is_running and row.reply is not None:
                    row.reply.row = i
                    row.chunks.append(row.reply.take(step, self.policy))
            if not any(row.is_running for row in rows):
                break
            relief = self.guard.relief()
            if relief != "none":
                break
        steps.close()
        return relief

    def _stop(self, rows: list[Row], note: str) -> None:
        for row in rows:
            if row.reply is None:
                row.reply = Reply(self.pair, row.request, 0, self.started)
            row.chunks.append(row.reply.stop(self.policy, note))


def _bytes_of(kv: KeysValues) -> int:
    return sum(buffer.nbytes for both in kv for buffer in both)
