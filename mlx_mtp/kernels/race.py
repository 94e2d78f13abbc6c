"""Ours against stock MLX on this chip: arms in turn, so that a machine that grows warm slows all alike; medians."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_mtp.kernels.chains import chain_of, stock_of
from mlx_mtp.kernels.operations import PROJECT
from mlx_mtp.kernels.self_test import Checked, Step
from mlx_mtp.kernels.specimens import Description
from mlx_mtp.kernels.trials import Op

WARM_UPS = 2
REPEATS = 7
STOCK = "stock"


class Time(NamedTuple):
    """Microseconds of a chain: the median, and how far the middle half of the runs lies apart, as a share of it."""

    median: float
    scatter: float


@dataclass(frozen=True, slots=True)
class Raced:
    """Times of every arm ("stock", "scalar", "matrix") by the number of rows."""

    times: Mapping[int, Mapping[str, Time]]

    def speed_up(self, arm: str, rows: int) -> float:
        """How many times as fast as stock."""
        return self.times[rows][STOCK].median / self.times[rows][arm].median

    @property
    def scatter(self) -> float:
        """The worst of all arms."""
        return max(time.scatter for own in self.times.values() for time in own.values())


def race_operation(
    name: str,
    description: Description,
    kernel: Op,
    tested: Checked,
    rows: Sequence[int],
    *,
    step: Step = lambda what: None,
    repeats: int = REPEATS,
) -> Raced:
    """Time the bodies that passed against stock operations on `rows` rows each."""
    arms: dict[str, Op] = {STOCK: stock_of(name)}
    for body in tested.bodies:
        arms[body] = partial(kernel, body=body) if name == PROJECT else kernel
    times = {}
    for count in rows:
        step(f"race, {count} rows")
        chain = chain_of(name, description, count)
        runs = {arm: partial(_run, chain, op) for arm, op in arms.items()}
        times[count] = race(runs, repeats=repeats)
        del chain, runs
        mx.clear_cache()
    return Raced(times)


def race(
    runs: Mapping[str, Callable[[], None]],
    *,
    clock: Callable[[], float] = time.perf_counter,
    repeats: int = REPEATS,
) -> dict[str, Time]:
    """Every run in turn, and again, the first turns discarded."""
    seconds: dict[str, list[float]] = {arm: [] for arm in runs}
    for turn in range(WARM_UPS + repeats):
        for arm, run in runs.items():
            begun = clock()
            run()
            if turn >= WARM_UPS:
                seconds[arm].append(clock() - begun)
    return {arm: _summary(own) for arm, own in seconds.items()}


def _summary(seconds: list[float]) -> Time:
    median = statistics.median(seconds)
    ordered = sorted(seconds)
    quarter = len(ordered) // 4
    middle = ordered[-1 - quarter] - ordered[quarter]
    return Time(round(1e6 * median, 3), round(middle / median, 4) if median else 0.0)


def _run(chain: Callable[[Op], Any], op: Op) -> None:
    mx.eval(chain(op))
