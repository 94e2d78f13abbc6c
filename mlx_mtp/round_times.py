"""How long rounds take here, as they were timed: by batch width and drafts, in rounds without drafts.

Times are filtered (`time_filter`), so that a machine that heats up, gets busy or has more context to read changes what
a plain round takes and no comparison. No clocks in here: seconds are given.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log
from typing import Any

from mlx_mtp.cost import UNKNOWN, CostModel, independent_experts, monotone
from mlx_mtp.kept_times import read_kept_times
from mlx_mtp.time_filter import TimeFilter

START = 2.5  # plain rounds that tries may cost before any was played
# Spread of the logarithm of a ratio that was not timed yet, about what is expected of it: between two that were, whose
# line a time has to outweigh, and beyond them. What is beyond is learnt from its times alone.
BETWEEN, BEYOND, UNTIMED = 0.08, 0.4, 3.0
KEPT = 0.05  # spread of what an earlier run found: what is measured now outvotes it soon
PAUSE = 10  # so many times what a round can take: the machine slept, or the clock jumped
FIRST = 2  # times after which one that is so short is no better than they
BELIEVED = 6  # rounds after one another that are so slow are no pause: the machine is


@dataclass(slots=True)
class Width:
    """What was seen with one batch width."""

    times: TimeFilter = field(default_factory=TimeFilter)
    compared: set[int] = field(default_factory=set)  # numbers of drafts that were compared with plain rounds
    points: dict[int, float] | None = (
        None  # ratios of those that were compared, made to rise; None: to be computed
    )
    passed: int = 0  # rounds since the last that was timed
    unseen: int = 0  # and since the last with drafts
    refused: int = 0  # times in a row that were too long to be true
    kept_seconds: float | None = None  # of a plain round, from an earlier run


class RoundTimes:
    """Times of a pair's rounds over all its requests, from a prior that measurements replace.

    `plain_tax` is how many times longer our plain rounds take than the fastest plain path there is; None: not measured.
    """

    def __init__(self, prior: CostModel | None = None) -> None:
        self.prior = prior or UNKNOWN
        self.has_prior = prior is not None and prior != UNKNOWN
        self.plain_tax: float | None = None
        self.allowance = START  # plain rounds that all requests' tries may cost now
        self.unlooked = 0  # rounds of all requests since a number of drafts was looked at again
        self.distinct: dict[int, float] = {}  # rows of a verify -> distinct experts of a layer, averaged
        self._widths: dict[int, Width] = {}
        self._ratios: dict[tuple[int, int], float] = {}  # by drafts and width, until something new is seen
        self._last: dict[int, tuple[int, int, float]] = {}  # width -> drafts verified, made, seconds

    def observe(
        self,
        verified: int,
        seconds: float | None,
        *,
        drafted: int | None = None,
        batch: int = 1,
        distinct: float | None = None,
    ) -> None:
        """One round. Whether a round's time has its own drafts or the next one's in it differs between backends.

        So a time counts if a round made as many as it verified, or together with the one before if that made what this
        one verified and neither did anything else. seconds None: cannot be compared (it was being compiled).
        """
        if distinct is not None and distinct > 0:
            rows = (verified + 1) * batch
            self._ratios.clear()
            self.distinct[rows] = 0.9 * self.distinct.get(rows, distinct) + 0.1 * distinct
        made = verified if drafted is None else drafted
        width = self._widths.setdefault(batch, Width())
        width.passed += 1
        width.unseen += 1
        before, self._last = self._last.get(batch), {}
        if (
            seconds is None
            or not 0 < seconds < math.inf
            or not self._is_likely(width, verified, made, seconds)
        ):
            return
        self._last = {batch: (verified, made, seconds)}
        if made == verified:
            self._add(batch, width, verified, seconds)
        elif before is not None and made == 0 and before[:2] == (0, verified) and width.times.timed.get(0):
            both = seconds + before[2] - width.times.plain_seconds
            if both > 0:
                self._add(batch, width, verified, both)

    def ratio(self, drafts: int, batch: int = 1) -> float:
        """Time of a round with so many drafts over one without: measured, or on the line between measured ones.

        Beyond what was measured the prior's growth is scaled by how far it was off between the last two.
        """
        if drafts == 0:
            return 1.0
        if (drafts, batch) not in self._ratios:
            self._ratios[drafts, batch] = self._ratio(drafts, batch)
        return self._ratios[drafts, batch]

    def _ratio(self, drafts: int, batch: int) -> float:
        points = self._points(batch)
        return points[drafts] if drafts in points else self._beside(points, drafts, batch)

    def ratio_by_others(self, drafts: int, batch: int = 1) -> float:
        """The same by what was timed of other numbers of drafts alone."""
        others = {k: own for k, own in self._points(batch).items() if k != drafts}
        return self._beside(others, drafts, batch)

    def _beside(self, points: Mapping[int, float], drafts: int, batch: int) -> float:
        below = max((k for k in points if k < drafts), default=0)
        above = min((k for k in points if k > drafts), default=None)
        if above is not None:
            share = (drafts - below) / (above - below)
            low = points.get(below, 1.0)
            return low + share * (points[above] - low)
        own = self._prior_ratio(drafts, batch)
        if below == 0:
            return own
        before = max((k for k in points if k < below), default=0)
        prior_below, prior_before = (self._prior_ratio(k, batch) if k else 1.0 for k in (below, before))
        growth = (points[below] - points.get(before, 1.0)) / (prior_below - prior_before)
        return points[below] + (own - prior_below) * max(growth, 0.0)

    def spread(self, drafts: int, batch: int = 1) -> float:
        """How far off the logarithm of that may be."""
        width = self._widths.get(batch)
        if width is not None and width.times.knows(drafts):
            return width.times.spread(drafts)
        return BETWEEN if drafts < max(self._points(batch), default=0) else BEYOND

    def least_ratio(self, drafts: int, batch: int = 1) -> float:
        """What a round can take at least: as long as one with fewer drafts that was measured."""
        points = self._points(batch)
        return max((points[k] for k in points if k <= drafts), default=1.0)

    def measured(self, batch: int = 1) -> tuple[int, ...]:
        """Numbers of drafts that were compared with plain rounds."""
        width = self._widths.get(batch)
        return () if width is None else tuple(sorted(width.compared))

    def is_known(self, batch: int = 1) -> bool:
        """Whether drafts were ever compared with plain rounds at this width."""
        return bool(self.measured(batch))

    def rounds_unseen(self, batch: int = 1) -> int:
        """Rounds since the last with drafts that was timed, of all requests."""
        width = self._widths.get(batch)
        return 0 if width is None else width.unseen

    @property
    def widths(self) -> tuple[int, ...]:
        """Batch widths of which rounds were seen."""
        return tuple(sorted(self._widths))

    def timed(self, drafts: int, batch: int = 1) -> int:
        """Rounds of this kind that were timed."""
        width = self._widths.get(batch)
        return 0 if width is None else width.times.timed.get(drafts, 0)

    def plain_seconds(self, batch: int = 1) -> float | None:
        """Seconds of a round without drafts, as the last rounds of any kind say; None where none was timed."""
        width = self._widths.get(batch)
        return width.times.plain_seconds if width is not None and width.times.timed else None

    def usual_seconds(self, batch: int = 1) -> float | None:
        """The same, or else what an earlier run found: to be shown and kept, not compared with times of now."""
        width = self._widths.get(batch)
        now = self.plain_seconds(batch)
        return width.kept_seconds if now is None and width is not None else now

    def _prior_ratio(self, drafts: int, batch: int) -> float:
        own = self._expected_seconds(drafts, batch) / self._expected_seconds(0, batch)
        if batch > 1 and not self.is_known(batch):
            # Nothing is known of this width: as far off as the nearest that is.
            near = min(
                (b for b in self._widths if self.is_known(b)), key=lambda b: abs(b - batch), default=None
            )
            if near is not None and near != batch:
                own = 1 + (own - 1) * (self.ratio(drafts, near) - 1) / (self.prior.ratio(drafts, near) - 1)
        return max(own, 1 + 1e-6)

    def _expected_seconds(self, drafts: int, batch: int) -> float:
        """By the prior, with experts as they were counted here."""
        rows = drafts + 1
        return self.prior.seconds(rows, batch, 0, drafts, self.expected_experts(rows * batch))

    def expected_experts(self, rows: int) -> float | None:
        """Distinct experts of a layer that a verify of so many rows is expected to wake; None where none were counted.

        Of those that rows choosing independently would add to the first row's, the share that the nearest count had.
        """
        experts, one = self.prior.experts, self.prior.top_k
        counted = [n for n in self.distinct if n > 1]
        if not experts or not counted:
            return None
        near = rows if rows in self.distinct and rows > 1 else min(counted, key=lambda n: abs(log(n / rows)))
        share = (self.distinct[near] - one) / (independent_experts(near, experts, one) - one)
        return one + min(max(share, 0.0), 1.0) * (independent_experts(rows, experts, one) - one)

    def _points(self, batch: int) -> dict[int, float]:
        """Measured ratios by drafts, made to rise with them."""
        width = self._widths.get(batch)
        if width is None:
            return {}
        if width.points is None:
            found, times = sorted(width.compared), width.times
            ratios = monotone([times.ratio(k) for k in found], [times.spread(k) ** -2 for k in found])
            width.points = {k: max(ratio, 1 + 1e-3) for k, ratio in zip(found, ratios, strict=True)}
        return width.points

    def _is_likely(self, width: Width, verified: int, made: int, seconds: float) -> bool:
        """Not so long that the machine must have slept, nor so short that the clock was set.

        What stays so is believed, and the old forgotten.
        """
        if not width.times.timed:
            return True
        plain = width.times.plain_seconds
        if seconds <= plain / PAUSE and sum(width.times.timed.values()) <= FIRST:
            width.times.forget_level()  # what is known is from a pause itself
            return True
        if plain / PAUSE < seconds < PAUSE * plain * (max(verified, made) + 1):
            width.refused = 0
            return True
        width.refused += 1
        if width.refused >= BELIEVED:
            width.times.forget_level()
            width.refused = 0
        return False

    def _add(self, batch: int, width: Width, drafts: int, seconds: float) -> None:
        """A time of a round that made as many drafts as it verified."""
        times = width.times
        if drafts and not times.knows(drafts):
            spread = self.spread(drafts, batch)
            times.add(drafts, self.ratio(drafts, batch), spread if spread <= BETWEEN else UNTIMED)
        times.pass_rounds(width.passed)
        width.passed = 0
        if drafts:
            width.unseen = 0
        times.observe(drafts, seconds)
        if times.timed.get(0) or width.compared:
            width.compared |= times.timed.keys() - {0}
        self._forget(width)

    def _forget(self, width: Width) -> None:
        width.points = None
        self._ratios.clear()

    def to_json(self) -> dict[str, Any]:
        """What is worth keeping: measured ratios and plain seconds by width, experts by rows."""
        widths = {
            str(batch): {
                "plain_seconds": self.usual_seconds(batch),
                "ratios": {str(k): round(ratio, 6) for k, ratio in self._points(batch).items()},
            }
            for batch in self._widths
            if self.is_known(batch)
        }
        experts = {str(rows): round(seen, 4) for rows, seen in sorted(self.distinct.items())}
        return {"widths": widths, "distinct_experts": experts, "plain_tax": self.plain_tax}

    def learn(self, kept: Mapping[str, Any]) -> None:
        """Start from what `to_json` gave; raises ValueError, and changes nothing, where it is no such thing."""
        widths, experts, tax = read_kept_times(kept)
        for batch, (seconds, ratios) in widths.items():
            width = self._widths.setdefault(batch, Width())
            width.kept_seconds = seconds
            for k, ratio in ratios.items():
                if not width.times.knows(k):
                    width.times.add(k, ratio, KEPT)
                    width.compared.add(k)
            self._forget(width)
        self.distinct = {**experts, **self.distinct}
        self.plain_tax = self.plain_tax if tax is None else tax
        self._ratios.clear()
