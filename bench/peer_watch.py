"""What a loop on MLX makes the host do: time inside the calls that dispatch or wait, and the time between them.

Needs nothing but MLX, so that it can watch every peer in its own environment.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

DISPATCHES = ("async_eval",)
WAITS = ("eval", "synchronize", "item", "tolist")  # each returns only when what it names is computed


@dataclass(slots=True)
class Watch:
    """The watched calls in order: their names, and when each began and ended, in seconds."""

    events: list[tuple[str, float, float]] = field(default_factory=list)
    depth: int = 0

    def summary(self, spans: list[tuple[float, float]], rounds: int) -> dict[str, float]:
        """A round, of `rounds` in these spans of time: milliseconds by place, and calls that wait or dispatch."""
        within = [
            (name, end - begin)
            for name, begin, end in self.events
            if any(first <= begin and end <= last for first, last in spans)
        ]
        dispatches = [seconds for name, seconds in within if name in DISPATCHES]
        waits = [seconds for name, seconds in within if name in WAITS]
        total = sum(last - first for first, last in spans)
        return {
            "host ms": 1e3 * (total - sum(dispatches) - sum(waits)) / rounds,
            "dispatch ms": 1e3 * sum(dispatches) / rounds,
            "wait ms": 1e3 * sum(waits) / rounds,
            "dispatches": len(dispatches) / rounds,
            "syncs": len(waits) / rounds,
        }


@contextmanager
def watching() -> Iterator[Watch]:
    """Watch MLX's calls that dispatch or wait, whoever makes them, inside the block."""
    watch = Watch()
    places = [(mx, name) for name in ("async_eval", "eval", "synchronize")]
    places += [(mx.array, name) for name in ("item", "tolist")]
    originals = [getattr(owner, name) for owner, name in places]
    for (owner, name), original in zip(places, originals, strict=True):
        setattr(owner, name, timed(watch, name, original))
    try:
        yield watch
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def timed(watch: Watch, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, written down as an event; a call inside another watched one is part of that."""

    def watched(*args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        watch.depth += 1
        try:
            return call(*args, **options)
        finally:
            watch.depth -= 1
            if not watch.depth:
                watch.events.append((name, begin, time.perf_counter()))

    return watched
