"""Whoever reads a reply, slowly, asynchronously, by callback or at its end, gets all of it."""

import asyncio
import gc
import threading
import time

import pytest

import mlx_mtp.handles
import mlx_mtp.mailbox
from engines import LONG, WITHIN_S, alone, engine_on, ids_of, sampled
from mlx_mtp import Engine
from mlx_mtp.events import Done, Token


def test_a_slow_reader_makes_nothing_grow(monkeypatch):
    monkeypatch.setattr(mlx_mtp.mailbox, "MAX_WAITING", 8)
    with engine_on() as engine:
        handle = engine.submit(ids_of(), max_tokens=100, num_draft_tokens=1)
        other = engine.submit(ids_of(), max_tokens=100, num_draft_tokens=1)
        out = handle.result(WITHIN_S)
        other.result(WITHIN_S)
        assert len(handle._mailbox._items) == len(other._mailbox._items) == 8
    chunks = list(handle)
    assert [token for chunk in chunks for token in chunk.tokens] == out.tokens
    assert len(chunks) <= 8 and chunks[-1].stats == out.stats
    tokens = [event for event in other.events() if isinstance(event, Token)]
    assert [token.id for token in tokens] == out.tokens
    assert sum(token.origin == "accepted" for token in tokens) == out.stats.accepted


def test_asyncio():
    async def read(engine: Engine) -> tuple[list[int], list[int], list[int]]:
        request = {"max_tokens": 12, "sampling": sampled(4)}
        chunks, events = engine.submit(ids_of(), **request), engine.submit(ids_of(), **request)
        by_chunk = [token async for chunk in chunks for token in chunk.tokens]
        by_event = [event.id async for event in events.events_async() if isinstance(event, Token)]
        return by_chunk, by_event, (await engine.submit(ids_of(), **request)).tokens

    async def drop(engine: Engine) -> str:
        handle = engine.submit(ids_of(), max_tokens=LONG)
        async for _ in handle:
            break
        return (await handle).finish_reason

    async def give_up(engine: Engine) -> str:
        handle = engine.submit(ids_of(), max_tokens=LONG)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_result_of(handle), 0.05)
        return handle.result(WITHIN_S).finish_reason

    with engine_on() as engine:
        expected = alone(ids_of(), max_tokens=12, sampling=sampled(4))
        assert asyncio.run(read(engine)) == (expected, expected, expected)
        assert asyncio.run(drop(engine)) == "cancelled"
        assert asyncio.run(give_up(engine)) == "cancelled"


@pytest.mark.parametrize("later", range(6))
def test_a_task_that_is_cancelled_as_it_is_woken_ends(later):
    """However many turns of the event loop lie between the two."""

    async def read() -> tuple[bool, bool]:
        mailbox = mlx_mtp.mailbox.Mailbox(lambda: True)
        handle = mlx_mtp.handles.Handle(mailbox, None)
        task = asyncio.create_task(_result_of(handle))
        await asyncio.sleep(0.01)
        mailbox.progress(1, 2)
        for _ in range(later):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=1.0)
        return bool(done) and task.cancelled(), mailbox.is_cancelled

    assert asyncio.run(read()) == (True, True)


async def _result_of(handle) -> None:
    await handle


def test_events_by_callback():
    events: list = []
    done = threading.Event()

    def on_event(event) -> None:
        assert threading.current_thread() is not threading.main_thread()
        events.append(event)
        if isinstance(event, Done):
            done.set()

    with engine_on() as engine:
        engine.submit(ids_of(), max_tokens=12, sampling=sampled(5), on_event=on_event)
        gc.collect()
        assert done.wait(WITHIN_S), "nobody needs to keep the handle"
    assert [event.id for event in events if isinstance(event, Token)] == alone(
        ids_of(), max_tokens=12, sampling=sampled(5)
    )


def test_what_is_called_at_the_end(caplog):
    ends: list = []
    with engine_on() as engine:

        def raises(result) -> None:
            raise ValueError("not the engine's fault")

        handle = engine.submit(ids_of(), max_tokens=30)
        handle.when_done(raises)
        handle.when_done(ends.append)
        out = handle.result(WITHIN_S)
        assert engine.submit(ids_of(), max_tokens=5).result(WITHIN_S).tokens == out.tokens[:5]
        handle.when_done(ends.append)
        assert ends == [out, out], "now, where it has ended"
    assert "not the engine's fault" in caplog.text


def test_what_is_called_at_the_end_is_done_before_a_reader_sees_it():
    done: list[int] = []
    with engine_on() as engine:
        for i in range(20):
            handle = engine.submit(ids_of(), max_tokens=2)
            handle.when_done(lambda result: (time.sleep(0.002), done.append(1)))
            list(handle) if i % 2 else handle.result(WITHIN_S)
            assert len(done) == i + 1
