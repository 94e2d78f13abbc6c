"""K/V of earlier requests, so that one which begins alike prefills only what is new: kept under a budget of bytes.

An entry is a whole sequence: full layers' rows, the rings at its end and at checkpoints before it. A request goes on
with the entry of which it can reuse most. It takes that over where only a reply would be lost; elsewhere it starts from
a fork, and MLX copies the buffers when the first of the two writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_mtp.config import FULL, TextConfig
from mlx_mtp.state import KeysValues, capacity_for, capacity_of
from mlx_mtp.target import Target
from mlx_mtp.turns import History

LEAST_REUSED = 8  # tokens below which an entry is not touched
MOST_ENTRIES = 256  # all are looked at for each request
LEAST_MARKED = 64  # tokens that a checkpoint where requests part must save the next one


@dataclass(slots=True)
class Lease:
    """The history that a request's row starts from, and where its prefill keeps the rings for others."""

    history: History
    marks: tuple[int, ...] = ()
    prompt_tokens: int = 0
    is_running: bool = False  # a row decodes from it, and gives its K/V back in the end


class Histories(Protocol):
    """Where rows find what was prefilled before them, and leave what they have."""

    @property
    def keeps_replies(self) -> bool:
        """Whether `ended` wants the K/V, which may have to be copied out of a batch."""

    def take(self, ids: Sequence[int]) -> Lease:
        """What a row with these ids begins with."""

    def prefilled(self, lease: Lease, ids: Sequence[int], kv: KeysValues) -> None:
        """The row's prompt is whole: others may begin with it while the row runs."""

    def interrupted(self, lease: Lease) -> None:
        """The prefill ended early; whole chunks are in the history."""

    def ended(self, lease: Lease, tokens: Sequence[int], kv: KeysValues) -> None:
        """The row has ended with these tokens, all but the last of which have rows in `kv`."""

    def dropped(self, lease: Lease) -> None:
        """The row's K/V do not come back."""

    def shrink(self) -> bool:
        """Free what only saves time -> whether there was any."""


class OneHistory:
    """A conversation's history, which keeps the prompt that its answers share; None: every row starts cold."""

    keeps_replies = False  # which answer the conversation goes on with is not known yet

    def __init__(self, target: Target, history: History | None = None):
        self._target, self._history = target, history

    def take(self, ids: Sequence[int]) -> Lease:
        return Lease(self._history or History(self._target))

    def prefilled(self, lease: Lease, ids: Sequence[int], kv: KeysValues) -> None:
        if self._history is not None:
            lease.history.keep(ids, kv)

    def interrupted(self, lease: Lease) -> None:
        """Its history has what was done."""

    def ended(self, lease: Lease, tokens: Sequence[int], kv: KeysValues) -> None:
        """See `keeps_replies`."""

    def dropped(self, lease: Lease) -> None:
        """Its history has the prompt, no more."""

    def shrink(self) -> bool:
        return False


class PrefixCache:
    """Many histories, the longest unused dropped first where they take more than `budget` bytes; 0 keeps none.

    turn_id: the token that opens a turn, before whose second one rings are kept too: what comes before it, such as a
    system prompt with tools, is what otherwise different requests share. One thread only.
    """

    def __init__(self, target: Target, *, budget: int, turn_id: int | None = None):
        self.budget = budget
        self._target, self._turn_id = target, turn_id
        self._entries: list[Lease] = []  # the longest unused first

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def keeps_replies(self) -> bool:
        return self.budget > 0

    @property
    def nbytes(self) -> int:
        """What all entries take; a buffer that several share counts once."""
        return sum(
            {id(array): array.nbytes for entry in self._entries for array in entry.history.buffers()}.values()
        )

    def clear(self) -> None:
        """Drop all entries."""
        for entry in self._entries:
            entry.history.clear()
        self._entries = []

    def take(self, ids: Sequence[int]) -> Lease:
        if self.budget <= 0:
            return Lease(History(self._target))
        best = max(self._entries, key=lambda entry: entry.history.reusable(ids), default=None)
        reused = 0 if best is None else best.history.reusable(ids)
        shared = max((entry.history.common(ids) for entry in self._entries), default=0)
        marks = tuple(mark for mark in (shared, self._first_turn(ids)) if mark - reused >= LEAST_MARKED)
        if best is None or reused < LEAST_REUSED:
            return Lease(History(self._target), marks)
        if self._may_take_over(best, ids):
            self._remove(best)
            return Lease(best.history, marks)
        self._touch(best)
        return Lease(best.history.fork(), marks)

    def prefilled(self, lease: Lease, ids: Sequence[int], kv: KeysValues) -> None:
        lease.prompt_tokens, lease.is_running = len(ids), True
        if self.budget > 0:
            lease.history.keep_prompt(ids, kv)
        self._keep(lease)

    def interrupted(self, lease: Lease) -> None:
        lease.prompt_tokens, lease.is_running = lease.history.rows, False
        self._keep(lease)

    def ended(self, lease: Lease, tokens: Sequence[int], kv: KeysValues) -> None:
        lease.is_running = False
        if self.keeps_replies:
            lease.history.keep(tokens, trimmed(self._target.text, kv, len(tokens)))
        self._keep(lease)

    def dropped(self, lease: Lease) -> None:
        lease.is_running = False
        lease.history.clear()
        self._remove(lease)

    def shrink(self) -> bool:
        """Drop the longest unused half of what is kept."""
        before = self.nbytes
        self._trim(before // 2)
        return self.nbytes < before

    def _first_turn(self, ids: Sequence[int]) -> int:
        """Where the second turn of a chat opens; 0 where there is none."""
        opens = (at for at, token in enumerate(ids) if token == self._turn_id)
        return next((at for nth, at in enumerate(opens) if nth == 1), 0)

    def _may_take_over(self, entry: Lease, ids: Sequence[int]) -> bool:
        """Whether nobody misses what is lost: all of its prompt stays, or a fork would not fit into the budget."""
        if entry.is_running:
            return False
        history = entry.history
        return history.common(ids) >= entry.prompt_tokens - 1 or self.nbytes + history.nbytes > self.budget

    def _keep(self, lease: Lease) -> None:
        self._remove(lease)
        if self.budget > 0 and (lease.is_running or lease.history.nbytes):
            self._entries.append(lease)
            resting = [entry for entry in self._entries if not entry.is_running]
            for entry in resting[:-MOST_ENTRIES]:
                self._remove(entry)
            self._trim(self.budget)

    def _touch(self, entry: Lease) -> None:
        self._remove(entry)
        self._entries.append(entry)

    def _remove(self, lease: Lease) -> None:
        self._entries = [entry for entry in self._entries if entry is not lease]

    def _trim(self, budget: int) -> None:
        """Drop what running rows have copies of and give back, then whole entries, until `budget` bytes are enough."""
        for entry in sorted(self._entries, key=lambda entry: not entry.is_running):
            if self.nbytes <= budget:
                return
            if entry.is_running:
                entry.history.drop_rows()
            else:
                self._remove(entry)


def trimmed(text: TextConfig, kv: KeysValues, rows: int) -> KeysValues:
    """`kv` without most of the room that full layers have beyond `rows`, where that is more than half of them."""
    capacity = capacity_for(rows)
    if capacity_of(text, kv) <= 2 * capacity:
        return kv
    kinds = text.layer_types[: text.first_shared_layer]
    kept = mx.arange(capacity)  # `take` copies, a slice would hold the whole buffer
    smaller = tuple(
        (mx.take(keys, kept, axis=2), mx.take(values, kept, axis=2)) if kind == FULL else (keys, values)
        for kind, (keys, values) in zip(kinds, kv, strict=True)
    )
    mx.eval(smaller)
    return smaller
