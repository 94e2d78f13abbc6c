"""An engine from its loading to its end: closed at any time, dropped, its thread gone; nobody waits for ever."""

import gc
import threading
import time

import pytest

import mlx_mtp.batch
import mlx_mtp.engine_inbox
import mlx_mtp.mailbox
from engines import LONG, WITHIN_S, alone, ids_of, pair_of
from mlx_mtp import Engine, EngineError, GenerationError, PromptError


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


def test_a_request_that_breaks_where_it_is_checked_late_is_ended(monkeypatch, caplog):
    """Asked for while the model is loaded, so on the engine's thread; those that came with it are not harmed."""
    make, go_on = mlx_mtp.engine_inbox.make_request, threading.Event()

    def breaks(pair, prompt, **options):
        if prompt == "bad":
            raise RuntimeError("a broken check")
        return make(pair, prompt, **options)

    monkeypatch.setattr(mlx_mtp.engine_inbox, "make_request", breaks)
    with Engine("demo", wait=False, on_progress=lambda progress: go_on.wait(WITHIN_S)) as engine:
        handles = [engine.submit(prompt, max_tokens=3) for prompt in ("def f", "bad", "def g")]
        go_on.set()
        with pytest.raises(GenerationError, match="a broken check"):
            handles[1].result(WITHIN_S)
        assert len(handles[0].result(WITHIN_S).tokens) == len(handles[2].result(WITHIN_S).tokens) == 3
    assert "a broken check" in caplog.text


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
    while not engine._worker.inbox.is_closing:
        time.sleep(0.01)
    go_on.set()
    closing.join(WITHIN_S)
    assert engine.status.status == "closed"
    with pytest.raises(EngineError, match="closed"):
        early.result(0)
    with pytest.raises(EngineError, match="closed"):
        engine.wait_ready()


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
