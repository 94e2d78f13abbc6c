"""What building a round ahead hides: built while the one before runs, against built once that was read."""

import statistics
import time

import mlx.core as mx

from mlx_mtp.decode import evaluate_soon
from mlx_mtp.pair import Pair
from mlx_mtp.report.donation import SAMPLER, fresh_state
from mlx_mtp.report.protocol import Deadline, Found
from mlx_mtp.report.setting import Setting, rounded
from mlx_mtp.state import State, bucket_for

K = 3
BLOCK = 6  # rounds in one order before the other has its turn; the first of them is not counted
PARTS = ("build", "read", "wait_for_drafts", "dispatch")

Round = tuple[State, mx.array, mx.array]


def overlap(setting: Setting, found: Found, deadline: Deadline) -> None:
    """Milliseconds of each part of a round in both orders, plain and with drafts, and the share that is hidden."""
    pair = setting.the_pair
    ids = setting.prompt_tokens()[next(iter(setting.prompts))]
    blocks = 2 * setting.repeats
    for name, k in (("plain", 0), (f"k={K}", K)):
        if k == 0 or pair.drafter is not None:
            found[name] = in_both_orders(Loop(pair, ids, k=k, rounds=blocks * BLOCK + 4), blocks, deadline)


def in_both_orders(loop: "Loop", blocks: int, deadline: Deadline) -> Found:
    """Blocks of rounds in the one order and in the other by turns -> medians and what they say."""
    times: dict[str, dict[str, list[float]]] = {"ahead": {}, "after": {}}
    for block in range(blocks):
        order = "ahead" if block % 2 == 0 else "after"
        for i in range(BLOCK):
            deadline.check()
            parts = loop.play(ahead=order == "ahead")
            for part, seconds in parts.items() if i > 0 else ():
                times[order].setdefault(part, []).append(1e3 * seconds)
    return verdict(
        {
            order: {part: statistics.median(own) for part, own in parts.items()}
            for order, parts in times.items()
        }
    )


class Loop:
    """The driver's loop with a clock at each of its steps; one round is always in flight."""

    def __init__(self, pair: Pair, ids: list[int], *, k: int, rounds: int) -> None:
        end = len(ids) + rounds * (k + 1)
        self._rounds, self._k, self._bucket = pair.rounds, k, bucket_for(end)
        state = fresh_state(pair, ids, end)
        state = pair.rounds.first_drafts(state, k=k, bucket=self._bucket, sampler=SAMPLER)
        mx.eval(state)
        current = self._build(state)
        del state
        self._dispatch(current)
        self._current = current
        del current
        for ahead in (True, False):  # traced by now, and both orders seen once
            self.play(ahead=ahead)

    def play(self, *, ahead: bool) -> dict[str, float]:
        """Read the round in flight and dispatch the next, which is built before the reading or after it -> seconds."""
        clock = Laps()
        following = self._build(self._current[0]) if ahead else None
        clock.lap("build")
        self._read(self._current)
        clock.lap("read")
        self._wait(self._current)
        clock.lap("wait_for_drafts")
        if following is None:
            following = self._build(self._current[0])
            clock.lap("build")
        self._current = following
        del following
        self._dispatch(self._current)
        clock.lap("dispatch")
        return {**clock.parts, "round": sum(clock.parts.values())}

    def _build(self, state: State) -> Round:
        return self._rounds(state, k=self._k, bucket=self._bucket, sampler=SAMPLER)

    def _read(self, running: Round) -> None:
        _, tokens, n = running
        tokens.tolist()
        n.tolist()

    def _wait(self, running: Round) -> None:
        mx.eval(running[0].drafts)

    def _dispatch(self, built: Round) -> None:
        """As decoding does: tokens can be read before the drafts are done."""
        state, tokens, n = built
        evaluate_soon(tokens, n, state.kv, state.length, state.last, state.hidden, state.counts)
        evaluate_soon(state.drafts)


class Laps:
    """Seconds by part, each added from the end of the part before."""

    def __init__(self) -> None:
        self.parts = dict.fromkeys(PARTS, 0.0)
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] += now - self._last
        self._last = now


def verdict(times: dict[str, dict[str, float]]) -> Found:
    """Median milliseconds by order and part -> the same, rounded, and how much of the building is hidden."""
    ahead, after = times["ahead"], times["after"]
    return {
        **{
            order: {f"{part}_ms": rounded(value) for part, value in own.items()}
            for order, own in times.items()
        },
        "hidden_share_of_build": rounded((after["round"] - ahead["round"]) / ahead["build"]),
        "round_ratio": rounded(ahead["round"] / after["round"]),
    }
