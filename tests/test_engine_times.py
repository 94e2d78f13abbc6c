"""What an engine learns of its rounds is there when the next one begins, and is read on the thread that plays them."""

import threading
from pathlib import Path

import pytest

import mlx_mtp.profiles
from mlx_mtp import Engine
from mlx_mtp.profiles import key_of, profile_path
from pairs import golden_pair
from servers import HELLO, demo_pair, serving


def learn(engine: Engine) -> None:
    """As from rounds without drafts and with three; nobody plays any meanwhile."""
    times = engine.pair.rounds.times
    for _ in range(6):
        times.observe(0, 0.010)
        times.observe(3, 0.015)


def kept() -> Path:
    return profile_path(key_of(demo_pair()))


@pytest.mark.parametrize("source", ["demo", "a loaded pair"])
def test_the_next_engine_knows_before_its_first_request(source, monkeypatch):
    threads: list[str] = []
    sound = mlx_mtp.profiles.restore

    def restore(*words: object) -> object:
        threads.append(threading.current_thread().name)
        return sound(*words)

    monkeypatch.setattr(mlx_mtp.profiles, "restore", restore)
    pair = "demo" if source == "demo" else demo_pair()
    given = demo_pair().rounds.times
    before = given.timed(3)  # other tests of this process play rounds with it too
    with Engine(pair) as engine:
        assert engine.pair.rounds.times is not given
        assert not engine.pair.rounds.times.is_known()
        learn(engine)
        learnt = engine.pair.rounds.times.ratio(3)
    with Engine(pair) as engine:
        times = engine.pair.rounds.times
        assert times.is_known() and abs(times.ratio(3) - learnt) < 1e-3
        assert abs(learnt - 1.5) < 0.01, "and not what was expected of the model before"
        assert engine.submit(HELLO, max_tokens=8).result().text
    assert threads == ["mlx-mtp engine"] * 2
    assert given.timed(3) == before, "the pair that was given has rounds of its own"


def test_whoever_wants_none_of_it_has_none():
    with Engine(demo_pair(), keep_times=False) as engine:
        learn(engine)
    assert not kept().exists()
    with Engine(demo_pair()) as engine:
        learn(engine)
    with Engine(demo_pair(), keep_times=False) as engine:
        assert not engine.pair.rounds.times.is_known()


def test_a_damaged_profile_is_a_warning_and_no_more():
    kept().parent.mkdir(parents=True)
    kept().write_bytes(b"{")
    with Engine(demo_pair()) as engine:
        assert any("kept aside" in warning for warning in engine.pair.warnings)
        assert engine.submit(HELLO, max_tokens=4).result().text


def test_a_pair_that_has_no_files_is_kept_nothing_of():
    with Engine(golden_pair("e2b")) as engine:
        learn(engine)
    assert not kept().parent.exists() or not list(kept().parent.iterdir())


def test_a_server_begins_with_what_the_last_one_learnt():
    with Engine("demo") as engine, serving(engine) as running:
        assert running.chat(max_tokens=12).status == 200
        learn(engine)
    with Engine("demo", wait=False) as engine, serving(engine) as running:
        engine.wait_ready()
        assert engine.pair.rounds.times.is_known()
        assert running.chat(max_tokens=4).status == 200
