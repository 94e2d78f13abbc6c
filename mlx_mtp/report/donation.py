"""Whether a round writes its K/V in place: by the buffers' addresses, by peak memory and by time over capacity."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.config import FULL, SLIDING, TextConfig
from mlx_mtp.conversation import make_request, start_row
from mlx_mtp.machine import free_bytes
from mlx_mtp.pair import Pair
from mlx_mtp.report.protocol import Deadline, Found
from mlx_mtp.report.setting import GREEDY, Setting, rounded
from mlx_mtp.sampling import sampler_class
from mlx_mtp.state import State, bucket_for, capacity_of, kv_shapes, no_drafts
from mlx_mtp.turns import History

SAMPLER = sampler_class([GREEDY])
SMALL = 512  # rows
LARGEST_BYTES = 2 << 30  # of all full layers at the large capacity
K = 3

Play = Callable[..., tuple[State, mx.array, mx.array]]


@dataclass(frozen=True, slots=True)
class Cost:
    """Rounds at one capacity: extra bytes at the peak, median seconds, and buffers whose address changed."""

    capacity: int
    peak_bytes: int
    seconds: float
    moved: dict[str, int]  # by name of the buffer: in how many of the rounds
    rounds: int


def donation(setting: Setting, found: Found, deadline: Deadline) -> None:
    """Rounds with and without drafts at two capacities; any copy moves a buffer and shows in peak and time."""
    pair = setting.the_pair
    ids = setting.prompt_tokens()[next(iter(setting.prompts))]
    large = large_capacity(pair)
    found["feed_layers"] = dict(pair.target.text.feeding_layers)
    found["capacities"] = [SMALL, large]
    for name, k in (("plain", 0), (f"k={K}", K)):
        if k and pair.drafter is None:
            continue
        costs = []
        for capacity in (SMALL, large):
            deadline.check()
            costs.append(cost_of_rounds(pair, ids, capacity, k, setting.repeats))
        found[name] = verdict(pair, *costs)


def large_capacity(pair: Pair) -> int:
    """Rows at which one full layer's buffer is unmistakable, within LARGEST_BYTES and an eighth of what is free."""
    full_bytes = 2 * sum(
        shape[1] * shape[3] * pair.target.dtype.size
        for shape, kind in zip(kv_shapes(pair.target.text, 1, 1), _kinds(pair.target.text), strict=True)
        if kind == FULL
    )
    rows = min(65_536, min(LARGEST_BYTES, free_bytes() // 8) // full_bytes)
    return bucket_for(max(rows, 4 * SMALL))


def cost_of_rounds(
    pair: Pair, ids: list[int], capacity: int, k: int, rounds: int, play: Play | None = None
) -> Cost:
    """Rounds in buffers of `capacity` rows at the smallest bucket, each evaluated before the next is built."""
    text = pair.target.text
    state = fresh_state(pair, ids, capacity)
    bucket = bucket_for(len(ids) + (rounds + 4) * (k + 1))
    moved = dict.fromkeys(_buffer_names(text), 0)
    gc.collect()
    mx.clear_cache()
    seconds, base = [], mx.get_active_memory()
    for i in range(rounds + 3):
        if i == 3:  # the first ones compile
            mx.reset_peak_memory()
        before = addresses(state)
        begun = time.perf_counter()
        state, tokens, n = (play or pair.rounds)(state, k=k, bucket=bucket, sampler=SAMPLER)
        mx.eval(state, tokens, n)
        seconds.append(time.perf_counter() - begun)
        if i >= 3:
            for name, old, new in zip(moved, before, addresses(state), strict=True):
                moved[name] += old != new
    peak = mx.get_peak_memory() - base
    return Cost(capacity_of(text, state.kv), peak, statistics.median(seconds[3:]), moved, rounds)


def fresh_state(pair: Pair, ids: list[int], capacity: int) -> State:
    """A greedy row after `ids` in buffers of at least `capacity` rows, without pending drafts."""
    request = make_request(pair, ids, max_tokens=1, sampling=GREEDY)
    kv, hidden, _ = History(pair.target).extend(request.ids, room=max(64, capacity - len(ids) - 64))
    state = start_row(pair, request, kv, hidden, with_bias=False, with_counts=False)
    return state._replace(drafts=no_drafts(1))


def addresses(state: State) -> list[int]:
    """Where each K and V buffer lies; nothing keeps a hold on them afterwards."""
    found = []
    for both in state.kv:
        for buffer in both:
            # Bytes whatever the type: NumPy has no bfloat16. A view shares the buffer's memory.
            found.append(np.array(buffer.view(mx.uint8), copy=False).ctypes.data)
    return found


def verdict(pair: Pair, small: Cost, large: Cost) -> dict[str, Any]:
    """What both capacities say; copies are counted by addresses and, apart from that, by memory."""
    text = pair.target.text
    one = (large.capacity - small.capacity) * text.num_global_kv_heads * text.global_head_dim
    grown = large.peak_bytes - small.peak_bytes
    copied = sorted(name for name, count in large.moved.items() if count > large.rounds // 2)
    feeding = {f"{part}{layer}" for layer in text.feeding_layers.values() for part in "kv"}
    return {
        "in_place": not copied and grown < one * pair.target.dtype.size // 2,
        "buffers_copied": copied,
        "feed_buffers_copied": sorted(feeding & set(copied)),
        "buffers": len(large.moved),
        "peak_growth_bytes": grown,
        "peak_growth_in_buffers": rounded(grown / (one * pair.target.dtype.size)),
        "round_ms": [rounded(1e3 * small.seconds), rounded(1e3 * large.seconds)],
        "time_ratio": rounded(large.seconds / small.seconds),
    }


def _kinds(text: TextConfig) -> list[str]:
    return [kind for kind in text.layer_types[: text.first_shared_layer] if kind in (FULL, SLIDING)]


def _buffer_names(text: TextConfig) -> list[str]:
    """k0, v0, k1, ...: the order of `State.kv`."""
    return [f"{part}{layer}" for layer in range(text.first_shared_layer) for part in "kv"]
