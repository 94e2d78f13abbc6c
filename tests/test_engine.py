"""The engine's contract: whoever asks, joins or leaves, on any thread, every text is that of its solo run."""

import threading
import time

from engines import LONG, WITHIN_S, alone, engine_on, ids_of, pair_of, sampled
from mlx_mtp import Engine
from mlx_mtp.events import Accepted, Done, Drafted, Parked, Progress, Token
from mlx_mtp.sampling import Sampling
from talks import golden_text


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
