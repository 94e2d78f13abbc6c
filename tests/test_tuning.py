"""What times of rounds mean, and how they are found: break-even, choices, calibration that clocks cannot poison."""

import itertools
import re

import pytest

import mlx_mtp.timed_rounds
from mlx_mtp.calibration import ROUNDS, Calibration, calibrate, is_calibrated
from mlx_mtp.cli.bars import Bar, bars
from mlx_mtp.cli.idle_calibration import IdleCalibration
from mlx_mtp.cost import CostModel
from mlx_mtp.errors import MemoryRefusal
from mlx_mtp.pair import Pair
from mlx_mtp.policy import MIN_GAIN
from mlx_mtp.round_times import RoundTimes
from mlx_mtp.tuning import choices_of, curve_of, expected_tokens, share_needed, widths_of
from pairs import golden_pair

PLAIN = 0.02


def times_of(ratios: dict[int, float], prior: CostModel | None = None) -> RoundTimes:
    times = RoundTimes(prior)
    for k, ratio in {0: 1.0, **ratios}.items():
        for _ in range(4):
            times.observe(k, PLAIN * ratio)
    return times


@pytest.fixture
def pair() -> Pair:
    return golden_pair("31b")


def test_a_round_breaks_even_at_the_tokens_that_its_time_gives_plain_decoding() -> None:
    curve = {point.drafts: point for point in curve_of(times_of({2: 1.5, 4: 6.0}))}
    assert curve[2].break_even == pytest.approx(1.5, rel=1e-3)
    assert curve[2].seconds == pytest.approx(1.5 * PLAIN, rel=1e-3)
    assert expected_tokens(curve[2].pays_from)(2) == pytest.approx(curve[2].break_even)
    assert curve[4].pays_from is None  # six rounds' time for at most five tokens
    assert [curve[k].known for k in (0, 1, 2, 3, 4, 6)] == [
        "timed",
        "between",
        "timed",
        "between",
        "timed",
        "expected",
    ]
    assert share_needed(1, 1.25) == pytest.approx(0.25) and share_needed(0, 1.0) is None


def test_the_choice_is_the_best_there_is_or_none() -> None:
    times = times_of({1: 1.2, 2: 1.4, 4: 1.8, 8: 2.6})
    choices = choices_of(times)
    for choice in choices:
        gains = {k: expected_tokens(choice.acceptance)(k) / times.ratio(k) for k in range(9)}
        best = max(gains.values())
        assert choice.gain == pytest.approx(best if best >= MIN_GAIN else 1.0)
    assert [choice.drafts for choice in choices] == sorted(choice.drafts for choice in choices)
    assert choices[0].drafts <= 1 and choices[-1].drafts == 8
    assert {choice.drafts for choice in choices_of(times_of({1: 2.0, 2: 3.0, 4: 5.0, 8: 9.0}))} == {0}


def test_a_gain_that_is_too_small_or_only_over_taxed_rounds_is_none() -> None:
    drafts = {choice.acceptance: choice.drafts for choice in choices_of(times_of({1: 1.5 / 1.02, 2: 3.0}))}
    assert drafts[0.5] == 0 and drafts[0.6] == 1
    times = times_of({1: 1.2, 2: 1.9})
    times.plain_tax = 1.5
    taxed = {choice.acceptance: choice for choice in choices_of(times)}
    assert taxed[0.8].drafts == 0 and taxed[0.8].gain == pytest.approx(1 / 1.5, rel=1e-3)
    assert taxed[0.95].gain == pytest.approx(1.95 / 1.8, rel=1e-3)
    assert curve_of(times)[1].break_even == pytest.approx(1.8, rel=1e-3)


def test_widths_need_to_know_how_long_a_round_takes() -> None:
    assert widths_of(RoundTimes()) == []
    kept = RoundTimes()
    kept.learn(times_of({2: 1.5}).to_json())
    for own, other in zip(widths_of(kept), widths_of(times_of({2: 1.5})), strict=True):
        assert (own.goal, own.acceptance) == (other.goal, other.acceptance)
        assert own.choice.width == other.choice.width
        assert own.choice.num_draft_tokens == other.choice.num_draft_tokens
        assert own.choice.tokens_per_second == pytest.approx(other.choice.tokens_per_second, rel=1e-3)
    for times in (times_of({2: 1.5}), RoundTimes(CostModel(0.001, 0.02, 0.001, draft_s=0.001))):
        found = widths_of(times)
        assert {(own.goal, own.acceptance) for own in found} == set(
            itertools.product(("throughput", "latency"), (0.5, 0.7, 0.9))
        )
        assert all(1 <= own.choice.width <= 8 and own.choice.tokens_per_second > 1 for own in found)


class Clock:
    """Of rounds: 1 ms for each row, but a jump where it is asked for."""

    def __init__(self, jumps: dict[int, float]):
        self.now, self.calls, self.jumps = 100.0, 0, jumps

    def perf_counter(self) -> float:
        self.calls += 1
        if self.calls % 2 == 0:  # a round ends
            drafts = (0, 1, 2, 4, 8)[(self.calls // 2 - 1) // 4]
            self.now += 0.001 * (drafts + 1) + self.jumps.get(self.calls // 2, 0.0)
        return self.now


@pytest.mark.parametrize("jumps", [{}, {2: 7200.0, 8: 3600.0, 12: -50.0, 19: 1e6}, {3: -1e9}])
def test_a_clock_that_jumps_changes_no_time(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, jumps: dict[int, float]
) -> None:
    """Forwards, as after sleep, or backwards: once of the three rounds of a kind that are timed."""
    monkeypatch.setattr(mlx_mtp.timed_rounds, "time", Clock(jumps))
    times = calibrate(pair)
    assert times.plain_seconds() == pytest.approx(0.001, rel=0.01)
    assert [times.ratio(k) for k in (1, 2, 4, 8)] == pytest.approx([2, 3, 5, 9], rel=0.01)
    assert is_calibrated(times)


def test_a_clock_that_never_tells_the_time_teaches_nothing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlx_mtp.timed_rounds, "time", Clock(dict.fromkeys(range(21), -5.0)))
    times = calibrate(pair)
    assert not times.is_known() and times.plain_seconds() is None and not is_calibrated(times)


def test_a_calibration_goes_on_where_it_stopped(pair: Pair) -> None:
    calibration = Calibration(pair, RoundTimes())
    for _ in range(7):
        calibration.step()
    assert calibration.progress.done == 7 and "with 1 drafts" in calibration.progress.message
    assert not calibration.is_over and not pair.rounds.times.is_known()
    while not calibration.is_over:
        calibration.step()
    assert calibration.played == ROUNDS == 20 and is_calibrated(calibration.times)


def test_a_chat_times_rounds_only_while_nobody_types(pair: Pair) -> None:
    typing = iter([False, False, False, True])
    idle = IdleCalibration(pair, is_typing=lambda: next(typing, False))
    idle.play()
    assert not idle.is_over and not is_calibrated(pair.rounds.times)
    idle.play()
    assert idle.is_over and is_calibrated(pair.rounds.times)
    assert IdleCalibration(pair, is_typing=lambda: False).is_over  # nothing is left to time


def test_a_chat_stops_timing_when_its_seconds_are_over_or_memory_is_short(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(0.0, 2.0)
    idle = IdleCalibration(pair, is_typing=lambda: False, clock=lambda: next(ticks))
    idle.play()  # two rounds in five seconds
    assert not idle.is_over and pair.rounds.times.timed(0) < 3

    def refuse(*words: object) -> None:
        raise MemoryRefusal("no room")

    monkeypatch.setattr("mlx_mtp.pressure.Guard.admit", refuse)
    other = IdleCalibration(pair, is_typing=lambda: False)
    other.play()
    assert other.is_over


def test_nobody_is_asked_to_wait_where_nobody_types_or_nothing_drafts() -> None:
    assert IdleCalibration(golden_pair("31b", drafter=None), is_typing=lambda: False).is_over


@pytest.mark.parametrize("columns", [20, 33, 40, 80, 120, 200, None])
@pytest.mark.parametrize("blocks", [True, False])
def test_bars_fit_and_keep_their_proportions(columns: int | None, blocks: bool) -> None:
    rows = [Bar("0", 1.0, "1.00", 1.0), Bar("4", 2.0, "2.00", 4.0), Bar("16", 4.0, "4.00", None)]
    lines = bars(rows, columns, blocks=blocks).split("\n")
    assert all(len(line) < (columns or 80) for line in lines)
    assert lines[2].startswith("16  ") and lines[2].endswith(" 4.00")
    full = [len(re.findall("[█#]", line)) for line in lines]
    assert full[2] == pytest.approx(2 * full[1], abs=3) and full[1] > full[0]
    assert [("│" in line or "|" in line) for line in lines] == [True, True, False]
    if not blocks:
        assert all(line.isascii() for line in lines)
