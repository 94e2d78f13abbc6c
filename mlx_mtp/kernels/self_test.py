"""Whether a kernel is right on this chip: near its reference, and each row's bits the same in every company."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_mtp.kernels.operations import PROJECT, Subject
from mlx_mtp.kernels.trials import Arrangement, Op, Trial, trial_of

SIZES = (2, 3, 4, 5, 8, 9, 17)  # rows of a call beside 1: both sides of every tile
MATRIX = "matrix"
UNTRIED = "nothing tests this kernel on a machine yet"

Step = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Checked:
    """What the self-test of one operation found.

    bodies: those that are right, () where the kernel failed. are_equal: several of them give the same bits.
    """

    bodies: tuple[str, ...]
    reason: str
    are_equal: bool = False

    @property
    def passed(self) -> bool:
        return bool(self.bodies)


def check_operation(
    name: str,
    subject: Subject,
    kernel: Op,
    reference: Op,
    *,
    step: Step = lambda what: None,
    sizes: Sequence[int] = SIZES,
) -> Checked:
    """Run `kernel` in every body it has and compare; `step` hears what comes next. Lets what MLX raises through.

    A body fails alone: without matrix units that are right the scalar body is still used, not the other way round.
    """
    trial = trial_of(name, subject, sizes)
    if trial is None:
        return Checked((), UNTRIED)
    results, reasons = {}, []
    expected = _reference_rows(trial, reference, step)
    for body, how in _bodies(name):
        result, reason = _test_body(trial, partial(kernel, **how), expected, body, step)
        if reason is None:
            results[body] = result
        elif not results:
            return Checked((), reason)
        else:
            reasons.append(reason)
    bodies = tuple(results)
    are_equal = len(bodies) > 1 and all(same_bits(results[body], results[bodies[0]]) for body in bodies)
    if len(bodies) > 1 and not are_equal:
        reasons.append("matrix units give other bits than the scalar body")
    return Checked(bodies, "; ".join(["right, and a row's bits are its own", *reasons]), are_equal)


def same_bits(a: mx.array, b: mx.array) -> bool:
    """NaN equals itself, 0 is not -0."""
    unsigned = {2: mx.uint16, 4: mx.uint32}[a.dtype.size]
    return a.dtype == b.dtype and bool(mx.array_equal(a.view(unsigned), b.view(unsigned)).item())


def _bodies(name: str) -> list[tuple[str, dict[str, Any]]]:
    if name == PROJECT:
        return [("scalar", {"body": "scalar"}), (MATRIX, {"body": MATRIX})]
    return [("scalar", {})]


def _reference_rows(trial: Trial, reference: Op, step: Step) -> mx.array:
    """All rows, on the CPU: a GPU's own products of float32 may be rounded to fewer bits."""
    step("reference")
    with mx.stream(mx.cpu):
        rows = trial.arrangements[0].run(reference)
        mx.eval(rows)
    return rows


def _test_body(
    trial: Trial, kernel: Op, expected: mx.array, body: str, step: Step
) -> tuple[mx.array, str | None]:
    """Every row as it is alone, and what is wrong, if anything."""
    prefix = "" if body == "scalar" else f"{body} units, "
    step(f"{prefix}1 row")
    alone = mx.concatenate([_evaluated(trial.alone(kernel, row)) for row in trial.arrangements[0].rows])
    far = trial.why_far(alone, expected)
    if far is not None:
        return alone, f"{prefix}1 row: {far}"
    for arrangement in trial.arrangements:
        step(f"{prefix}{arrangement.what}")
        reason = _why_other(arrangement, kernel, alone)
        if reason is not None:
            return alone, f"{prefix}{reason}"
    return alone, None


def _why_other(arrangement: Arrangement, kernel: Op, alone: mx.array) -> str | None:
    got = _evaluated(arrangement.run(kernel))
    want = alone[mx.array(arrangement.rows)]
    if got.shape == want.shape and same_bits(got, want):
        return None
    if got.shape != want.shape:
        return f"{arrangement.what}: a result of {got.shape}, not {want.shape}"
    different = [row for row, at in enumerate(arrangement.rows) if not same_bits(got[row], alone[at])]
    return f"{arrangement.what}: {len(different)} rows have other bits than alone"


def _evaluated(x: mx.array) -> mx.array:
    mx.eval(x)
    return x
