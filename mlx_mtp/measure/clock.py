"""The timed run: the clock stops when everything that was asked for has been computed, and that is checked.

MLX is lazy: what is described but not evaluated takes no time. So an arm hands over the arrays that its rounds left
(K/V), which are evaluated, and the device is waited for, before the clock stops; then the same is timed again, and a
sample that still had work to do is refused.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from mlx_mtp.stats import Stats

LATE_SHARE, LATE_S = 0.01, 0.002  # of a run, and at least: what may be left after the clock stopped

Settle = Callable[[Any], None]


class Prompt(NamedTuple):
    """One reply to be written: token ids, the seed of its draws, its exact number of tokens."""

    ids: list[int]
    seed: int
    tokens: int


class Played(NamedTuple):
    """What an arm did: token ids by row, figures by row (empty where it has none), and arrays that must be computed."""

    texts: list[list[int]]
    stats: list[Stats]
    kept: Any


class Watch:
    """Told by an arm of each arrival of tokens; the only place that looks at the time."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.started = now()
        self.arrivals: list[tuple[float, int]] = []  # time, tokens that came then (of all rows)

    def arrived(self, tokens: int) -> None:
        """So many tokens can be read now; the first arrival ends the prefill."""
        self.arrivals.append((self._now(), tokens))


class Player(Protocol):
    """What is timed: `play` writes a group of replies together and tells the watch of them."""

    name: str

    def play(self, group: Sequence[Prompt], watch: Watch) -> Played: ...


@dataclass(frozen=True, slots=True)
class Timed:
    """One group: seconds by part, the figures of its rounds, and what is wrong with it, if anything."""

    texts: list[list[int]]
    stats: list[Stats]
    prompt_tokens: int
    prefill_s: float  # to the first tokens
    decode_s: float  # from there until everything was computed
    tokens: int  # that decoding wrote: those of the first arrival are prefill's
    round_s: list[float] = field(repr=False)
    gap_s: list[float] = field(repr=False)  # between tokens as they arrive: those of one round come together
    peak_bytes: int = 0
    faults: tuple[str, ...] = ()


def settle(kept: Any) -> None:
    """Compute `kept` and wait for the device."""
    mx.eval(kept)
    mx.synchronize()


def timed(
    player: Player,
    group: Sequence[Prompt],
    settle: Settle = settle,
    now: Callable[[], float] = time.perf_counter,
) -> Timed:
    """Play a group; the clock stops after `settle`."""
    mx.reset_peak_memory()
    watch = Watch(now)
    played = player.play(group, watch)
    settle(played.kept)
    stopped = now()
    left = _left_over(played.kept)
    arrivals = watch.arrivals
    faults = [*_late(left, stopped - watch.started), *_wrong_work(played.texts, group, arrivals)]
    first = arrivals[0][0] if arrivals else stopped
    times = [at for at, _ in arrivals]
    if times:
        times[-1] = stopped  # the last round is over when all of it was computed
    rounds = [after - before for before, after in pairwise(times)]
    gaps = [
        gap
        for (_, count), seconds in zip(arrivals[1:], rounds, strict=False)
        for gap in [seconds, *[0.0] * (count - 1)][:count]
    ]
    return Timed(
        texts=played.texts,
        stats=played.stats,
        prompt_tokens=sum(len(prompt.ids) for prompt in group),
        prefill_s=first - watch.started,
        decode_s=stopped - first,
        tokens=sum(count for _, count in arrivals[1:]),
        round_s=rounds,
        gap_s=gaps,
        peak_bytes=mx.get_peak_memory(),
        faults=tuple(faults),
    )


def _left_over(kept: Any) -> float:
    """Seconds that it still takes to compute what should have been computed.

    On a CPU those that the process worked, since a busy machine may have kept it waiting.
    """
    started, worked = time.perf_counter(), time.process_time()
    mx.eval(kept)
    mx.synchronize()
    seconds = time.perf_counter() - started
    return min(seconds, time.process_time() - worked) if mx.default_device().type == mx.cpu else seconds


def _late(left: float, whole: float) -> list[str]:
    if left <= max(LATE_S, LATE_SHARE * whole):
        return []
    return [f"late: {1e3 * left:.1f} ms of work were left when the clock stopped"]


def _wrong_work(
    texts: list[list[int]], group: Sequence[Prompt], arrivals: list[tuple[float, int]]
) -> list[str]:
    """Whether the rows have exactly the tokens that were asked for, read, and as many as arrived."""
    wanted = [prompt.tokens for prompt in group]
    if any(type(token) is not int for text in texts for token in text):
        return ["lazy: tokens were handed over without being read"]
    got = [len(text) for text in texts]
    if got != wanted:
        return [f"tokens: {sum(got)} were written where {sum(wanted)} were asked for"]
    if sum(count for _, count in arrivals) != sum(wanted):
        return ["tokens: others were timed than were handed over"]
    return []
