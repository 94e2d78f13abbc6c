"""Time a few rounds of each kind after a first reply, for those who ask, so that the next need not try them."""

import time
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_mtp.errors import ParameterError
from mlx_mtp.prefill import prefill
from mlx_mtp.progress import OnProgress, Progress, silent
from mlx_mtp.round_times import RoundTimes
from mlx_mtp.sampling import Sampling, sampler_class, sampling_arrays
from mlx_mtp.state import State, StateCell, bucket_for, capacity_for, new_kv, no_drafts

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair

PROMPT_ROWS = 64
NUMBERS = (0, 1, 2, 4, 8)  # of drafts
WARM_UPS, TIMED = 1, 3
ROUNDS = len(NUMBERS) * (WARM_UPS + TIMED)  # 20 at most: a reply's worth
GREEDY = Sampling(temperature=0.0)


def calibrate(pair: "Pair", on_progress: OnProgress = silent) -> RoundTimes:
    """Play at most 20 rounds with 0 to 8 drafts and tell the pair's times; -> those times.

    Raises ParameterError for a pair without a drafter: it has one kind of round only.
    """
    if pair.drafter is None:
        raise ParameterError(
            "times are compared with and without drafts, but the model was loaded without a drafter; "
            "load it with its assistant"
        )
    timed, times, played = _Timed(pair), pair.rounds.times, 0
    for drafts in NUMBERS:
        for turn in range(WARM_UPS + TIMED):
            on_progress(Progress("calibrate", f"timing rounds with {drafts} drafts", played, ROUNDS))
            seconds = timed.round(drafts)
            times.observe(drafts, seconds if turn >= WARM_UPS else None)
            played += 1
    on_progress(Progress("calibrate", "timed rounds", played, ROUNDS))
    return times


class _Timed:
    """A made-up text that goes on by one round a call."""

    def __init__(self, pair: "Pair") -> None:
        target = pair.target
        ids = [(i * 7919 + 3) % target.text.vocab_size for i in range(PROMPT_ROWS)]
        end = PROMPT_ROWS + ROUNDS * (NUMBERS[-1] + 1) + 1
        kv = list(new_kv(target, capacity_for(end)))
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
        self._cell, self._rounds = StateCell(state), pair.rounds
        self._bucket, self._sampler = bucket_for(end), sampler_class([GREEDY])

    def round(self, drafts: int) -> float:
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
