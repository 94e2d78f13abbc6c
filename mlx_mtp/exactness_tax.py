"""What exactness costs: plain decoding on our kernels against the same on stock operations, timed in turn."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_mtp.kernels.table import STOCK
from mlx_mtp.prefill import prefill
from mlx_mtp.round import Rounds
from mlx_mtp.sampling import Sampling, sampler_class, sampling_arrays
from mlx_mtp.state import State, StateCell, bucket_for, capacity_for, new_kv, no_drafts
from mlx_mtp.target import Target

PROMPT_ROWS = 64
WARM_UPS, REPEATS = 3, 15
GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Tax:
    """Time of plain decoding on our kernels over that on stock operations; None where not both exist.

    Below 1 exactness costs nothing: our kernels are the faster ones.
    """

    ratio: float | None
    reason: str

    def __str__(self) -> str:
        if self.ratio is None:
            return f"exactness tax: not measured: {self.reason}"
        return f"exactness tax: plain decoding takes {self.ratio:.2f}x the time of stock operations ({self.reason})"


def measure_tax(target: Target, *, compiled: bool = True, why_stock: Sequence[str] = ()) -> Tax:
    """Time rounds without drafts on both sets of kernels, in turn, medians; a second or two.

    why_stock: why operations stay with stock MLX, for the case that all do.
    """
    if target.kernels == STOCK:
        reasons = ", ".join(dict.fromkeys(why_stock)) or "none was chosen"
        return Tax(None, f"only stock operations run here ({reasons})")
    ours = _Timed(target, compiled)
    stock = _Timed(replace(target, kernels=STOCK), compiled)
    seconds: dict[str, list[float]] = {"ours": [], "stock": []}
    for turn in range(WARM_UPS + REPEATS):
        for name, timed in (("ours", ours), ("stock", stock)):
            taken = timed.round()
            if turn >= WARM_UPS:
                seconds[name].append(taken)
    mine, other = (statistics.median(seconds[name]) for name in ("ours", "stock"))
    return Tax(mine / other, f"{1e3 * mine:.3g} against {1e3 * other:.3g} ms a token, medians of {REPEATS}")


class _Timed:
    """Plain decoding that goes on by one round a call."""

    def __init__(self, target: Target, compiled: bool) -> None:
        ids = [(i * 7919 + 3) % target.text.vocab_size for i in range(PROMPT_ROWS)]
        end = PROMPT_ROWS + WARM_UPS + REPEATS + 1
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
        self._cell = StateCell(state)
        self._rounds = Rounds(target, None, compiled=compiled)
        self._bucket = bucket_for(end)

    def round(self) -> float:
        """Seconds of one round, from building it to its token."""
        started = time.perf_counter()
        state, tokens, _ = self._rounds(
            self._cell.take(), k=0, bucket=self._bucket, sampler=sampler_class([GREEDY])
        )
        mx.eval(state, tokens)
        self._cell.put(state)
        return time.perf_counter() - started
