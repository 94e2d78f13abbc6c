"""What exactness costs: plain decoding on our kernels against the same on stock operations, timed in turn."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlx_mtp.kernels.table import STOCK
from mlx_mtp.round import Rounds
from mlx_mtp.target import Target
from mlx_mtp.timed_rounds import TimedRounds

WARM_UPS, REPEATS = 3, 15


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
    room = WARM_UPS + REPEATS
    ours = TimedRounds(Rounds(target, None, compiled=compiled), room=room)
    stock = TimedRounds(Rounds(replace(target, kernels=STOCK), None, compiled=compiled), room=room)
    seconds: dict[str, list[float]] = {"ours": [], "stock": []}
    for turn in range(room):
        for name, timed in (("ours", ours), ("stock", stock)):
            taken = timed.play()
            if turn >= WARM_UPS:
                seconds[name].append(taken)
    mine, other = (statistics.median(seconds[name]) for name in ("ours", "stock"))
    return Tax(mine / other, f"{1e3 * mine:.3g} against {1e3 * other:.3g} ms a token, medians of {REPEATS}")
