"""A made-up text that goes on by one timed round a call: what calibration and the exactness tax measure with."""

import time

import mlx.core as mx

from mlx_mtp.prefill import prefill
from mlx_mtp.round import Rounds
from mlx_mtp.sampling import Sampling, sampler_class, sampling_arrays
from mlx_mtp.state import State, StateCell, bucket_for, capacity_for, new_kv, no_drafts

PROMPT_ROWS = 64
GREEDY = Sampling(temperature=0.0)


def capacity_of_rounds(room: int) -> int:
    """K/V rows of full layers that a text of `room` tokens takes."""
    return capacity_for(PROMPT_ROWS + room + 1)


class TimedRounds:
    """Greedy rounds over `room` tokens at most; one size of bucket throughout, so that only the drafts differ."""

    def __init__(self, rounds: Rounds, *, room: int) -> None:
        target = rounds.target
        ids = [(i * 7919 + 3) % target.text.vocab_size for i in range(PROMPT_ROWS)]
        end = PROMPT_ROWS + room + 1
        kv = list(new_kv(target, capacity_of_rounds(room)))
        hidden = prefill(target, kv, ids)
        state = State(
            kv=tuple(kv),
            length=mx.array([PROMPT_ROWS], mx.int32),
            last=mx.array([ids[0]], mx.uint32),
            hidden=hidden,
            drafts=no_drafts(1),
            seed=mx.array([0], mx.uint32),
            sampling=sampling_arrays(GREEDY, target.text.vocab_size),
            counts=None,
            active=mx.array([True]),
        )
        del kv, hidden
        mx.eval(state)
        self._cell, self._rounds = StateCell(state), rounds
        self._bucket, self._sampler = bucket_for(end), sampler_class([GREEDY])

    def play(self, drafts: int = 0) -> float:
        """Seconds of a round that verifies `drafts` drafts and makes as many, from building it to the last of them."""
        state = self._cell.take()
        if state.drafts.shape[1] != drafts:
            state = state._replace(drafts=no_drafts(1))
            state = self._rounds.first_drafts(state, k=drafts, bucket=self._bucket, sampler=self._sampler)
            mx.eval(state.drafts)
        started = time.perf_counter()
        state, tokens, _ = self._rounds(state, k=drafts, bucket=self._bucket, sampler=self._sampler)
        mx.eval(state, tokens)
        self._cell.put(state)
        return time.perf_counter() - started
