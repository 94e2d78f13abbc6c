"""A request that is cancelled at any place, or dropped, ends within a round and keeps what it has."""

import asyncio
import gc
import threading

import pytest

import mlx_mtp.round
from engines import LONG, WITHIN_S, alone, engine_on, ids_of, sampled, until
from mlx_mtp import Engine
from mlx_mtp.events import Progress


def test_a_hundred_starts_and_cancels():
    expected = alone(ids_of(), max_tokens=LONG, sampling=sampled(3))
    threads = threading.active_count()
    with engine_on(max_batch=3) as engine:
        for i in range(100):
            handle = engine.submit(ids_of(), max_tokens=LONG, sampling=sampled(3), num_draft_tokens=i % 4)
            chunks = iter(handle)
            for _ in range(i % 5):
                next(chunks)
            handle.cancel()
            out = handle.result(WITHIN_S)
            assert out.finish_reason == "cancelled"
            assert out.tokens == expected[: len(out.tokens)]
            assert len(out.tokens) < LONG
        assert (
            engine.submit(ids_of(), max_tokens=30, sampling=sampled(3)).result(WITHIN_S).tokens
            == expected[:30]
        )
        until(lambda: (engine.status.running, engine.status.waiting) == (0, 0))
    assert threading.active_count() == threads


@pytest.mark.parametrize("stage", ["verify", "draft"])
def test_cancel_within_the_round(stage, monkeypatch):
    """Asked for while the round is being described: that one and the one that runs still count, no more."""
    asked: list[int] = []
    run = vars(mlx_mtp.round)[stage]

    def watched(*args, **options):
        if handle and not asked and handle[0].stats is not None and handle[0].stats.rounds >= 2:
            asked.append(handle[0].stats.rounds)
            handle[0].cancel()
        return run(*args, **options)

    handle: list = []
    monkeypatch.setattr(mlx_mtp.round, stage, watched)
    with engine_on() as engine:
        handle.append(engine.submit(ids_of(), max_tokens=LONG, num_draft_tokens=3))
        out = handle[0].result(WITHIN_S)
        assert out.finish_reason == "cancelled"
        assert asked and out.stats.rounds - asked[0] <= 2
        more = engine.submit([*ids_of(), *out.tokens], max_tokens=9, num_draft_tokens=3).result(WITHIN_S)
    expected = alone(ids_of(), max_tokens=len(out.tokens) + 9)
    assert out.tokens + more.tokens == expected
    assert more.stats.reused_tokens == len(ids_of()) + len(out.tokens) - 1


def test_cancel_in_a_prefill():
    """Within a chunk; what was read of the prompt is there for the next request."""
    ids = ids_of(count=60) * 30  # 1800 tokens: four chunks
    with engine_on(max_context=2048) as engine:
        handle = engine.submit(ids, max_tokens=5)
        for event in handle.events():
            if isinstance(event, Progress) and event.done:
                handle.cancel()
        out = handle.result(0)
        assert (out.finish_reason, out.tokens) == ("cancelled", [])
        again = engine.submit(ids, max_tokens=5).result(WITHIN_S)
        assert again.stats.reused_tokens >= 512 and again.stats.reused_tokens % 512 == 0
    assert again.tokens == alone(ids, max_context=2048, max_tokens=5)


def test_a_waiting_request_is_cancelled_at_once():
    with engine_on(max_batch=1) as engine:
        running = engine.submit(ids_of(), max_tokens=LONG)
        waiting = engine.submit(ids_of(start=5), max_tokens=LONG)
        waiting.cancel()
        assert waiting.result(WITHIN_S).finish_reason == "cancelled"
        assert not running.is_done
        running.cancel()


def test_an_iterator_or_handle_that_is_dropped_cancels():
    with engine_on() as engine:
        handle = engine.submit(ids_of(), max_tokens=LONG)
        for _ in handle:
            break
        assert handle.result(WITHIN_S).finish_reason == "cancelled"
        mailbox = engine.submit(ids_of(), max_tokens=LONG)._mailbox
        gc.collect()
        assert mailbox.result(WITHIN_S).finish_reason == "cancelled"


def test_a_closed_event_loop_cancels():
    async def leave(engine: Engine):
        handle = engine.submit(ids_of(), max_tokens=LONG)
        chunks = handle.__aiter__()
        await chunks.__anext__()
        return handle, chunks

    with engine_on() as engine:
        handle, _ = asyncio.run(leave(engine))
        assert handle.result(WITHIN_S).finish_reason == "cancelled"
