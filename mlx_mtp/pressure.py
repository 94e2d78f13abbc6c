"""What is done when memory gets short while a reply is written: keep less, then stop with what has been written.

Asked between rounds and between chunks of a prefill, on the thread that computes: no buffer is freed under a reader.
"""

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import mlx.core as mx

from mlx_mtp.admission import admit_prefill, budget_bytes
from mlx_mtp.errors import MemoryRefusal
from mlx_mtp.machine import Pressure, footprint_bytes, free_bytes, pressure_level, this_machine

Relief = Literal["none", "shrink", "stop"]

LOOK_EVERY_S = 0.25  # a look takes 0.6 ms on a busy Linux machine, a quarter of a percent of this
SHRINK_EVERY_S = 1.0  # the system takes a moment to notice what was freed
PATIENCE_S = (
    2.0  # how long memory may be critically short, while less and less is kept, before a reply is stopped
)

REMEDY = "close other programs, shorten the prompt, lower max_tokens, or load a smaller model"
STOPPED = f"stopped because this machine is short of memory, what was written is kept; to go on, {REMEDY}"

# What MLX's allocators and Metal say when memory runs out. Its CPU backend says nothing: there the process ends, so
# that asking beforehand (`Guard.admit`) is all that helps.
ALLOCATION_FAILURES = (
    "unable to allocate",  # [malloc] Unable to allocate N bytes.
    "maximum allowed buffer size",  # [metal::malloc] Attempting to allocate N bytes which is greater than the ...
    "resource limit",  # [metal::malloc] Resource limit (N) exceeded.
    "insufficient memory",  # [METAL] Command buffer execution failed: Insufficient Memory
    "bad_alloc",  # std::bad_alloc
)


class StoppedForMemory(MemoryRefusal):
    """Memory became so short during a prefill that it was given up, and what it held is to be freed."""


class Guard:
    """Says when a reply has to keep less or to stop; one per conversation or batch, asked on its thread.

    Short of memory is a machine that says so, or a process that takes more than `budget` bytes (None: what models may
    take on this machine). The parameters are what it asks, and the clock.
    """

    def __init__(
        self,
        *,
        level: Callable[[], Pressure] = pressure_level,
        free: Callable[[], int] = free_bytes,
        footprint: Callable[[], int] = footprint_bytes,
        budget: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._level, self._free, self._footprint, self._clock = level, free, footprint, clock
        self._budget = budget
        self._look_at = self._shrink_at = float("-inf")
        self._critical_since: float | None = None

    @property
    def budget(self) -> int:
        if self._budget is None:
            self._budget = budget_bytes(this_machine())
        return self._budget

    def relief(self) -> Relief:
        """What the reply has to do now; mostly answers without a look."""
        now = self._clock()
        if now < self._look_at:
            return "none"
        self._look_at = now + LOOK_EVERY_S
        level, is_over = self._level(), self._footprint() > self.budget
        if level == "normal" and not is_over:
            self._critical_since = None
            return "none"
        if level == "critical" or (level == "warning" and is_over):
            if self._critical_since is None:
                self._critical_since = now
            if now - self._critical_since >= PATIENCE_S:
                return "stop"
        else:
            self._critical_since = None
        if now < self._shrink_at:
            return "none"
        self._shrink_at = now + SHRINK_EVERY_S
        return "shrink"

    def admit(self, needed_bytes: int) -> None:
        """Raise MemoryRefusal if so much cannot be taken now, beside what MLX has freed and still holds."""
        kept = mx.get_cache_memory()
        admit_prefill(needed_bytes, kept + min(self._free(), max(0, self.budget - self._footprint())))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX or Python failed because no memory was left."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in ALLOCATION_FAILURES)
    )


@contextmanager
def out_of_memory_refused(release: Callable[[], None]) -> Iterator[None]:
    """Raise MemoryRefusal where memory runs out inside, after `release` and MLX have let go of all they held."""
    try:
        yield
    except StoppedForMemory:
        release()
        mx.clear_cache()
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # their variables hold K/V
        release()
        mx.clear_cache()
        raise MemoryRefusal(
            f"memory ran out ({error}), and all that this reply held was freed; {REMEDY}"
        ) from error
