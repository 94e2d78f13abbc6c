"""Medians, spreads and 95 % intervals of few repeats, and of ratios of arms that were played in turn."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

NARROW = 0.02  # half-width, relative to the middle, up to which a figure is no longer called noisy
# Student's t, 97.5 % quantile, by degrees of freedom; beyond the last the normal distribution's is near enough.
T_QUANTILES = (
    *(math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160),
    *(
        2.145,
        2.131,
        2.120,
        2.110,
        2.101,
        2.093,
        2.086,
        2.080,
        2.074,
        2.069,
        2.064,
        2.060,
        2.056,
        2.052,
        2.048,
    ),
    *(2.045, 2.042),
)
T_BEYOND = 1.98


@dataclass(frozen=True, slots=True)
class Spread:
    """What repeats of one figure say; `half_width` of the 95 % interval of the mean, as a share of the median."""

    median: float
    half_width: float
    least: float
    most: float
    count: int

    @property
    def is_noisy(self) -> bool:
        return not self.half_width <= NARROW


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times larger one figure is than another, with its 95 % interval."""

    value: float
    low: float
    high: float


def t_quantile(freedom: float) -> float:
    """97.5 % quantile; between whole degrees of freedom the larger one."""
    return T_QUANTILES[int(freedom)] if freedom < len(T_QUANTILES) else T_BEYOND


def spread(values: Sequence[float]) -> Spread:
    """Median, extremes and the t interval of the mean; one value alone has no interval."""
    median = statistics.median(values)
    half = math.inf
    if len(values) > 1 and median > 0:
        deviation = statistics.stdev(values) / math.sqrt(len(values))
        half = t_quantile(len(values) - 1) * deviation / median
    return Spread(median, half, min(values), max(values), len(values))


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """above / below, value by value: those of one turn met the same machine, so what it does to both drops out."""
    logs = [math.log(a / b) for a, b in zip(above, below, strict=True)]
    return _ratio(
        statistics.fmean(logs),
        statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf,
        len(logs) - 1,
    )


def unpaired_ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """above / below of two runs: Welch's interval on logarithms."""
    a, b = ([math.log(value) for value in values] for values in (above, below))
    middle = statistics.fmean(a) - statistics.fmean(b)
    if min(len(a), len(b)) < 2:
        return _ratio(middle, math.inf, 1)
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    if va + vb == 0:
        return _ratio(middle, 0.0, 1)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return _ratio(middle, math.sqrt(va + vb), freedom)


def _ratio(middle: float, error: float, freedom: float) -> Ratio:
    reach = min(t_quantile(freedom) * error, 50.0) if error else 0.0
    return Ratio(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach))


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, on the line between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
