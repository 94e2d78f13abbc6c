"""The engine's contract: whoever asks, cancels, drops or fails, every other text is that of its solo run."""

import asyncio
import gc
import threading
import time

import pytest

import mlx_mtp.batch
import mlx_mtp.batch_slots
import mlx_mtp.engine_loop
import mlx_mtp.mailbox
import mlx_mtp.round
from engines import LONG, alone, engine_on, ids_of, pair_of, sampled
from mlx_mtp import (
    Engine,
)
from mlx_mtp.events import Accepted, Done, Drafted, Parked, Progress, Token
from mlx_mtp.sampling import Sampling
from talks import golden_text

WITHIN_S = 60.0  # what any wait in here may take on a busy machine


def test_a_reply_is_that_of_generate():
    with engine_on() as engine:
        handle = engine.submit(ids_of(), max_tokens=24, sampling=sampled(1), num_draft_tokens=3)
        out = handle.result(WITHIN_S)
        assert out.tokens == alone(ids_of(), max_tokens=24, sampling=sampled(1))
        assert (out.finish_reason, out.stats.generation_tokens, handle.is_done) == ("length", 24, True)
        assert handle.stats == out.stats
        assert handle.result(0) == out, "a result can be asked for again"


def test_chunks_and_events_add_up_to_the_result():
    with engine_on() as engine:
        request = {"max_tokens": 40, "sampling": sampled(2), "num_draft_tokens": 3}
        chunks = list(engine.submit(ids_of(), **request))
        handle = engine.submit(ids_of(), **request)
        events = list(handle.events())
    out = handle.result(0)
    assert [token for chunk in chunks for token in chunk.tokens] == out.tokens
    assert "".join(chunk.text for chunk in chunks) == out.text
    tokens = [event for event in events if isinstance(event, Token)]
    assert [token.id for token in tokens] == out.tokens
    assert [token.index for token in tokens] == list(range(40))
    assert "".join(token.text for token in tokens) == out.text
    assert isinstance(events[-1], Done) and events[-1].result == out
    assert isinstance(events[0], Progress)


def test_events_say_where_each_token_came_from():
    with engine_on() as engine:
        handle = engine.submit(golden_text("e2b", "long")[0], max_tokens=40, num_draft_tokens=6)
        events = list(handle.events())
    stats = handle.result(0).stats
    origins = [event.origin for event in events if isinstance(event, Token)]
    drafted = [event.count for event in events if isinstance(event, Drafted)]
    accepted = [event for event in events if isinstance(event, Accepted)]
    assert origins[0] == "prefill" and origins.count("prefill") == 1
    assert origins.count("accepted") == stats.accepted > 0
    assert sum(drafted) == stats.drafted and len(drafted) == stats.rounds
    assert [event.round for event in accepted] == list(range(1, stats.rounds + 1))
    # The last round may be cut; all others end with the target's own choice.
    whole = accepted[:-1]
    own = ["bonus" if event.count == event.drafted else "recovered" for event in whole]
    assert [origin for origin in origins if origin in ("bonus", "recovered")][: len(own)] == own
    assert {"bonus", "recovered"} <= set(own)


def test_rounds_without_drafts_and_parking_are_told():
    with engine_on() as engine:
        plain = list(engine.submit(ids_of(), max_tokens=6, num_draft_tokens=0).events())
    assert [event.origin for event in plain if isinstance(event, Token)] == ["prefill"] + 5 * ["plain"]
    assert not any(isinstance(event, Drafted | Accepted) for event in plain)
    with Engine(pair_of("e2b").__class__(**_without_drafter())) as engine:
        events = list(engine.submit(ids_of(), max_tokens=6).events())
    assert [event for event in events if isinstance(event, Parked)] == [
        Parked(True, "parked: no drafter is loaded")
    ]


def _without_drafter() -> dict:
    from pairs import golden_pair

    pair = golden_pair("e2b", drafter=None)
    return {name: getattr(pair, name) for name in pair.__slots__}


def test_requests_join_while_others_are_decoded():
    requests = [
        {"prompt": ids_of(start=i, count=5 + 11 * i), "max_tokens": 12 + 7 * (i % 4), "sampling": sampled(i)}
        for i in range(9)
    ]
    with engine_on(max_batch=4) as engine:
        handles = []
        for i, request in enumerate(requests):
            handles.append(engine.submit(**request, num_draft_tokens=("auto", 2, 0)[i % 3]))
            time.sleep(0.02)
        outs = [handle.result(WITHIN_S) for handle in handles]
    for request, out in zip(requests, outs, strict=True):
        prompt = request.pop("prompt")
        assert out.tokens == alone(prompt, **request)


def test_penalties_and_biases_join_and_leave_a_batch():
    """Rows that need more than the others: the state gets what it lacks, and no text changes."""
    kinds = [
        Sampling(temperature=0.0),
        Sampling(temperature=1.0, presence_penalty=0.8, repetition_penalty=1.3, seed=1),
        Sampling(temperature=0.9, top_k=20, seed=2),
        Sampling(temperature=0.0, logit_bias={5: 4.0, 9: -100.0}),
        Sampling(temperature=0.0, frequency_penalty=1.0),
    ]
    with engine_on(max_batch=3) as engine:
        first = engine.submit(ids_of(), max_tokens=120, sampling=kinds[0], num_draft_tokens=2)
        next(iter_held := iter(first))
        others = [
            engine.submit(ids_of(start=3 + i), max_tokens=10 + i, sampling=kind, num_draft_tokens=2)
            for i, kind in enumerate(kinds[1:] * 2)
        ]
        outs = [other.result(WITHIN_S).tokens for other in others]
        for _ in iter_held:
            pass
    assert first.result(0).tokens == alone(ids_of(), max_tokens=120, sampling=kinds[0])
    for i, kind in enumerate(kinds[1:] * 2):
        assert outs[i] == alone(ids_of(start=3 + i), max_tokens=10 + i, sampling=kind), i


def test_a_shared_round_has_the_fewest_drafts_that_anybody_asked_for():
    with engine_on(max_batch=2) as engine:
        long = engine.submit(ids_of(), max_tokens=LONG, num_draft_tokens=4)
        chunks = iter(long)
        next(chunks)
        plain = engine.submit(ids_of(start=9), max_tokens=30, num_draft_tokens=0).result(WITHIN_S)
        assert set(plain.stats.num_draft_tokens) == {0}
        for chunk in chunks:
            if (
                chunk.finish_reason is None
                and chunk.stats.num_draft_tokens[-1] == 4
                and 0 in chunk.stats.num_draft_tokens
            ):
                break
        else:
            raise AssertionError("drafts were taken up again once the other had ended")


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
        assert (engine.status.running, engine.status.waiting) == (0, 0)
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


def test_two_engines_in_a_process():
    with engine_on("e2b") as one, engine_on("31b") as two:
        handles = [
            (variant, i, engine.submit(ids_of(variant, start=i), max_tokens=30, sampling=sampled(i)))
            for i in range(4)
            for variant, engine in (("e2b", one), ("31b", two))
        ]
        outs = [(variant, i, handle.result(WITHIN_S).tokens) for variant, i, handle in handles]
    for variant, i, tokens in outs:
        assert tokens == alone(ids_of(variant, start=i), variant, max_tokens=30, sampling=sampled(i))


def test_two_engines_share_a_pair():
    with engine_on() as one, engine_on() as two:
        first = [one.submit(ids_of(start=i), max_tokens=30, sampling=sampled(i)) for i in range(3)]
        second = [two.submit(ids_of(start=i), max_tokens=30, sampling=sampled(i)) for i in range(3)]
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            expected = alone(ids_of(start=i), max_tokens=30, sampling=sampled(i))
            assert a.result(WITHIN_S).tokens == b.result(WITHIN_S).tokens == expected


def test_submitting_from_many_threads():
    expected = {i: alone(ids_of(start=i), max_tokens=12, sampling=sampled(i)) for i in range(8)}
    found: dict[int, list[int]] = {}
    with engine_on(max_batch=4) as engine:

        def ask(i: int) -> None:
            found[i] = (
                engine.submit(ids_of(start=i), max_tokens=12, sampling=sampled(i)).result(WITHIN_S).tokens
            )

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == expected


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
            await asyncio.wait_for(_all(handle), 0.05)
        return handle.result(WITHIN_S).finish_reason

    async def _all(handle) -> None:
        await handle

    with engine_on() as engine:
        expected = alone(ids_of(), max_tokens=12, sampling=sampled(4))
        assert asyncio.run(read(engine)) == (expected, expected, expected)
        assert asyncio.run(drop(engine)) == "cancelled"
        assert asyncio.run(give_up(engine)) == "cancelled"


def test_a_closed_event_loop_cancels():
    async def leave(engine: Engine):
        handle = engine.submit(ids_of(), max_tokens=LONG)
        chunks = handle.__aiter__()
        await chunks.__anext__()
        return handle, chunks

    with engine_on() as engine:
        handle, _ = asyncio.run(leave(engine))
        assert handle.result(WITHIN_S).finish_reason == "cancelled"


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
