"""What passes of 1 to 9 rows, drafts and whole replies cost here; medians of runs taken in turn."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_mtp.draft import draft
from mlx_mtp.pair import Pair
from mlx_mtp.report.donation import SAMPLER, fresh_state
from mlx_mtp.report.protocol import Deadline, Found
from mlx_mtp.report.setting import GREEDY, Setting, play, rounded
from mlx_mtp.state import KeysValues, bucket_for
from mlx_mtp.target import Target, logits_of
from mlx_mtp.verify import verify

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9)
DRAFTS = (1, 2, 3, 4)
ARMS: tuple[int | str, ...] = (0, 1, 2, 3, 4, "auto")
LONG = 2048  # tokens of the second context
SAMPLE = 3  # prompts that the whole replies are timed on

Run = Callable[[], float]


def in_turns(runs: dict[str, Run], repeats: int, deadline: Deadline, *, warm_ups: int = 2) -> dict[str, Any]:
    """Each of `runs` in turn, so that a warming machine slows all alike -> milliseconds: median, min, max by name."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warm_ups + repeats):
        for name, run in runs.items():
            deadline.check()
            taken = run()
            if turn >= warm_ups:
                seconds[name].append(taken)
    return {name: spread([1e3 * value for value in own]) for name, own in seconds.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median and extremes."""
    return {
        "median": rounded(statistics.median(values)),
        "min": rounded(min(values)),
        "max": rounded(max(values)),
    }


def cost_curve(setting: Setting, found: Found, deadline: Deadline) -> None:
    """A target pass of 1 to 9 rows and k drafts, after a short and after a long context."""
    pair = setting.the_pair
    short = next(iter(setting.prompt_tokens().values()))
    for name, ids in (("short", short), ("long", setting.long_prompt(LONG))):
        entry: Found = {"context": len(ids)}
        found[name] = entry
        passes = Passes(pair, ids)
        times = in_turns({str(m): passes.of_rows(m) for m in ROWS}, setting.repeats, deadline)
        entry["pass_ms_by_rows"] = times
        entry["pass_ratio_by_rows"] = {
            m: rounded(own["median"] / times["1"]["median"]) for m, own in times.items()
        }
        if pair.drafter is not None:
            drafts = in_turns({str(k): passes.of_drafts(k) for k in DRAFTS}, setting.repeats, deadline)
            entry["draft_ms_by_k"] = drafts
            entry["draft_step_in_passes"] = rounded(drafts["4"]["median"] / 4 / times["1"]["median"])


@dataclass(slots=True)
class Held:
    """The only owner of the K/V that timed passes write into."""

    kv: KeysValues


class Passes:
    """Timed passes over one context; each rewrites the same rows, so all see the same lengths."""

    def __init__(self, pair: Pair, ids: list[int]) -> None:
        self._pair = pair
        self._ids = ids
        self._bucket = bucket_for(len(ids) + 32)
        state = fresh_state(pair, ids, len(ids) + 64)
        self._held = Held(state.kv)
        self._state = state._replace(kv=())
        self._length = mx.array([len(ids)], mx.int32)

    def of_rows(self, rows: int) -> Run:
        """Seconds of one target pass over `rows` rows with its logits, dispatch and wait included."""
        target, bucket = self._pair.target, self._bucket
        tokens = mx.array([(self._ids * (rows // len(self._ids) + 1))[:rows]], mx.uint32)
        mx.eval(tokens)

        def one(kv: KeysValues, length: mx.array) -> tuple[mx.array, KeysValues]:
            return pass_over(target, tokens, kv, length, bucket)

        function = self._compiled(one)

        def run() -> float:
            kv, self._held.kv = self._held.kv, ()
            started = time.perf_counter()
            logits, kv = function(kv, self._length)
            mx.eval(logits, kv)
            taken = time.perf_counter() - started
            self._held.kv = kv
            return taken

        return run

    def of_drafts(self, k: int) -> Run:
        """Seconds of k drafts."""
        pair, bucket, state = self._pair, self._bucket, self._state
        drafter = pair.drafter
        assert drafter is not None, "drafts are only timed where there is a drafter"

        def chain(kv: KeysValues) -> mx.array:
            return draft(pair.target, drafter, state._replace(kv=kv), SAMPLER, k=k, bucket=bucket)

        function = self._compiled(chain)

        def run() -> float:
            started = time.perf_counter()
            mx.eval(function(self._held.kv))
            return time.perf_counter() - started

        return run

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return mx.compile(function) if self._pair.rounds.compiled else function


def pass_over(
    target: Target, tokens: mx.array, kv: KeysValues, length: mx.array, bucket: int
) -> tuple[mx.array, KeysValues]:
    """tokens [1, M] -> logits [1, M, V] and the K/V after."""
    hidden, kv = verify(target, tokens, kv, length, bucket=bucket)
    return logits_of(target, hidden), kv


def speeds(setting: Setting, found: Found, deadline: Deadline) -> None:
    """Tokens a second of whole replies: plain, 1 to 4 drafts and "auto", in turn, the first turn discarded."""
    pair = setting.the_pair
    arms = ARMS if pair.drafter is not None else (0,)
    prompts = list(setting.prompt_tokens().items())[:SAMPLE]
    rates: dict[str, dict[str, list[float]]] = {}
    found["tokens_per_round"] = {}
    try:
        for turn in range(1 + max(2, setting.repeats // 2)):
            for kind, ids in prompts:
                for k in arms:
                    deadline.check()
                    reply = play(pair, ids, k=k, tokens=setting.tokens, sampling=GREEDY)
                    if turn == 0 or reply.stats.generation_tokens < 2:
                        continue
                    rates.setdefault(kind, {}).setdefault(str(k), []).append(reply.stats.generation_tps)
                    per_round = rounded(reply.stats.tokens_per_round)
                    found["tokens_per_round"].setdefault(kind, {})[str(k)] = per_round
    finally:
        found["tokens_per_second"] = {
            kind: {arm: spread(values) for arm, values in own.items()} for kind, own in rates.items()
        }
        found["gain"] = gains(rates)


def gains(rates: dict[str, dict[str, list[float]]]) -> Found:
    """Tokens a second by prompt and arm -> medians as multiples of plain decoding's."""
    return {
        kind: {arm: rounded(statistics.median(own[arm]) / statistics.median(own["0"])) for arm in own}
        for kind, own in rates.items()
        if "0" in own
    }
