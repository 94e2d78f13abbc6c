"""No K/V buffer is read before it is written, nor kept by anybody: rounds cost the same at every capacity."""

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import pytest

import mlx_mtp.decode
import mlx_mtp.round
import mlx_mtp.verify
from mlx_mtp import generate_batch
from mlx_mtp.batch import generate_rows
from mlx_mtp.conversation import Conversation, make_request, start_row
from mlx_mtp.pair import Pair
from mlx_mtp.policy import FixedPolicy, Plan
from mlx_mtp.pressure import Guard
from mlx_mtp.round import play_round
from mlx_mtp.sampling import Sampling, sampler_class, sampling_arrays
from mlx_mtp.state import State, bucket_for, capacity_for, kv_shapes
from mlx_mtp.turns import History
from pairs import VARIANTS, golden_pair
from talks import golden_text, with_eos

GREEDY = Sampling(temperature=0.0)
SAMPLER = sampler_class([GREEDY])
LARGE = 65_536

pair_of = functools.cache(golden_pair)


def prefilled(pair: Pair, capacity: int, pending: int = 0) -> State:
    """A golden prompt in buffers of (at least) so many rows, with so many pending drafts."""
    ids, _ = golden_text(pair.name, "long")
    pair = replace(pair, max_context=LARGE)
    request = make_request(pair, ids, max_tokens=8, sampling=GREEDY)
    kv, hidden, _ = History(pair.target).extend(ids, room=max(8, capacity - len(ids) - 64))
    state = start_row(pair, request, kv, hidden, with_bias=False, with_counts=False)
    return state._replace(drafts=mx.arange(pending, dtype=mx.uint32)[None])


def consumers_of_buffers(pair: Pair, *, pending: int, k: int) -> list[list[tuple[str, int]]]:
    """For each K and V buffer that a traced round is given: the operations that take it, and as which operand."""
    state = prefilled(pair, 256, pending)
    buffers = [buffer for both in state.kv for buffer in both]
    graph: list[dict[str, Any]] = []

    def play(*arrays: mx.array) -> list[mx.array]:
        kv = tuple(zip(arrays[0 : len(buffers) : 2], arrays[1 : len(buffers) : 2], strict=True))
        after, tokens, n = play_round(
            pair.target, pair.drafter, state._replace(kv=kv), k=k, bucket=256, sampler=SAMPLER
        )
        return [*(buffer for both in after.kv for buffer in both), after.drafts, after.hidden, tokens, n]

    mx.export_function(graph.append, play, *buffers)
    given = next(entry["inputs"] for entry in graph if entry["type"] == "inputs")
    operations = [entry for entry in graph if entry["type"] == "primitive"]
    assert len(given) == len(buffers) and len(operations) > 200
    return [
        [
            (operation["name"], place)
            for operation in operations
            for place, operand in enumerate(operation["inputs"])
            if operand[0] == name
        ]
        for name, *_ in given
    ]


WRITTEN_ONLY = [("ScatterAxis", 0)]  # put_along_axis, into this buffer


@pytest.mark.parametrize("pending, k", [(0, 0), (0, 3), (3, 3), (3, 0)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_round_takes_each_buffer_only_to_write_it(variant, pending, k):
    """Whatever reads, be it a layer, one that shares K/V, or the drafter, reads what the write gave."""
    for consumers in consumers_of_buffers(pair_of(variant), pending=pending, k=k):
        assert consumers == WRITTEN_ONLY


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, top_k=8, top_p=0.9, presence_penalty=0.5)])
@pytest.mark.parametrize("pending, k", [(0, 0), (0, 2), (2, 0)])
def test_no_operation_of_a_round_is_given_nothing(pending, k, sampling):
    """MLX's GPU backends divide by the length of what they scan; a CPU does not show it."""
    pair = pair_of("a4b")
    sampler = sampler_class([sampling])
    state = prefilled(pair, 256, pending)
    vocab = pair.target.text.vocab_size
    state = state._replace(
        sampling=sampling_arrays(sampling, vocab),
        counts=mx.zeros((1, 2, vocab), mx.int32) if sampler.penalties else None,
    )
    mx.eval(state)
    graph: list[dict[str, Any]] = []

    def play(length: mx.array) -> list[mx.array]:
        after, tokens, n = play_round(
            pair.target, pair.drafter, state._replace(length=length), k=k, bucket=256, sampler=sampler
        )
        return [after.drafts, after.hidden, after.length, after.last, tokens, n]

    mx.export_function(graph.append, play, state.length)
    operations = [entry for entry in graph if entry["type"] == "primitive"]
    assert len(operations) > 200
    assert [entry["name"] for entry in operations if any(0 in shape for _, shape, _ in entry["inputs"])] == []


def test_readers_of_the_old_buffers_are_seen(monkeypatch):
    """Drafting before the commit, or attending before the write, is what the test above is there for."""
    pair = pair_of("e2b")
    sound_draft, sound_put = mlx_mtp.round.draft, mlx_mtp.verify.write_rows

    def draft_from_before(target: Any, drafter: Any, state: State, *rest: Any, **more: Any) -> mx.array:
        return sound_draft(target, drafter, state._replace(kv=old[0]), *rest, **more)

    sound_play, old = mlx_mtp.round.verify, []

    def verify(target: Any, tokens: mx.array, kv: Any, *rest: Any, **more: Any) -> Any:
        old[:] = [kv]
        return sound_play(target, tokens, kv, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(mlx_mtp.round, "verify", verify)
        patch.setattr(mlx_mtp.round, "draft", draft_from_before)
        read = [c for c in consumers_of_buffers(pair, pending=3, k=3) if c != WRITTEN_ONLY]
    assert len(read) == 4  # K and V of the two layers that feed the drafter

    def write_after_a_look(buffer: mx.array, rows: mx.array, slots: mx.array) -> mx.array:
        return sound_put(buffer, rows + 0 * buffer[:, :, :1], slots)

    with monkeypatch.context() as patch:
        patch.setattr(mlx_mtp.verify, "write_rows", write_after_a_look)
        assert WRITTEN_ONLY not in consumers_of_buffers(pair, pending=3, k=3)


@pytest.mark.parametrize("k", [0, 3])
def test_drafts_are_done_before_the_next_round_is_dispatched(monkeypatch, k):
    """Their reads of K/V would otherwise be in flight when the round writes, which makes MLX copy."""
    events: list[str] = []

    class Watched:
        """mlx.core, writing down who waits for what."""

        def __getattr__(self, name: str) -> Any:
            return vars(mx)[name]

        def eval(self, *arrays: Any) -> None:
            events.append("wait")
            mx.eval(*arrays)

    sound_dispatch = mlx_mtp.decode._dispatch

    def dispatch(built: mlx_mtp.decode.Built) -> None:
        events.append("dispatch")
        sound_dispatch(built)

    monkeypatch.setattr(mlx_mtp.decode, "mx", Watched())
    monkeypatch.setattr(mlx_mtp.decode, "_dispatch", dispatch)
    prompts = [golden_text("e2b", "short")[0], golden_text("e2b", "long")[0]]
    # Rows end in different rounds, after which the round built ahead is built again.
    pair = with_eos(pair_of("e2b"), golden_text("e2b", "short")[1][6])
    outs = generate_batch(pair, prompts, max_tokens=14, num_draft_tokens=k)
    assert len({out.stats.rounds for out in outs}) == 2
    first, rounds = events.index("dispatch"), events.count("dispatch")
    assert rounds >= max(out.stats.rounds for out in outs) > 2
    assert events[first:] == ["dispatch", *["wait", "dispatch"] * (rounds - 1)]


@pytest.mark.parametrize("k", [0, 3])
def test_the_policy_is_asked_once_a_round_and_told_while_the_next_one_runs(monkeypatch, k):
    """Weighing what was seen takes no time between two rounds; what is asked for twice is played once only."""
    events: list[str] = []
    sound_dispatch = mlx_mtp.decode._dispatch

    class Watched(FixedPolicy):
        def plan(self, pending: int) -> Plan:
            events.append("plan")
            return super().plan(pending)

        def observe(self, verified: int, accepted: list[int], seconds: float | None, **seen: Any) -> None:
            events.append("told")
            super().observe(verified, accepted, seconds, **seen)

    def dispatch(built: mlx_mtp.decode.Built) -> None:
        events.append("dispatch")
        sound_dispatch(built)

    monkeypatch.setattr(mlx_mtp.decode, "_dispatch", dispatch)
    # Rows end in different rounds, after which the round built ahead is built again.
    pair = with_eos(pair_of("e2b"), golden_text("e2b", "short")[1][6])
    requests = [make_request(pair, golden_text("e2b", name)[0], max_tokens=14) for name in ("short", "long")]
    outs = generate_rows(pair, requests, Watched(k), Guard(), max_batch=2)
    assert len({out.stats.rounds for out in outs}) == 2
    begin, going_on = ["plan", "plan", "dispatch"], ["plan", "dispatch", "told"]
    in_runs = " ".join(events).replace(" ".join(begin), "|").split("|")[1:]
    assert len(in_runs) == 2, "a row that has ended is dropped, and the other goes on"
    for run in in_runs:
        rounds, last = divmod(len(run.split()), 3)
        assert run.split() == going_on * rounds + ["plan", "told"][:last]


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a round: extra memory at its peak, and the processor's time, which other processes do not lengthen."""

    bytes: int
    seconds: float


@contextmanager
def somebody_holds(place: object, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The last result of a function stays alive: a candidate that lost, or the state before the round."""
    held, inner = [], vars(place)[name]

    def function(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        held[:] = [*held[-1:], result]
        return result

    with monkeypatch.context() as patch:
        patch.setattr(place, name, function)
        yield


def cost_of_rounds(
    pair: Pair, capacity: int, k: int, rounds: int, play: Callable[..., Any] | None = None
) -> Cost:
    """Rounds at a bucket of 256 rows in buffers of `capacity`, each evaluated before the next is built."""
    state = prefilled(pair, capacity)
    seconds, base = [], memory_in_use()
    for i in range(rounds + 3):
        if i == 3:  # the first ones compile
            mx.reset_peak_memory()
        begun = time.process_time()
        state, tokens, n = (play or pair.rounds)(state, k=k, bucket=256, sampler=SAMPLER)
        mx.eval(state, tokens, n)
        seconds.append(time.process_time() - begun)
    return Cost(mx.get_peak_memory() - base, statistics.median(seconds[3:]))


def memory_in_use() -> int:
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


def buffer_bytes(pair: Pair, capacity: int) -> int:
    """One K buffer of one full layer."""
    text = pair.target.text
    return bucket_for(capacity) * text.num_global_kv_heads * text.global_head_dim * 4


@pytest.mark.parametrize("k", [0, 3])
def test_rounds_cost_the_same_at_every_capacity(k):
    check_flat(golden_pair("31b"), k, rounds=8)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rounds_cost_the_same_at_every_capacity_long(variant, compiled):
    check_flat(golden_pair(variant, compiled=compiled), 3, rounds=40)


def check_flat(pair: Pair, k: int, *, rounds: int) -> None:
    """Copying even one of the buffers of 8 MiB would take longer than the round and show in its peak memory."""
    small, large = cost_of_rounds(pair, 512, k, rounds), cost_of_rounds(pair, LARGE, k, rounds)
    again = cost_of_rounds(pair, 512, k, rounds)
    assert large.bytes < buffer_bytes(pair, LARGE)
    assert abs(large.bytes - small.bytes) < buffer_bytes(pair, LARGE) // 4
    assert large.seconds < 1.5 * max(small.seconds, again.seconds)


def test_a_kept_state_is_seen():
    """The check above is not blind: whoever keeps the state of the last round makes every buffer copy."""
    pair = golden_pair("31b")
    kept: list[State] = []

    def play(state: State, **how: Any) -> Any:
        kept[:] = [state]
        return pair.rounds(state, **how)

    assert cost_of_rounds(pair, LARGE, 3, 4, play).bytes >= buffer_bytes(pair, LARGE)


def driver_peak(pair: Pair, chunks: int) -> int:
    """Extra bytes at the peak of so many rounds of the driver itself, in buffers of 65,536 rows."""
    ids, text = golden_text(pair.name, "long")
    base = memory_in_use()
    stream = Conversation(replace(pair, max_context=LARGE)).stream(
        ids, max_tokens=LARGE - 4096, num_draft_tokens=3
    )
    tokens = list(next(stream).tokens)
    mx.reset_peak_memory()
    tokens += [token for _ in range(chunks) for token in next(stream).tokens]
    peak = mx.get_peak_memory() - base
    shapes = kv_shapes(pair.target.text, 1, capacity_for(len(ids) + LARGE - 4096))
    stream.close()
    assert tokens == text[: len(tokens)]
    return peak - 2 * 4 * sum(math.prod(shape) for shape in shapes)


def test_the_driver_keeps_no_state_and_no_lost_candidate(monkeypatch):
    pair = golden_pair("31b")
    one = buffer_bytes(pair, LARGE - 4096)
    assert driver_peak(pair, 5) < one
    with somebody_holds(mlx_mtp.decode, "_build", monkeypatch):
        assert driver_peak(pair, 5) >= one
