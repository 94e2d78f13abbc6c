"""Ctrl-C, a raising callback or a dropped iterator anywhere: the same conversation answers on, as a cold run would."""

import functools
import gc
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import mlx_mtp.conversation
import mlx_mtp.decode
import mlx_mtp.prefill
import mlx_mtp.turns
from mlx_mtp.conversation import Conversation
from mlx_mtp.errors import ParameterError
from pairs import golden_pair
from talks import check_rows, golden_rows, golden_text, take

pair_of = functools.cache(golden_pair)
VARIANT, PROMPT = "e2b", "long"
PREFILL_CHUNK = 16


def check_answers(conversation: Conversation, got: list[int], k: int) -> int:
    """The conversation goes on after `got` tokens of the golden text; -> how many tokens it had kept."""
    ids, text = golden_text(VARIANT, PROMPT)
    assert got == text[: len(got)]
    check_rows(conversation, golden_rows(VARIANT, PROMPT))
    more = conversation.generate(ids + got, max_tokens=5, num_draft_tokens=k)
    assert more.tokens == text[len(got) : len(got) + 5]
    check_rows(conversation, golden_rows(VARIANT, PROMPT))
    return more.stats.reused_tokens


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_on_progress_raises(error, calls):
    """What it raises reaches the caller; whole chunks stay."""
    conversation, seen = Conversation(pair_of(VARIANT), chunk=PREFILL_CHUNK), []
    ids, _ = golden_text(VARIANT, PROMPT)

    def on_progress(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) == calls:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        conversation.generate(ids, max_tokens=5, on_progress=on_progress)
    done = min(calls * PREFILL_CHUNK, len(ids))
    assert seen[-1] == (done, len(ids))
    assert check_answers(conversation, [], 3) == min(done, len(ids) - 1)


class Once:
    """A function that raises KeyboardInterrupt in its `at`-th call, before or after doing its work."""

    def __init__(self, inner: Callable[..., Any], at: int, *, after: bool):
        self._inner, self._left, self._after = inner, at, after
        self.fired = False

    def __get__(self, owner: Any, kind: Any = None) -> Callable[..., Any]:
        return functools.partial(self, owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            self.fired = True
            if self._after:
                self._inner(*args, **kwargs)
            raise KeyboardInterrupt
        return self._inner(*args, **kwargs)


def reply_interrupted(conversation: Conversation, k: int) -> list[int]:
    """-> the tokens that arrived before KeyboardInterrupt."""
    ids, _ = golden_text(VARIANT, PROMPT)
    got: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        for chunk in conversation.stream(ids, max_tokens=40, num_draft_tokens=k):
            got += chunk.tokens
    return got


# Calls inside a prefill of three chunks: layers of one chunk, writes of one layer, evaluations.
PREFILL_FAULTS = [
    (mlx_mtp.prefill, "run_layer", (1, 3, 6, 9)),
    (mlx_mtp.prefill, "write_rows", (1, 2, 9, 10, 24)),
    (mlx_mtp.prefill, "_finish_last_row", (1,)),
    (mlx_mtp.turns, "new_kv", (1,)),
    (mlx_mtp.turns, "capacity_for", (1,)),
    (mlx_mtp.conversation, "start_row", (1,)),
]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("module, name, calls", PREFILL_FAULTS, ids=[fault[1] for fault in PREFILL_FAULTS])
def test_interrupt_inside_a_prefill(monkeypatch, module, name, calls, after):
    for at in calls:
        conversation = Conversation(pair_of(VARIANT), chunk=PREFILL_CHUNK)
        with monkeypatch.context() as patch:
            once = Once(vars(module)[name], at, after=after)
            patch.setattr(module, name, once)
            assert reply_interrupted(conversation, 3) == []
            assert once.fired
        reused = check_answers(conversation, [], 3)
        assert reused in (0, PREFILL_CHUNK, 2 * PREFILL_CHUNK, len(golden_text(VARIANT, PROMPT)[0]) - 1)


def test_interrupt_after_a_prefill_keeps_its_rows(monkeypatch):
    conversation = Conversation(pair_of(VARIANT))
    with monkeypatch.context() as patch:
        patch.setattr(mlx_mtp.conversation, "start_row", Once(mlx_mtp.conversation.start_row, 1, after=True))
        reply_interrupted(conversation, 3)
    assert check_answers(conversation, [], 3) == len(golden_text(VARIANT, PROMPT)[0]) - 1


DRIVER = [
    (mlx_mtp.decode, "_build"),
    (mlx_mtp.decode, "_dispatch"),
    (mlx_mtp.decode, "evaluate_soon"),
    (mlx_mtp.decode.Ledger, "record"),
    (mlx_mtp.decode.Ledger, "first_step"),
    (mlx_mtp.conversation.Reply, "take"),
]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("k", [0, 6])
@pytest.mark.parametrize("place, name", DRIVER, ids=[name for _, name in DRIVER])
def test_interrupt_between_two_operations_of_the_driver(monkeypatch, place, name, k, after):
    ids, _ = golden_text(VARIANT, PROMPT)
    for at in (1,) if name == "first_step" else (1, 2, 3, 4):
        conversation = Conversation(pair_of(VARIANT))
        with monkeypatch.context() as patch:
            once = Once(vars(place)[name], at, after=after)
            patch.setattr(place, name, once)
            got = reply_interrupted(conversation, k)
            assert once.fired
        reused = check_answers(conversation, got, k)
        # Tokens that were taken but did not arrive are rewound, which a wrapped ring may not allow.
        if (name, after) != ("take", True):
            assert reused == len(ids) + len(got) - 1


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """A real signal at a time nobody chose; KeyboardInterrupt is swallowed."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("k", [0, 3])
def test_interrupts_by_a_signal(k):
    ids, _ = golden_text(VARIANT, PROMPT)
    conversation = Conversation(pair_of(VARIANT), chunk=PREFILL_CHUNK)
    started = time.perf_counter()
    conversation.generate(ids, max_tokens=12, num_draft_tokens=k)
    whole = time.perf_counter() - started
    for sixth in range(1, 7):
        conversation.clear()
        got: list[int] = []
        with interrupted_after(whole * sixth / 6):
            for chunk in conversation.stream(ids, max_tokens=40, num_draft_tokens=k):
                got += chunk.tokens
        check_answers(conversation, got, k)


@pytest.mark.parametrize("k", [0, 6])
def test_consumer_drops_the_iterator(k):
    ids, _ = golden_text(VARIANT, PROMPT)
    conversation = Conversation(pair_of(VARIANT))
    conversation.stream(ids, max_tokens=5, num_draft_tokens=k)  # never started
    stream = conversation.stream(ids, max_tokens=40, num_draft_tokens=k)
    got = [token for _ in range(3) for token in next(stream).tokens]
    del stream
    gc.collect()
    assert check_answers(conversation, got, k) == len(ids) + len(got) - 1


def test_a_second_reply_waits_for_the_first():
    ids, text = golden_text(VARIANT, PROMPT)
    conversation = Conversation(pair_of(VARIANT))
    stream = conversation.stream(ids, max_tokens=8, num_draft_tokens=3)
    got = list(next(stream).tokens)
    with pytest.raises(ParameterError, match="replying already"):
        take(conversation, ids, chunks=1)
    got += [token for chunk in stream for token in chunk.tokens]
    assert got == text[:8]
    check_answers(conversation, got, 3)
