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
BUILD = "build"


@dataclass(slots=True)
class Watch:
    """The watched calls in order: their names, and when each began and ended, in seconds."""

    events: list[tuple[str, float, float]] = field(default_factory=list)
    depth: int = 0

    def summary(self, spans: list[tuple[float, float]], rounds: int) -> dict[str, float]:
        """A round, of `rounds` in these spans of time: milliseconds by place, and calls that wait or dispatch.

        host: outside all calls that dispatch or wait; build: the part that describes rounds, where it is watched.
        """
        within = [
            (name, end - begin)
            for name, begin, end in self.events
            if any(first <= begin and end <= last for first, last in spans)
        ]
        dispatches = [seconds for name, seconds in within if name in DISPATCHES]
        waits = [seconds for name, seconds in within if name in WAITS]
        builds = [seconds for name, seconds in within if name == BUILD]
        total = sum(last - first for first, last in spans)
        host = total - sum(dispatches) - sum(waits)
        return {
            "host ms": 1e3 * host / rounds,
            "build ms": 1e3 * (sum(builds) if builds else host) / rounds,
            "dispatch ms": 1e3 * sum(dispatches) / rounds,
            "wait ms": 1e3 * sum(waits) / rounds,
            "dispatches": len(dispatches) / rounds,
            "syncs": len(waits) / rounds,
        }


PLACES = (
    *((mx, name, name) for name in ("async_eval", "eval", "synchronize")),
    *((mx.array, name, name) for name in ("item", "tolist")),
)


@contextmanager
def watching(*more: tuple[Any, str, str]) -> Iterator[Watch]:
    """Watch MLX's calls that dispatch or wait, whoever makes them, and `more` (owner, attribute, name of event)."""
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
