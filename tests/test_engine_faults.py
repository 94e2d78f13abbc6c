"""An engine when things go wrong: requests, callbacks, memory, loading, closing; each harms itself alone."""

import gc
import threading
import time
from contextlib import contextmanager

import pytest

import mlx_mtp.batch
import mlx_mtp.batch_slots
import mlx_mtp.engine_loop
import mlx_mtp.mailbox
import mlx_mtp.round
from engines import LONG, alone, engine_on, ids_of, pair_of, sampled
from mlx_mtp import (
    BusyError,
    Engine,
    EngineError,
    GenerationError,
    MemoryRefusal,
    ParameterError,
    PromptError,
)
from mlx_mtp.events import Progress, Token
from mlx_mtp.prefix_cache import PrefixCache
from mlx_mtp.sampling import Sampling

WITHIN_S = 60.0  # what any wait in here may take on a busy machine


def test_a_callback_that_raises_cancels_its_request_alone(caplog):
    def on_event(event) -> None:
        if isinstance(event, Token):
            raise ValueError("the callback's own fault")

    with engine_on() as engine:
        bad = engine.submit(ids_of(), max_tokens=LONG, on_event=on_event)
        good = engine.submit(ids_of(), max_tokens=20)
        assert bad.result(WITHIN_S).finish_reason == "cancelled"
        assert good.result(WITHIN_S).tokens == alone(ids_of(), max_tokens=20)
    assert "the callback's own fault" in caplog.text


@pytest.mark.parametrize(
    "prompt, options, error",
    [
        ("", {}, PromptError),
        ([9999], {}, PromptError),
        ([1], {"max_tokens": 0}, ParameterError),
        ([1], {"num_draft_tokens": 99}, ParameterError),
        ([1], {"num_draft_tokens": True}, ParameterError),
        ([1], {"stop": 5}, ParameterError),
        ([1] * 600, {}, PromptError),
        ([1], {"sampling": Sampling(logit_bias={9999: 1.0})}, ParameterError),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_done(prompt, options, error):
    with engine_on() as engine:
        with pytest.raises(error):
            engine.submit(prompt, **options)
        assert engine.submit(ids_of(), max_tokens=5).result(WITHIN_S).tokens == alone(ids_of(), max_tokens=5)


@pytest.mark.parametrize(
    "options", [{"max_batch": 0}, {"max_queue": 0}, {"memory_budget": -1}, {"prefix_budget": True}]
)
def test_bad_settings_are_refused(options):
    with pytest.raises(ParameterError):
        Engine(pair_of(), **options)
    with pytest.raises(ParameterError, match="quantize"):
        Engine(pair_of(), quantize=4)


def test_what_fails_while_it_is_decoded_harms_no_other(monkeypatch, caplog):
    decode, calls = mlx_mtp.batch_slots.decode, []

    def breaks_once(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a broken round")
        return decode(*args, **options)

    with engine_on(max_batch=1) as engine:
        expected = alone(ids_of(), max_tokens=8)
        assert engine.submit(ids_of(), max_tokens=8).result(WITHIN_S).tokens == expected
        monkeypatch.setattr(mlx_mtp.batch_slots, "decode", breaks_once)
        calls.append(1)
        bad, waiting = engine.submit(ids_of(), max_tokens=8), engine.submit(ids_of(), max_tokens=8)
        with pytest.raises(GenerationError, match="a broken round"):
            bad.result(WITHIN_S)
        with pytest.raises(GenerationError):
            list(bad)
        assert waiting.result(WITHIN_S).tokens == expected
    assert "a broken round" in caplog.text


def test_what_fails_as_it_begins_harms_no_other(monkeypatch):
    start = mlx_mtp.row_start.start_row

    def breaks(pair, request, *rest, **options):
        if request.max_tokens == 7:
            raise RuntimeError("a broken beginning")
        return start(pair, request, *rest, **options)

    monkeypatch.setattr(mlx_mtp.row_start, "start_row", breaks)
    with engine_on() as engine:
        good = engine.submit(ids_of(), max_tokens=60)
        bad = engine.submit(ids_of(start=3), max_tokens=7)
        with pytest.raises(GenerationError, match="a broken beginning"):
            bad.result(WITHIN_S)
        assert good.result(WITHIN_S).tokens == alone(ids_of(), max_tokens=60)


def test_a_prompt_that_does_not_fit_is_refused_and_the_next_is_not(monkeypatch):
    admit = mlx_mtp.pressure.Guard.admit

    asked: list[int] = []

    def refuses(self, needed: int) -> None:
        asked.append(needed)
        if needed == max(asked):
            raise MemoryRefusal("it does not fit")
        admit(self, needed)

    monkeypatch.setattr(mlx_mtp.pressure.Guard, "admit", refuses)
    with engine_on(max_context=4096) as engine:
        big = engine.submit(ids_of(), max_tokens=4000)
        with pytest.raises(MemoryRefusal):
            big.result(WITHIN_S)
        assert engine.submit(ids_of(), max_tokens=5).result(WITHIN_S).tokens == alone(ids_of(), max_tokens=5)


def test_an_idle_engine_lets_go_of_prefixes_where_memory_gets_short(monkeypatch):
    monkeypatch.setattr(mlx_mtp.engine_loop, "LOOK_EVERY_S", 0.02)
    said = ["none"]
    monkeypatch.setattr(mlx_mtp.pressure.Guard, "relief", lambda self: said[0])
    with engine_on() as engine:
        engine.submit(ids_of(), max_tokens=5).result(WITHIN_S)
        assert _cached_bytes(engine, lambda size: size > 0) > 0
        said[0] = "shrink"
        assert _cached_bytes(engine, lambda size: size == 0) == 0
        said[0] = "none"
        assert engine.submit(ids_of(), max_tokens=5).result(WITHIN_S).stats.reused_tokens == 0


def _cached_bytes(engine: Engine, is_it) -> int:
    """What is kept, once that is as wanted, or time is up: the result is there before the K/V is handed back."""
    until = time.monotonic() + WITHIN_S
    while not is_it(engine.status.cached_bytes) and time.monotonic() < until:
        time.sleep(0.01)
    return engine.status.cached_bytes


def test_prefixes_are_let_go_of_before_a_prompt_is_refused(monkeypatch):
    """As many as it takes, half of what is left each time."""
    caches: list[PrefixCache] = []
    admit, most = mlx_mtp.pressure.Guard.admit, [2**60]

    class Watched(PrefixCache):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            caches.append(self)

    def refuses(self, needed: int) -> None:
        if caches[0].nbytes > most[0]:
            raise MemoryRefusal("it does not fit beside the prefixes")
        admit(self, needed)

    monkeypatch.setattr(mlx_mtp.engine_loop, "PrefixCache", Watched)
    monkeypatch.setattr(mlx_mtp.pressure.Guard, "admit", refuses)
    with engine_on() as engine:
        for i in range(8):
            engine.submit(ids_of(start=7 * i, count=30), max_tokens=5, sampling=sampled(i)).result(WITHIN_S)
        most[0] = _cached_bytes(engine, lambda size: size > 0) // 5
        out = engine.submit(ids_of(start=60, count=30), max_tokens=5).result(WITHIN_S)
        assert len(caches[0]) <= 3, "one or two of eight, and the new one"
    monkeypatch.undo()
    assert out.tokens == alone(ids_of(start=60, count=30), max_tokens=5)


def test_a_full_queue_says_so():
    with engine_on(max_batch=1, max_queue=2) as engine:
        running = engine.submit(ids_of(), max_tokens=LONG)
        next(iter_kept := iter(running))
        waiting = [engine.submit(ids_of(), max_tokens=2) for _ in range(2)]
        with pytest.raises(BusyError, match="2 requests wait"):
            engine.submit(ids_of(), max_tokens=2)
        running.cancel()
        assert all(handle.result(WITHIN_S).tokens for handle in waiting)
        del iter_kept


def test_closing_ends_everything_within_a_round():
    engine = Engine(pair_of(), max_batch=1)
    running, waiting = (engine.submit(ids_of(), max_tokens=LONG) for _ in range(2))
    next(iter_kept := iter(running))
    engine.close()
    engine.close()
    assert running.result(0).finish_reason == "cancelled" and running.result(0).tokens
    assert waiting.result(0).finish_reason == "cancelled"
    assert engine.status.status == "closed"
    with pytest.raises(EngineError, match="closed"):
        engine.submit(ids_of())
    del iter_kept


def test_an_engine_lives_as_long_as_somebody_waits():
    assert Engine(pair_of()).submit(ids_of(), max_tokens=9).result(WITHIN_S).tokens == alone(
        ids_of(), max_tokens=9
    )
    engine = Engine(pair_of())
    thread = engine._worker._thread
    handle = engine.submit(ids_of(), max_tokens=5)
    del engine
    gc.collect()
    assert handle.result(WITHIN_S).tokens and thread.is_alive()
    del handle
    gc.collect()
    thread.join(WITHIN_S)
    assert not thread.is_alive()


def test_limits_are_set_only_where_that_is_asked_for(monkeypatch):
    told: list[str] = []

    @contextmanager
    def limits(machine):
        told.append(f"set on {threading.current_thread().name}")
        yield
        told.append("put back")

    monkeypatch.setattr(mlx_mtp.engine_loop, "memory_limits", limits)
    with engine_on() as engine:
        engine.submit(ids_of(), max_tokens=2).result(WITHIN_S)
    assert told == []
    with engine_on(set_memory_limits=True) as engine:
        assert told == ["set on mlx-mtp engine"]
    assert told[1:] == ["put back"]


def test_a_thread_that_ends_is_reported(monkeypatch, caplog):
    """Nobody waits for ever, and what is asked later says why."""

    def dies(self, *args) -> None:
        raise SystemExit("somebody ended the thread")

    engine = Engine(pair_of())
    monkeypatch.setattr(mlx_mtp.batch.Batch, "run", dies)
    handle = engine.submit(ids_of(), max_tokens=5)
    with pytest.raises(EngineError, match="thread ended"):
        handle.result(WITHIN_S)
    with pytest.raises(EngineError, match="thread ended"):
        engine.submit(ids_of())
    assert engine.status.status == "failed"
    engine.close()


def test_a_handle_whose_thread_is_gone_does_not_wait(monkeypatch):
    """As after a fork, where the thread is not there and nobody says so."""
    monkeypatch.setattr(mlx_mtp.mailbox, "LOOK_EVERY_S", 0.01)
    mailbox = mlx_mtp.mailbox.Mailbox(lambda: False)
    with pytest.raises(EngineError, match="forked"):
        mailbox.result()
    with pytest.raises(EngineError, match="forked"):
        mailbox.next()


def test_timeouts():
    with engine_on() as engine:
        handle = engine.submit(ids_of(), max_tokens=LONG)
        with pytest.raises(TimeoutError):
            handle.result(0.01)
        assert not handle.is_done
        handle.cancel()
        assert handle.result(WITHIN_S).finish_reason == "cancelled"


def test_loading_by_name():
    stages: list[str] = []
    with Engine("demo", wait=False, on_progress=lambda progress: stages.append(progress.stage)) as engine:
        early = engine.submit("def f", max_tokens=3)
        bad = engine.submit("", max_tokens=3)
        assert len(early.result(WITHIN_S).tokens) == 3
        with pytest.raises(PromptError):
            bad.result(WITHIN_S)
        assert "read" in stages and engine.pair.name == "demo"
        assert engine.status.status == "ready"


def test_a_model_that_cannot_be_loaded_says_why(tmp_path):
    from mlx_mtp import CheckpointError

    with pytest.raises(CheckpointError):
        Engine(tmp_path / "none")
    engine = Engine(tmp_path / "none", wait=False)
    with pytest.raises(CheckpointError):
        engine.wait_ready(WITHIN_S)
    with pytest.raises(CheckpointError):
        engine.submit("x")
    assert engine.status.status == "failed"


def test_closing_gives_up_a_load():
    began, go_on = threading.Event(), threading.Event()

    def on_progress(progress) -> None:
        began.set()
        assert go_on.wait(WITHIN_S)

    engine = Engine("demo", wait=False, on_progress=on_progress)
    early = engine.submit("def f")
    assert began.wait(WITHIN_S)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._worker.shared.is_closing:
        time.sleep(0.01)
    go_on.set()
    closing.join(WITHIN_S)
    assert engine.status.status == "closed"
    with pytest.raises(EngineError, match="closed"):
        early.result(0)
    with pytest.raises(EngineError, match="closed"):
        engine.wait_ready()


def test_broken_numbers_end_one_reply_and_leave_nothing_behind(monkeypatch):
    import mlx.core as mx

    logits, calls = mlx_mtp.round.logits_of, []

    def broken(target, hidden):
        calls.append(1)
        return logits(target, hidden) * (mx.nan if len(calls) == 4 else 1.0)

    monkeypatch.setattr(mlx_mtp.round, "logits_of", broken)
    with engine_on() as engine:
        out = engine.submit(ids_of(), max_tokens=LONG, num_draft_tokens=1).result(WITHIN_S)
        assert out.finish_reason == "error" and "no usable numbers" in (out.note or "")
        again = engine.submit(ids_of(), max_tokens=9).result(WITHIN_S)
        assert again.stats.reused_tokens == 0
    assert again.tokens == alone(ids_of(), max_tokens=9)


def test_replies_go_on_while_another_prompt_is_read():
    """Rounds are played between two chunks; a cancel in that time does not wait for the end of the prompt either."""
    prompt = ids_of(count=60) * 60  # 3600 tokens: eight chunks
    with engine_on(max_context=4096, max_batch=3) as engine:
        first = engine.submit(ids_of(), max_tokens=LONG, num_draft_tokens=2)
        second = engine.submit(ids_of(start=3), max_tokens=LONG, num_draft_tokens=2)
        next(first_kept := iter(first))
        next(second_kept := iter(second))
        reading = engine.submit(prompt, max_tokens=5)
        seen: list[tuple[int, int]] = []
        for event in reading.events():
            if isinstance(event, Progress) and event.done and event.done < len(prompt):
                seen.append((event.done, first.stats.rounds))
                if len(seen) == 3:
                    second.cancel()
                    assert second.result(WITHIN_S).finish_reason == "cancelled"
                    assert not reading.is_done
        out, ended = reading.result(0), second.result(0)
        first.cancel()
        done = first.result(WITHIN_S)
        # What is kept of the one that was cancelled are its tokens' rows, though others went on.
        more = engine.submit([*ids_of(start=3), *ended.tokens], max_tokens=8).result(WITHIN_S)
        del first_kept, second_kept
    assert seen[-1][1] > seen[0][1], seen
    assert out.tokens == alone(prompt, max_context=4096, max_tokens=5)
    assert done.tokens == alone(ids_of(), max_context=4096, max_tokens=LONG)[: len(done.tokens)]
    assert ended.tokens + more.tokens == alone(
        ids_of(start=3), max_context=4096, max_tokens=len(ended.tokens) + 8
    )


def test_closing_does_not_wait_for_a_long_prompt():
    engine = Engine(pair_of("e2b", 16_384))
    handle = engine.submit(ids_of(count=60) * 260, max_tokens=5)
    next(events := handle.events())
    began = time.monotonic()
    engine.close()
    took = time.monotonic() - began
    out = handle.result(0)
    assert (out.finish_reason, out.tokens) == ("cancelled", []), took
    del events


def test_a_batch_that_is_over_holds_nothing():
    """Without waiting for the collector: its state is K/V."""
    gc.collect()
    before = _alive(mlx_mtp.batch.Batch)  # of tests whose errors are kept
    gc.disable()
    try:
        with engine_on(prefix_budget=0, max_batch=3) as engine:
            handles = [engine.submit(ids_of(start=i), max_tokens=9) for i in range(3)]
            for handle in handles:
                handle.result(WITHIN_S)
            until = time.monotonic() + WITHIN_S
            while _alive(mlx_mtp.batch.Batch) > before and time.monotonic() < until:
                time.sleep(0.01)
            assert _alive(mlx_mtp.batch.Batch) == before
    finally:
        gc.enable()


def _alive(kind: type) -> int:
    return sum(type(thing) is kind for thing in gc.get_objects())
