"""Requests, callbacks and rounds that go wrong in an engine: each harms itself alone."""

import pytest

import mlx_mtp.batch_slots
import mlx_mtp.round
import mlx_mtp.row_start
from engines import LONG, WITHIN_S, alone, engine_on, ids_of, pair_of
from mlx_mtp import BusyError, Engine, GenerationError, ParameterError, PromptError
from mlx_mtp.events import Progress, Token
from mlx_mtp.sampling import Sampling


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


def test_timeouts():
    with engine_on() as engine:
        handle = engine.submit(ids_of(), max_tokens=LONG)
        with pytest.raises(TimeoutError):
            handle.result(0.01)
        assert not handle.is_done
        handle.cancel()
        assert handle.result(WITHIN_S).finish_reason == "cancelled"


def test_a_queue_is_full_while_a_long_prompt_is_read_too():
    """Requests that were taken over together with the prompt still wait."""
    with engine_on(max_context=4096, max_batch=1, max_queue=2, wait=True) as engine:
        hold = engine.submit(ids_of(), max_tokens=LONG)
        next(hold_kept := iter(hold))
        reading = engine.submit(ids_of(count=60) * 60, max_tokens=5)  # 3600 tokens: eight chunks
        waiting = engine.submit(ids_of(), max_tokens=2)
        hold.cancel()
        for event in reading.events():
            if isinstance(event, Progress) and event.done:
                assert engine.status.waiting == 1
                more = engine.submit(ids_of(), max_tokens=2)
                with pytest.raises(BusyError, match="2 requests wait"):
                    engine.submit(ids_of(), max_tokens=2)
                break
        assert waiting.result(WITHIN_S).tokens and more.result(WITHIN_S).tokens
        del hold_kept


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
