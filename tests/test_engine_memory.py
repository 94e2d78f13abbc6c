"""An engine and memory: what does not fit, what is let go of first, limits, and nothing held for too long."""

import gc
import threading
import time
from contextlib import contextmanager

import pytest

import mlx_mtp.batch
import mlx_mtp.engine_loop
import mlx_mtp.pressure
import mlx_mtp.row_start
from engines import WITHIN_S, alone, engine_on, ids_of, sampled
from mlx_mtp import Engine, GenerationError, MemoryRefusal
from mlx_mtp.prefix_cache import PrefixCache


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


@pytest.mark.parametrize("words", ["a broken beginning", "[malloc] Unable to allocate 9 bytes."])
def test_a_row_that_cannot_begin_leaves_its_prefix_to_nobody(monkeypatch, words):
    """It would count as in use for ever, so that nothing of it could be freed."""
    caches: list[PrefixCache] = []
    start = mlx_mtp.row_start.start_row

    class Watched(PrefixCache):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            caches.append(self)

    def breaks(pair, request, *rest, **options):
        if request.max_tokens == 7:
            raise RuntimeError(words)
        return start(pair, request, *rest, **options)

    monkeypatch.setattr(mlx_mtp.engine_loop, "PrefixCache", Watched)
    monkeypatch.setattr(mlx_mtp.row_start, "start_row", breaks)
    with engine_on() as engine:
        good = engine.submit(ids_of(), max_tokens=60)
        next(good_kept := iter(good))
        bad = engine.submit(ids_of(start=3, count=40), max_tokens=7)
        with pytest.raises((GenerationError, MemoryRefusal)):
            bad.result(WITHIN_S)
        assert good.result(WITHIN_S).tokens == alone(ids_of(), max_tokens=60)
        engine.submit(ids_of(start=9), max_tokens=2).result(WITHIN_S)
        del good_kept
    assert caches[0]._entries and not any(entry.is_running for entry in caches[0]._entries)


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
