"""The rows of one state: which reply each one is, the rounds they are played in, and how they join and leave."""

from collections.abc import Generator, Sequence
from dataclasses import replace

import mlx.core as mx

from mlx_mtp.decode import RowLimits, Step, decode
from mlx_mtp.pair import Pair
from mlx_mtp.policy import Policy
from mlx_mtp.prefix_cache import Histories
from mlx_mtp.row_start import Place, Row
from mlx_mtp.rows import add_rows, level_fields, put_rows, row_of
from mlx_mtp.sampling import SamplerClass
from mlx_mtp.state import State, StateCell, capacity_of, join_rows, keep_rows


class Slots:
    """Rows of a batch, in the order of the state's; one that has ended keeps its place until another takes it."""

    def __init__(self, pair: Pair, policy: Policy, histories: Histories):
        self.rows: list[Row] = []
        self._pair, self._policy, self._histories = pair, policy, histories
        self._cell = StateCell()
        self._steps: Generator[Step, None, None] | None = None  # the rounds, while they go on
        self._capacity = 0  # of the state's buffers, which the rounds have then

    @property
    def running(self) -> list[int]:
        """Places of rows that have not ended."""
        return [i for i, row in enumerate(self.rows) if row.is_running]

    @property
    def running_rows(self) -> list[Row]:
        """Rows that have not ended, in the order of their places."""
        return [row for row in self.rows if row.is_running]

    @property
    def has_leavings(self) -> bool:
        """Whether rows have ended whose K/V was not handed back."""
        return any(row.lease is not None and not row.is_running for row in self.rows)

    @property
    def place(self) -> Place | None:
        """Where rows would join; None while there are none."""
        if not self.rows:
            return None
        if self._steps is None:
            self._capacity = capacity_of(self._pair.target.text, self._cell.peek().kv)
        return Place(len(self.rows), len(self.rows) - len(self.running), self._capacity)

    def clear(self) -> None:
        """Let go of the state."""
        self._steps = None
        self.rows, self._cell = [], StateCell()

    # Rows join

    def join(self, joining: list[Row], states: list[State]) -> None:
        """Take rows in with their solo states: in the places of those that have ended, then behind them."""
        text = self._pair.target.text
        if not states:
            return
        if not self.rows:
            self.rows = joining
            self._cell.put(states[0] if len(states) == 1 else join_rows(text, level_fields(states)))
            return
        state, *states = level_fields([self._cell.take(), *states])
        self._cell.put(state)
        del state
        free = [i for i, row in enumerate(self.rows) if not row.is_running]
        if free:
            placed = dict(zip(free, states, strict=False))
            put_rows(text, self._cell, placed)
            for i, row in zip(placed, joining, strict=False):
                self.rows[i] = row
        if len(states) > len(free):
            add_rows(text, self._cell, states[len(free) :])
            self.rows += joining[len(free) :]

    # Rounds

    def open(self, sampler: SamplerClass, *, until_one_ends: bool) -> Generator[Step, None, None]:
        """Begin rounds with all rows that run; the state is theirs until `close`."""
        self._leave_out_ended()
        eos = frozenset(self._pair.prompt_format.eos_ids)
        limits = [
            RowLimits(
                row.request.max_tokens - len(row.written),
                eos,
                is_new=row.is_running and not row.written,
                log_probs=row.request.log_probs if row.is_running else None,
            )
            for row in self.rows
        ]
        state = self._cell.peek()
        self._capacity = capacity_of(self._pair.target.text, state.kv)
        # Rows that wait may need what no row of the state does, and has no arrays for.
        own = replace(
            sampler,
            penalties=sampler.penalties and state.counts is not None,
            bias=sampler.bias and "bias" in state.sampling,
        )
        del state
        self._steps = decode(
            self._pair.rounds, self._cell, limits, self._policy, own, until_one_ends=until_one_ends
        )
        return self._steps

    @property
    def is_open(self) -> bool:
        return self._steps is not None

    def next(self) -> Step | None:
        """The next round; None where they are over."""
        return None if self._steps is None else next(self._steps, None)

    def close(self) -> None:
        """End the rounds, if they go on."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def _leave_out_ended(self) -> None:
        """Rows that ended by a stop string, which rounds know nothing of, write no more."""
        if len(self.running) < len(self.rows):
            state = self._cell.take()
            still = mx.array([row.is_running for row in self.rows])
            self._cell.put(state._replace(active=mx.logical_and(state.active, still)))

    # Rows leave

    def keep(self, places: Sequence[int]) -> None:
        """Narrow the state to these."""
        keep_rows(self._cell, places)
        self.rows = [self.rows[i] for i in places]

    def hand_back(self) -> None:
        """Leave the K/V of rows that have ended to later requests; the state itself where it has no other row."""
        ended = {i: row for i, row in enumerate(self.rows) if not row.is_running}
        for i, row in ended.items():
            if row.lease is None:
                continue
            if row.reply is None or row.reply.failed or not self._histories.keeps_replies:
                row.drop_lease(self._histories)
                continue
            lease, row.lease = row.lease, None
            tokens = [*row.request.ids, *row.written]
            if len(self.rows) > 1:
                self._histories.ended(lease, tokens, row_of(self._cell.peek(), i))
            else:
                self._histories.ended(lease, tokens, self._cell.take().kv)
                self.clear()
