"""What a loop on MLX makes the host do: time inside the calls that dispatch or wait, and the time between them.

Needs nothing but MLX, so that it can watch every peer in its own environment.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx

DISPATCHES = ("async_eval",)
WAITS = ("eval", "synchronize", "item", "tolist")  # each returns only when what it names is computed
BUILD = "build"


class Call(NamedTuple):
    """One watched call: when it began and ended, and this thread's processor time in it; in seconds."""

    name: str
    begin: float
    end: float
    processor: float


@dataclass(slots=True)
class Watch:
    """The watched calls in order."""

    calls: list[Call] = field(default_factory=list)
    depth: int = 0

    def summary(self, spans: list[tuple[float, float]], processor_s: float, rounds: int) -> dict[str, float]:
        """A round, of `rounds` in these spans of time: milliseconds by place, and calls that wait or dispatch.

        host: processor time of this thread outside all calls that dispatch or wait (so that another process on the
        same core does not count); build: the part in which rounds are described, where that is watched, else host.
        """
        within = [
            call
            for call in self.calls
            if any(first <= call.begin and call.end <= last for first, last in spans)
        ]
        dispatches = [call for call in within if call.name in DISPATCHES]
        waits = [call for call in within if call.name in WAITS]
        builds = [call.processor for call in within if call.name == BUILD]
        host = processor_s - sum(call.processor for call in (*dispatches, *waits))
        return {
            "host ms": 1e3 * host / rounds,
            "build ms": 1e3 * (sum(builds) if builds else host) / rounds,
            "dispatch ms": 1e3 * sum(call.end - call.begin for call in dispatches) / rounds,
            "wait ms": 1e3 * sum(call.end - call.begin for call in waits) / rounds,
            "dispatches": len(dispatches) / rounds,
            "syncs": len(waits) / rounds,
        }


PLACES = (
    *((mx, name, name) for name in ("async_eval", "eval", "synchronize")),
    *((mx.array, name, name) for name in ("item", "tolist")),
)


@contextmanager
def watching(*more: tuple[Any, str, str]) -> Iterator[Watch]:
    """Watch MLX's calls that dispatch or wait, whoever makes them, and `more` (owner, attribute, name)."""
    watch, places = Watch(), (*PLACES, *more)
    originals = [vars(owner)[attribute] for owner, attribute, _ in places]
    for (owner, attribute, name), original in zip(places, originals, strict=True):
        setattr(owner, attribute, timed(watch, name, original))
    try:
        yield watch
    finally:
        for (owner, attribute, _), original in zip(places, originals, strict=True):
            setattr(owner, attribute, original)


def timed(watch: Watch, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, written down; a call inside another watched one is part of that."""

    def watched(*args: Any, **options: Any) -> Any:
        processor, begin = time.thread_time(), time.perf_counter()
        watch.depth += 1
        try:
            return call(*args, **options)
        finally:
            watch.depth -= 1
            if not watch.depth:
                end = time.perf_counter()
                watch.calls.append(Call(name, begin, end, time.thread_time() - processor))

    return watched
