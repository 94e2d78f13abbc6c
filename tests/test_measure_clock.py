"""The clock of the bench: planted faults in the measuring itself are seen."""

import time

import mlx.core as mx
import pytest

from bench_runs import Scripted, lazy_work
from mlx_mtp.measure.clock import Played, Prompt, settle, timed

GROUP = [Prompt([2, 3, 4], 0, 6)]


class Lazy(Scripted):
    """Hands over its tokens at once, and K/V that were only described."""

    def play(self, group, watch):
        played = super().play(group, watch)
        return Played(played.texts, played.stats, [lazy_work()])


class Unread(Scripted):
    """Hands over tokens that nobody has read from the device."""

    def play(self, group, watch):
        played = super().play(group, watch)
        return Played([list(mx.array(played.texts[0]))], played.stats, ())


def seconds_of_the_work() -> float:
    started = time.perf_counter()
    mx.eval(lazy_work())
    return time.perf_counter() - started


def test_work_that_was_only_described_is_computed_before_the_clock_stops():
    seconds_of_the_work()
    work = min(seconds_of_the_work() for _ in range(3))
    lazy = timed(Lazy("plain"), GROUP)
    assert lazy.faults == ()
    assert lazy.decode_s > 0.5 * work, "the player itself takes no time on this clock"


def test_a_clock_that_does_not_wait_is_caught():
    """The clock itself broken: it stops without computing anything."""
    [fault] = timed(Lazy("plain"), GROUP, settle=lambda kept: None).faults
    assert fault.startswith("late: ") and "ms of work were left" in fault
    assert timed(Lazy("plain"), GROUP, settle=settle).faults == ()


def test_tokens_that_were_not_read_are_caught():
    [fault] = timed(Unread("plain"), GROUP).faults
    assert fault.startswith("lazy: ")


@pytest.mark.parametrize("count", [5, 7])
def test_an_arm_with_fewer_or_more_tokens_is_caught(count):
    [fault] = timed(Scripted("k=2", text=tuple(range(5, 5 + count))), GROUP).faults
    assert fault == f"tokens: {count} were written where 6 were asked for"


def test_an_arm_that_hands_over_more_than_was_timed_is_caught():
    class Padded(Scripted):
        def play(self, group, watch):
            played = super().play(group, watch)
            return Played([played.texts[0] + [1]], played.stats, ())

    [fault] = timed(Padded("k=2", text=(5, 6, 7, 8, 9)), GROUP).faults
    assert "others were timed" in fault


def test_prefill_ends_with_the_first_tokens_and_gaps_follow_the_bursts():
    class Bursts:
        name = "k=2"

        def play(self, group, watch):
            for burst, seconds in ((1, 0.03), (3, 0.01), (2, 0.02)):
                time.sleep(seconds)
                watch.arrived(burst)
            return Played([[5, 6, 7, 8, 9, 10]], [], ())

    seen = timed(Bursts(), GROUP)
    assert seen.faults == ()
    assert 0.03 <= seen.prefill_s < 0.05
    assert 0.03 <= seen.decode_s < 0.06
    assert seen.tokens == 5
    assert len(seen.round_s) == 2
    assert seen.round_s[0] >= 0.01 and seen.round_s[1] >= 0.02
    assert [gap > 0 for gap in seen.gap_s] == [True, False, False, True, False]
    assert sum(seen.gap_s) == pytest.approx(seen.decode_s)
