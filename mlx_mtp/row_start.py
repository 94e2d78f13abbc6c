"""How a row of a batch starts: its context prefilled, once where several begin with the same, memory permitting."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_mtp.conversation import Request, start_row
from mlx_mtp.memory_parts import prefill_bytes
from mlx_mtp.pair import Pair
from mlx_mtp.pressure import REMEDY, Guard, StoppedForMemory
from mlx_mtp.reply import Chunk, Generation, Reply
from mlx_mtp.sampling import SamplerClass
from mlx_mtp.state import KeysValues, State, capacity_for, kv_shapes
from mlx_mtp.turns import History

OnProgress = Callable[[int, int], None]


@dataclass(slots=True)
class Row:
    """One reply of the batch; `reply` from when it is started, `result` from when it has ended."""

    index: int
    request: Request
    reply: Reply | None = None
    chunks: list[Chunk] = field(default_factory=list)
    result: Generation | None = None

    @property
    def written(self) -> list[int]:
        return [] if self.reply is None else self.reply.tokens

    @property
    def is_running(self) -> bool:
        return self.result is None

    @property
    def context(self) -> list[int]:
        """The tokens whose rows it needs before it can start or go on."""
        return [*self.request.ids, *self.written[:-1]]

    @property
    def room(self) -> int:
        """Tokens beyond `context` that it may still write."""
        return self.request.max_tokens - max(len(self.written) - 1, 0)


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A context's K/V and last hidden row, for as many rows as begin with it."""

    context: list[int]
    room: int
    kv: KeysValues
    hidden: mx.array
    reused: int
    began: float


@dataclass(frozen=True, slots=True)
class Place:
    """The batch that a row joins: its rows, how many of them have ended, and the capacity of its buffers."""

    rows: int
    free: int
    capacity: int


class Starter:
    """Makes the states with which rows join a batch."""

    def __init__(
        self,
        pair: Pair,
        guard: Guard,
        sampler: SamplerClass,
        on_progress: OnProgress | None,
        history: History | None,
    ):
        self.is_short = False  # memory was short while the last row was prefilled
        self._pair, self._guard, self._sampler = pair, guard, sampler
        self._on_progress, self._history = on_progress, history
        self._shared: Prefilled | None = None

    def forget(self) -> None:
        """Free the K/V that rows with the same context would begin with."""
        self._shared = None

    def forget_unless(self, row: Row | None) -> None:
        """`forget`, unless this row, which starts next, begins with it."""
        if self._shared is not None and (row is None or row.context != self._shared.context):
            self._shared = None

    def start(self, row: Row, others: int, place: Place | None) -> State:
        """The row's state; `others` join at the same time, `place` is None for the first of a batch.

        Raises MemoryRefusal if it does not fit.
        """
        prefilled = self._prefilled(row, others, place)
        if row.reply is None:
            row.reply = Reply(self._pair, row.request, prefilled.reused, prefilled.began)
        return start_row(
            self._pair,
            row.request,
            prefilled.kv,
            prefilled.hidden,
            with_bias=self._sampler.bias,
            with_counts=self._sampler.penalties,
            written=row.written,
        )

    def _prefilled(self, row: Row, others: int, place: Place | None) -> Prefilled:
        shared, context = self._shared, row.context
        self.is_short = False
        if shared is not None and shared.context == context and shared.room >= row.room:
            kv_bytes = sum(buffer.nbytes for both in shared.kv for buffer in both)
            self._guard.admit(self._joining_bytes(row, kv_bytes, others, place))
            return shared
        self._shared = None
        target, began = self._pair.target, time.perf_counter()
        scratch = prefill_bytes(target.text, len(context), len(context), target.dtype.size)

        def admit(new_bytes: int) -> None:
            joined = self._joining_bytes(row, new_bytes, others, place) if others or place else 0
            self._guard.admit(new_bytes + joined + scratch)

        history = self._history or History(target)
        kv, hidden, reused = history.extend(
            context,
            room=row.room,
            boundaries=row.request.boundaries,
            on_progress=self._watched,
            admit=admit,
        )
        if self._history is not None:
            history.keep(context, kv)
        self._shared = Prefilled(context, row.room, kv, hidden, reused, began)
        return self._shared

    def _joining_bytes(self, row: Row, kv_bytes: int, others: int, place: Place | None) -> int:
        """What joining takes beside the row's own K/V: all rows are copied, or one, or the others' buffers grow."""
        if place is None:
            return kv_bytes * (others + 1)
        growth = self._row_bytes(capacity_for(len(row.context) + row.room)) - self._row_bytes(place.capacity)
        return max(growth, 0) * place.rows + (kv_bytes if others >= place.free else 0)

    def _row_bytes(self, capacity: int) -> int:
        target = self._pair.target
        return sum(2 * target.dtype.size * math.prod(shape) for shape in kv_shapes(target.text, 1, capacity))

    def _watched(self, done: int, total: int) -> None:
        relief = self._guard.relief()
        if relief == "shrink":
            self.is_short = True
            mx.clear_cache()
        elif relief == "stop" and done < total:
            raise StoppedForMemory(
                f"this machine is short of memory, a prompt was given up at token {done:,} of {total:,}; {REMEDY}"
            )
        if self._on_progress is not None:
            self._on_progress(done, total)
