"""Where MLX runs out of memory in a prefill or a round: all is freed, the caller is told, the next request works."""

import functools
import gc
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

import mlx_mtp.batch_slots
import mlx_mtp.decode
import mlx_mtp.prefill
import mlx_mtp.turns
import mlx_mtp.verify
from mlx_mtp import generate_batch
from mlx_mtp.conversation import Conversation
from mlx_mtp.errors import MemoryRefusal
from mlx_mtp.pressure import is_out_of_memory
from pairs import golden_pair
from talks import check_rows, golden_text

pair_of = functools.cache(golden_pair)

SAID = [
    RuntimeError("[malloc] Unable to allocate 8589934592 bytes."),
    RuntimeError(
        "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer size"
    ),
    RuntimeError("[metal::malloc] Resource limit (499000) exceeded."),
    RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommand...)"),
    RuntimeError("std::bad_alloc"),
    MemoryError("std::bad_alloc"),
    MemoryError(),
]


@pytest.mark.parametrize("error", SAID, ids=str)
def test_what_means_that_memory_ran_out(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("[matmul] shapes do not fit"), ValueError("[malloc] Unable to allocate"), KeyError("x")],
)
def test_what_does_not(error):
    assert not is_out_of_memory(error)


class RunsOut:
    """A function that raises in its `at`-th call, as MLX would, after doing its work."""

    def __init__(self, inner: Callable[..., Any], at: int, error: BaseException):
        self._inner, self._left, self._error = inner, at, error

    def __get__(self, owner: Any, kind: Any = None) -> Callable[..., Any]:
        return functools.partial(self, owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._left -= 1
        result = self._inner(*args, **kwargs)
        if self._left == 0:
            raise self._error
        return result


PLACES = [
    (mlx_mtp.turns, "new_kv", 1),
    (mlx_mtp.prefill, "run_layer", 2),
    (mlx_mtp.prefill, "_finish_last_row", 1),
    (mlx_mtp.decode, "_with_first_drafts", 1),
    (mlx_mtp.verify, "run_rows", 3),
    (mlx_mtp.decode, "evaluate_soon", 1),
    (mlx_mtp.decode, "evaluate_soon", 6),
    (mlx_mtp.decode.Ledger, "record", 4),
]


@pytest.mark.parametrize("module, name, at", PLACES)
def test_a_request_that_ran_out_is_freed_and_the_next_one_works(monkeypatch, module, name, at):
    pair, (ids, text) = pair_of("e2b"), golden_text("e2b", "long")
    conversation = Conversation(pair)
    conversation.generate(ids, max_tokens=2, num_draft_tokens=3)
    conversation.clear()
    gc.collect()
    before = mx.get_active_memory()
    seen: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(module, name, RunsOut(vars(module)[name], at, SAID[0]))
        with pytest.raises(
            MemoryRefusal, match=r"\[malloc\] Unable to allocate 8589934592 bytes.*close other"
        ) as caught:
            for chunk in conversation.stream(ids, max_tokens=40, num_draft_tokens=3):
                seen += chunk.tokens
        assert seen == text[: len(seen)]
        # The refusal, its cause and their tracebacks are still alive here.
        assert caught.value.__cause__ is SAID[0]
        assert mx.get_active_memory() <= before and mx.get_cache_memory() == 0
    assert conversation.history.rows == 0
    out = conversation.generate(ids, max_tokens=9, num_draft_tokens=3)
    assert (out.tokens, out.stats.reused_tokens) == (text[:9], 0)
    check_rows(conversation)


def test_other_errors_pass_as_they_are(monkeypatch):
    ids, _ = golden_text("e2b", "long")
    error = RuntimeError("[matmul] shapes do not fit")
    monkeypatch.setattr(mlx_mtp.decode, "evaluate_soon", RunsOut(mlx_mtp.decode.evaluate_soon, 3, error))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Conversation(pair_of("e2b")).generate(ids, max_tokens=9)


@pytest.mark.parametrize("module, name, at", [PLACES[1], PLACES[6], (mlx_mtp.batch_slots, "join_rows", 1)])
def test_a_batch_that_ran_out(monkeypatch, module, name, at):
    pair, (ids, text) = pair_of("e2b"), golden_text("e2b", "long")
    generate_batch(pair, [ids, ids], max_batch=2, max_tokens=2)
    gc.collect()
    before = mx.get_active_memory()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, RunsOut(vars(module)[name], at, SAID[0]))
        with pytest.raises(MemoryRefusal, match="memory ran out"):
            generate_batch(pair, [ids, ids], max_batch=2, max_tokens=20)
        assert mx.get_active_memory() <= before and mx.get_cache_memory() == 0
    assert [out.tokens for out in generate_batch(pair, [ids, ids], max_batch=2, max_tokens=9)] == [
        text[:9]
    ] * 2
