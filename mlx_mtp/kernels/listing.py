"""The table of operations as `doctor` shows it: by whom each is computed, why, and the race."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mlx_mtp.kernels.chooser import Row
from mlx_mtp.kernels.results import Outcome, Outcomes, verdicts_of


@dataclass(frozen=True, slots=True)
class KernelLine:
    """One operation; `speed_up`: of the body that is fastest there over stock MLX, by rows, None where not raced."""

    operation: str
    shape: tuple[int, ...]
    format: str
    by: Literal["ours", "stock"]
    reason: str
    speed_up: dict[str, float] | None = None


def lines_of_rows(rows: Iterable[Row], outcomes: Outcomes) -> tuple[KernelLine, ...]:
    """A pair's table with the times that are known."""
    return tuple(
        KernelLine(
            own.name, own.shape, own.format, by, reason, speed_up(outcomes[own]) if own in outcomes else None
        )
        for own, by, reason in rows
    )


def lines_of_outcomes(outcomes: Outcomes) -> tuple[KernelLine, ...]:
    """All that was ever tested in a place, for whichever model, by name and shape."""
    verdicts = verdicts_of(outcomes)
    rows = [Row(own, "ours" if verdicts[own].use else "stock", verdicts[own].reason) for own in outcomes]
    return lines_of_rows(sorted(rows, key=lambda row: (row.operation.name, row.operation.shape)), outcomes)


def speed_up(outcome: Outcome) -> dict[str, float] | None:
    """Times as fast as stock, by number of rows."""
    raced = outcome.raced
    if raced is None:
        return None
    bodies = outcome.tested.bodies
    return {str(rows): round(max(raced.speed_up(body, rows) for body in bodies), 3) for rows in raced.times}


def summary(lines: Iterable[KernelLine]) -> str:
    """In a line: how many are ours."""
    by: list[str] = [line.by for line in lines]
    return f"{by.count('ours')} of {len(by)} operations by our own Metal kernels, {by.count('stock')} by stock MLX"
