"""Many requests of all kinds at once, cancelled, dropped, stopped and short of memory at random: texts stay theirs."""

import random
import threading
import time
from typing import Any

import mlx.core as mx
import pytest

import mlx_mtp.pressure
from engines import alone, engine_on, ids_of, pair_of
from mlx_mtp import Engine
from mlx_mtp.sampling import Sampling

WITHIN_S = 300.0


def sampling_of(rng: random.Random) -> Sampling:
    kind = rng.randrange(5)
    if kind == 0:
        return Sampling(temperature=0.0)
    if kind == 1:
        return Sampling(temperature=1.0, presence_penalty=0.8, repetition_penalty=1.3, seed=rng.randrange(99))
    if kind == 2:
        return Sampling(temperature=0.9, logit_bias={rng.randrange(256): 3.0}, seed=rng.randrange(99))
    return Sampling(temperature=1.0, top_k=rng.choice([0, 20]), seed=rng.randrange(99))


def one_client(engine: Engine, seed: int, requests: int, failures: list[str]) -> None:
    """Requests one after another, some going on from the last reply; each is compared with a cold run."""
    rng = random.Random(seed)
    ids: list[int] = []
    try:
        for i in range(requests):
            if not ids or len(ids) > 300 or rng.random() < 0.4:
                ids = ids_of(start=rng.choice([0, 0, 0, 17, 31]), count=rng.choice([4, 30, 60, 130]))
            ids = [*ids, *one_request(engine, rng, ids, f"client {seed}, request {i}", failures)]
            ids += ids_of(start=rng.randrange(40), count=5)
            if rng.random() < 0.2:
                time.sleep(rng.random() / 20)
    except Exception as error:
        failures.append(f"client {seed}: {error!r}")
    finally:
        mx.synchronize()
        mx.clear_streams()  # or the process may abort when it exits


def one_request(
    engine: Engine, rng: random.Random, ids: list[int], name: str, failures: list[str]
) -> list[int]:
    request: dict[str, Any] = {"max_tokens": rng.choice([1, 5, 30]), "sampling": sampling_of(rng)}
    expected = alone(ids, **request)
    k = rng.choice([0, 1, 3, "auto"])
    stop = pair_of().prompt_format.tokenizer.decode(expected[3:5]) if rng.random() < 0.2 else ""
    handle = engine.submit(ids, **request, num_draft_tokens=k, stop=(stop,) if stop else ())
    end = rng.random()
    if end < 0.15:
        handle.cancel()
    elif end < 0.3:
        for _ in handle:
            if rng.random() < 0.3:
                break
    out = handle.result(WITHIN_S)
    if out.tokens != expected[: len(out.tokens)]:
        failures.append(f"{name}: {out.tokens} is not {expected}")
    if end >= 0.3 and not stop and len(out.tokens) != len(expected):
        failures.append(f"{name}: {out.finish_reason} after {len(out.tokens)} tokens, {out.note}")
    return out.tokens


def storm(seed: int, *, clients: int, requests: int, monkeypatch) -> None:
    rng = random.Random(seed)
    # One relief in fifty: prefixes are dropped and rows put aside.
    monkeypatch.setattr(
        mlx_mtp.pressure.Guard, "relief", lambda self: "shrink" if rng.random() < 0.02 else "none"
    )
    failures: list[str] = []
    with engine_on(max_batch=rng.choice([1, 3, 4]), prefix_budget=rng.choice([0, 400_000, 2**30])) as engine:
        threads = [
            threading.Thread(target=one_client, args=(engine, 100 * seed + i, requests, failures))
            for i in range(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WITHIN_S)
        assert not any(thread.is_alive() for thread in threads)
        assert engine.submit(ids_of(), max_tokens=3).result(WITHIN_S).tokens == alone(ids_of(), max_tokens=3)
    assert failures == []


def test_a_storm(monkeypatch):
    storm(1, clients=3, requests=6, monkeypatch=monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_storms(seed, monkeypatch):
    storm(seed, clients=5, requests=25, monkeypatch=monkeypatch)
