"""What long work reports while it runs: a stage, what is happening in words, and how far it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["download", "wait", "read", "quantize", "prefill", "calibrate"]


@dataclass(frozen=True, slots=True)
class Progress:
    """One report; `done` of `total` is in bytes, or in tokens for a prefill; None where the work has no known size."""

    stage: Stage
    message: str
    done: int | None = None
    total: int | None = None


OnProgress = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """For callers who were given no `on_progress`."""
