"""A conversation: the K/V of its tokens, and how far each new prompt can go on from what is there.

Gemma's template drops the thought channel from history, so a new turn often diverges inside the previous reply. Full
layers keep every row; a ring keeps only the newest, so rings are checkpointed before each model turn.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.config import SLIDING
from mlx_mtp.prefill import CHUNK, prefill
from mlx_mtp.state import (
    RING_SLACK,
    KeysValues,
    capacity_for,
    capacity_of,
    grow,
    kv_shapes,
    new_kv,
    ring_rows,
)
from mlx_mtp.target import Target

CHECKPOINT_BYTES = 2**30  # budget for the rings of one conversation
COMPARED = 512  # tokens that are compared at once


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The rings as they were when rows 0 .. length-1 were whole; holding them makes MLX copy on the next write."""

    length: int
    written: int  # rows up to here may have been written: dead rows of an earlier reply among them
    rings: dict[int, tuple[mx.array, mx.array]]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for pair in self.rings.values() for buffer in pair)


@dataclass(frozen=True, slots=True)
class Contents:
    """All that a history knows, to be kept and taken over: see `History`; of the checkpoints only the newest."""

    tokens: tuple[int, ...]
    rows: int
    written: int
    kv: KeysValues
    checkpoint: Checkpoint | None


class History:
    """K/V rows 0 .. rows-1 of `tokens`, between requests; `kv` is empty while a request has it."""

    def __init__(self, target: Target, *, checkpoint_bytes: int = CHECKPOINT_BYTES):
        self.target = target
        self.tokens: list[int] = []
        self.rows = 0
        self._written = 0  # rows up to here may have been written; those from `rows` on are dead
        self._kv: list[tuple[mx.array, mx.array]] = []
        self._checkpoints: list[Checkpoint] = []
        self._checkpoint_bytes = checkpoint_bytes
        self._is_shared = False  # another history may hold the same buffers: the next write copies them

    def fork(self) -> "History":
        """Another history of the same tokens; buffers are shared until one of the two writes."""
        other = History(self.target, checkpoint_bytes=self._checkpoint_bytes)
        other.tokens, other.rows, other._written = list(self.tokens), self.rows, self._written
        other._kv, other._checkpoints = list(self._kv), list(self._checkpoints)
        other._is_shared = True
        return other

    @property
    def contents(self) -> Contents | None:
        """What there is to keep; None while it has no K/V. Holding it makes MLX copy on the next write."""
        if not self._kv or not self.rows:
            return None
        newest = max(self._checkpoints, key=lambda checkpoint: checkpoint.length, default=None)
        return Contents(tuple(self.tokens), self.rows, self._written, tuple(self._kv), newest)

    def take_over(self, contents: Contents) -> None:
        """Go on from what another history had."""
        self.tokens, self.rows, self._written = list(contents.tokens), contents.rows, contents.written
        self._kv = list(contents.kv)
        self._checkpoints = [] if contents.checkpoint is None else [contents.checkpoint]
        self._is_shared = False

    def clear(self) -> None:
        """Forget everything; the next prompt starts cold."""
        self.tokens, self.rows, self._written = [], 0, 0
        self._kv, self._checkpoints = [], []

    def reusable(self, ids: Sequence[int]) -> int:
        """How many of `ids` need no forward pass: those that agree with rows which are still whole."""
        common = self.common(ids)
        if not self._kv:
            return 0
        if self._ring_reaches(common):
            return common
        return max((c.length for c in self._checkpoints if c.length <= common), default=0)

    def extend(
        self,
        ids: Sequence[int],
        *,
        room: int,
        boundaries: Sequence[int] = (),
        marks: Sequence[int] = (),
        chunk: int = CHUNK,
        on_progress: Callable[[int, int], None] | None = None,
        admit: Callable[[int], None] | None = None,
    ) -> tuple[KeysValues, mx.array, int]:
        """Forward what is new of `ids` -> K/V with room for `room` tokens more, the last hidden row, tokens reused.

        Rings are kept as they are before the last of `boundaries` and at each of `marks`. The caller gives the K/V back
        with `keep`. If `on_progress(done, total)` raises, rows of whole chunks are kept; if `admit(new bytes of K/V)`
        raises, everything is.
        """
        if not self._kv:
            self.clear()
        needed = capacity_for(len(ids) + room)
        if admit is not None:
            admit(self._new_bytes(needed))
        start = self._rewind(ids)
        if not self._kv:
            self._kv = list(new_kv(self.target, needed))
        elif capacity_of(self.target.text, tuple(self._kv)) < needed:
            grow(self.target.text, self._kv, needed)
        self._is_shared = False
        cuts = sorted({cut for cut in (*boundaries[-1:], *marks) if start < cut < len(ids)})
        hidden = self._prefill(ids, start, cuts, chunk, on_progress)
        kv, self._kv = tuple(self._kv), []
        return kv, hidden, start

    def _new_bytes(self, capacity: int) -> int:
        """What buffers with `capacity` rows take beyond those that are there; `grow` has one layer twice."""
        text, item = self.target.text, self.target.dtype.size
        there = capacity_of(text, tuple(self._kv)) if self._kv else 0
        if there >= capacity and not self._is_shared:
            return 0
        wanted = [2 * item * math.prod(shape) for shape in kv_shapes(text, 1, max(capacity, there))]
        if not self._kv or self._is_shared:
            return sum(wanted)
        return sum(wanted) - self.nbytes + max(wanted)

    @property
    def nbytes(self) -> int:
        """What the K/V takes, without checkpoints."""
        return sum(buffer.nbytes for pair in self._kv for buffer in pair)

    def buffers(self) -> Iterator[mx.array]:
        """All arrays that it holds, checkpoints' among them."""
        for both in self._kv:
            yield from both
        for checkpoint in self._checkpoints:
            for both in checkpoint.rings.values():
                yield from both

    def drop_rows(self) -> None:
        """Free the K/V but no checkpoint, for a history whose rows are coming back with `keep`."""
        self._kv = []

    def drop_checkpoints(self) -> None:
        """Free what is only kept to save work in later turns."""
        self._checkpoints = []

    def _prefill(
        self,
        ids: Sequence[int],
        start: int,
        cuts: Sequence[int],
        chunk: int,
        on_progress: Callable[[int, int], None] | None,
    ) -> mx.array:
        inside_chunk = True

        def on_chunk(done: int) -> None:
            nonlocal inside_chunk
            self.tokens, self.rows, self._written = list(ids[:done]), done, max(done, self._written)
            if done in cuts:
                self._checkpoint()
            if on_progress is not None:
                inside_chunk = False
                on_progress(done, len(ids))
                inside_chunk = True

        try:
            return prefill(self.target, self._kv, ids, start=start, chunk=chunk, cuts=cuts, on_chunk=on_chunk)
        finally:
            if inside_chunk:  # an interrupt may have left some layers' rows of the next chunk written
                self._written = max(self._written, min(self.rows + chunk, len(ids)))

    def keep(self, tokens: Sequence[int], kv: KeysValues) -> None:
        """Take back the K/V: rows of all `tokens` but the last are whole, up to two rounds beyond may be dead rows."""
        self.tokens = list(tokens)
        self.rows = len(tokens) - 1
        self._written = max(self._written, self.rows + RING_SLACK)
        self._kv = list(kv)

    def keep_prompt(self, ids: Sequence[int], kv: KeysValues) -> None:
        """Hold the K/V of a prompt too, of which all rows are whole; whoever decodes from it copies it then."""
        self.tokens, self.rows = list(ids), len(ids)
        self._written = max(self._written, self.rows)
        self._kv = list(kv)

    def common(self, ids: Sequence[int]) -> int:
        """Leading ids whose rows are there; the last id is always forwarded, for its hidden row."""
        limit, same = min(self.rows, len(ids) - 1), 0
        while same < limit and self.tokens[same : same + COMPARED] == ids[same : same + COMPARED]:
            same += COMPARED
        return next((i for i in range(same, limit) if self.tokens[i] != ids[i]), limit)

    def _ring_reaches(self, length: int) -> bool:
        """Whether rings still hold the window before `length`, though rows up to `_written` were written."""
        ring = ring_rows(self.target.text)
        return self._written <= ring or self._written - length <= RING_SLACK

    def _rewind(self, ids: Sequence[int]) -> int:
        """Make the rows before the returned position those of `ids`."""
        start = self.reusable(ids)
        reached = self._ring_reaches(self.common(ids))
        # Before any ring changes, so that an interrupt in between leaves no row trusted that is not there.
        self.tokens, self.rows = list(ids[:start]), start
        if not reached:
            self._restore(start)
        self._checkpoints = [c for c in self._checkpoints if c.length <= start]
        if start == 0:  # slots of stale rows hold no position of a cold run: masks leave them out
            self._written = 0
        return start

    def _restore(self, length: int) -> None:
        for checkpoint in self._checkpoints:
            if checkpoint.length == length:
                for i, ring in checkpoint.rings.items():
                    self._kv[i] = ring
                self._written = checkpoint.written

    def _checkpoint(self) -> None:
        """Keep the rings as they are now, dropping the oldest checkpoints over budget."""
        text = self.target.text
        owning = enumerate(text.layer_types[: text.first_shared_layer])
        rings = {i: self._kv[i] for i, kind in owning if kind == SLIDING}
        self._checkpoints = [c for c in self._checkpoints if c.length != self.rows]
        self._checkpoints.append(Checkpoint(self.rows, self._written, rings))
        while (
            sum(c.nbytes for c in self._checkpoints) > self._checkpoint_bytes and len(self._checkpoints) > 1
        ):
            del self._checkpoints[0]
