"""What follows from a self-test and a race: whether a kernel is used, in which body, and why."""

import math
from collections.abc import Sequence
from typing import Any

from mlx_mtp.kernels.chooser import Verdict
from mlx_mtp.kernels.race import Raced
from mlx_mtp.kernels.self_test import MATRIX, Checked

MARGIN = 0.03  # a loss within it is none
TOO_SCATTERED = 0.25  # the middle half of an arm's runs
UNCLEAR = "no clear race yet: times scatter by {:.0%}"


def is_clear(raced: Raced) -> bool:
    """Whether the race decides anything; if not, it is run again another time."""
    return raced.scatter <= TOO_SCATTERED


def judge(tested: Checked, raced: Raced | None, *, exact: bool = False) -> Verdict:
    """Ours where the kernel is right and no slower than stock over the raced rows (geometric mean).

    One choice for all numbers of rows, because a row's bits must not depend on its company. exact: ours wherever it
    is right, since only our kernels keep a row's bits; the reason then says what that costs.
    """
    if not tested.passed:
        return Verdict(False, f"failed: {tested.reason}")
    if raced is None or not is_clear(raced):
        unclear = "not raced yet" if raced is None else UNCLEAR.format(raced.scatter)
        return Verdict(exact, f"right; {unclear}")
    body, speeds = _best_body(tested, raced)
    mean = _mean(speeds)
    said = ", ".join(
        f"{speed:.2f}x at {_rows(rows)}" for rows, speed in zip(raced.times, speeds, strict=True)
    )
    if mean >= 1 - max(MARGIN, raced.scatter):
        return Verdict(True, f"right, and as fast as stock or faster: {said}", body)
    cost = f"equal bits for every number of rows cost {1 / mean - 1:.0%} here"
    if exact:
        return Verdict(True, f"right, but slower than stock: {said}; {cost}", body)
    return Verdict(False, f"slower than stock: {said}; {cost}")


def _best_body(tested: Checked, raced: Raced) -> tuple[dict[str, Any], list[float]]:
    """Arguments for the kernel, and its speed by rows as multiples of stock's."""
    by_body = {body: [raced.speed_up(body, rows) for rows in raced.times] for body in tested.bodies}
    best = max(by_body, key=lambda body: _mean(by_body[body]))
    if MATRIX not in by_body:
        return {}, by_body[best]
    if not tested.are_equal or len(by_body) == 1:  # other bits: one body for every number of rows
        return {"body": best}, by_body[best]
    counts = list(raced.times)
    scalar, matrix = by_body["scalar"], by_body[MATRIX]
    faster = [m > s for m, s in zip(matrix, scalar, strict=True)]
    first = next((i for i in range(len(counts)) if all(faster[i:])), None)
    if first is None:
        return {"body": "scalar"}, scalar
    # Every number of rows between two that were raced takes what the smaller took.
    return {"body": 1 if first == 0 else counts[first]}, [*scalar[:first], *matrix[first:]]


def _mean(speeds: Sequence[float]) -> float:
    return math.prod(speeds) ** (1 / len(speeds))


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
