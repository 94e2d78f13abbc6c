"""How a row of a batch starts: its context prefilled, once where several begin with the same, memory permitting."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import mlx.core as mx

from mlx_mtp.conversation import Request, start_row
from mlx_mtp.errors import MemoryRefusal, MtpError
from mlx_mtp.memory_parts import prefill_bytes
from mlx_mtp.pair import Pair
from mlx_mtp.prefix_cache import Histories, Lease
from mlx_mtp.pressure import REMEDY, Guard, StoppedForMemory
from mlx_mtp.reply import Chunk, Gathered, Generation, Reply
from mlx_mtp.sampling import SamplerClass
from mlx_mtp.state import KeysValues, State, capacity_for, kv_shapes

OnProgress = Callable[[int, int], None]


class RowCancelled(Exception):
    """The row that is being started is not wanted any more."""


class Listener(Protocol):
    """Who is told of a row while it is written, on the thread that computes; none of these may raise."""

    @property
    def is_cancelled(self) -> bool:
        """Whether the row is to end within a round, or before its prefill's next chunk."""

    def progress(self, done: int, total: int) -> None:
        """Tokens of its prompt that are prefilled."""

    def chunk(self, chunk: Chunk) -> None:
        """What a round added; the last one has a finish_reason."""

    def failed(self, error: MtpError) -> None:
        """It cannot be started, or its batch failed."""


@dataclass(slots=True)
class Row:
    """One reply of the batch; `reply` from when it is started, `result` from when it has ended."""

    index: int
    request: Request
    listener: Listener | None = None
    reply: Reply | None = None
    lease: Lease | None = None  # where its K/V came from, and go when it has ended
    gathered: Gathered = field(default_factory=Gathered)
    result: Generation | None = None
    has_failed: bool = False  # ended without a result

    @property
    def written(self) -> list[int]:
        return [] if self.reply is None else self.reply.tokens

    @property
    def is_running(self) -> bool:
        return self.result is None and not self.has_failed

    @property
    def is_cancelled(self) -> bool:
        return self.listener is not None and self.listener.is_cancelled

    @property
    def context(self) -> list[int]:
        """The tokens whose rows it needs before it can start or go on."""
        return [*self.request.ids, *self.written[:-1]]

    @property
    def room(self) -> int:
        """Tokens beyond `context` that it may still write."""
        return self.request.max_tokens - max(len(self.written) - 1, 0)

    def take(self, chunk: Chunk) -> None:
        """Add what a round gave; its result is there once it has ended."""
        self.gathered.add(chunk)
        if chunk.finish_reason is not None:
            self.result, self.gathered = self.gathered.generation(), Gathered()
        if self.listener is not None:
            self.listener.chunk(chunk)

    def drop_lease(self, histories: Histories) -> None:
        """Its K/V do not come back."""
        if self.lease is not None:
            histories.dropped(self.lease)
            self.lease = None

    def fail(self, error: MtpError) -> None:
        """End without a result, for whoever listens."""
        self.has_failed = True
        if self.listener is not None:
            self.listener.failed(error)


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
        histories: Histories,
    ):
        self.is_short = False  # memory was short while the last row was prefilled
        self._pair, self._guard, self._sampler = pair, guard, sampler
        self._on_progress, self._histories = on_progress, histories
        self._shared: Prefilled | None = None

    def forget(self) -> None:
        """Free the K/V that rows with the same context would begin with."""
        self._shared = None

    def forget_unless(self, row: Row | None) -> None:
        """`forget`, unless this row, which starts next, begins with it."""
        if self._shared is not None and (row is None or row.context != self._shared.context):
            self._shared = None

    def start(
        self, row: Row, others: int, place: Place | None, meanwhile: Callable[[], None] | None = None
    ) -> State:
        """The row's state; `others` join at the same time, `place` is None for the first of a batch.

        meanwhile: what is done after each chunk of its prefill but the last.
        Raises MemoryRefusal if it does not fit, RowCancelled if nobody waits for it any more.
        """
        prefilled: Prefilled | None = None
        while prefilled is None:
            try:
                prefilled = self._prefilled(row, others, place, meanwhile)
            except MemoryRefusal as refusal:
                if isinstance(refusal, StoppedForMemory) or not self._histories.shrink():
                    raise
                mx.clear_cache()
        if row.reply is None:
            row.reply = Reply(self._pair, row.request, prefilled.reused, prefilled.began)
        try:
            return start_row(
                self._pair,
                row.request,
                prefilled.kv,
                prefilled.hidden,
                with_bias=self._sampler.bias,
                with_counts=self._sampler.penalties or row.request.sampling.penalises,
                written=row.written,
            )
        except BaseException:
            row.drop_lease(self._histories)
            raise

    def _prefilled(
        self, row: Row, others: int, place: Place | None, meanwhile: Callable[[], None] | None
    ) -> Prefilled:
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
            if self._histories.keeps_replies:  # what is reused is copied as it joins, the original stays
                whole = self._row_bytes(capacity_for(len(context) + row.room))
                joined = self._joining_bytes(row, whole, others, place)
            self._guard.admit(new_bytes + joined + scratch)

        lease = self._histories.take(context)
        try:
            kv, hidden, reused = lease.history.extend(
                context,
                room=row.room,
                boundaries=row.request.boundaries,
                marks=lease.marks,
                on_progress=partial(self._watched, row, meanwhile),
                admit=admit,
            )
        except BaseException:
            self._histories.interrupted(lease)
            raise
        self._histories.prefilled(lease, context, kv)
        row.lease = lease
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

    def _watched(self, row: Row, meanwhile: Callable[[], None] | None, done: int, total: int) -> None:
        if row.listener is not None:
            row.listener.progress(done, total)
        if row.is_cancelled and done < total:
            raise RowCancelled
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
        if meanwhile is not None and done < total:
            meanwhile()
