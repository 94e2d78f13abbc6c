"""Times of rounds, filtered: what a slow moment, a busy machine and single times do to what is believed."""

import random

import pytest

from mlx_mtp.time_filter import TimeFilter

PLAIN, RATIO = 0.02, 1.6


def filtered(expected: float = 1.3, spread: float = 0.4) -> TimeFilter:
    times = TimeFilter()
    times.add(3, expected, spread)
    return times


def test_drafts_alone_say_nothing_of_their_ratio_until_plain_rounds_are_seen() -> None:
    times = filtered()
    for _ in range(20):
        times.observe(3, RATIO * PLAIN)
    assert times.spread(3) > 0.3
    for _ in range(5):
        times.observe(0, PLAIN)
    assert times.ratio(3) == pytest.approx(RATIO, rel=0.02) and times.spread(3) < 0.1
    assert times.timed == {3: 20, 0: 5}


def test_noise_is_averaged_and_one_slow_round_moves_little() -> None:
    times, rng = filtered(), random.Random(1)
    for n in range(120):
        times.pass_rounds(1)
        k = 3 if n // 4 % 2 else 0
        times.observe(k, PLAIN * (RATIO if k else 1.0) * rng.lognormvariate(0, 0.1))
    assert times.ratio(3) == pytest.approx(RATIO, rel=0.05) and times.spread(3) < 0.05
    before = times.ratio(3)
    times.observe(3, 9 * PLAIN)
    assert times.ratio(3) == pytest.approx(before, rel=0.03)


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_machine_that_gets_slower_at_once_is_followed_and_no_number_is_blamed(drafts: int) -> None:
    """Whatever is played when it happens; rounds of the other kind follow later."""
    times = filtered()
    for n in range(40):
        times.pass_rounds(1)
        times.observe(3 if n % 2 else 0, PLAIN * (RATIO if n % 2 else 1.0))
    for kind in (drafts, 3 - drafts):
        for _ in range(8):
            times.pass_rounds(1)
            times.observe(kind, 2 * PLAIN * (RATIO if kind else 1.0))
    assert times.plain_seconds == pytest.approx(2 * PLAIN, rel=0.03)
    assert times.ratio(3) == pytest.approx(RATIO, rel=0.03)


def test_what_is_seldom_timed_is_unsure() -> None:
    times = filtered()
    times.add(5, 2.0, 0.4)
    for n in range(30):
        times.observe(3 if n % 2 else 0, PLAIN * (RATIO if n % 2 else 1.0))
    assert times.spread(5) == pytest.approx(0.4) and times.spread(3) < 0.05
    times.observe(5, 2.4 * PLAIN)
    assert times.spread(5) < 0.1 and times.ratio(5) == pytest.approx(2.4, rel=0.03)


def test_a_ratio_that_was_kept_and_is_wrong_is_outvoted() -> None:
    times = filtered(expected=1.1, spread=0.05)
    for n in range(24):
        times.pass_rounds(1)
        times.observe(3 if n // 3 % 2 else 0, PLAIN * (2.2 if n // 3 % 2 else 1.0))
    assert times.ratio(3) == pytest.approx(2.2, rel=0.1)


def test_a_level_that_is_forgotten_leaves_the_ratios() -> None:
    times = filtered()
    for n in range(20):
        times.observe(3 if n % 2 else 0, PLAIN * (RATIO if n % 2 else 1.0))
    times.forget_level()
    assert not times.timed
    times.observe(0, 40 * PLAIN)
    assert times.plain_seconds == pytest.approx(40 * PLAIN, rel=0.05) and times.ratio(3) == pytest.approx(
        RATIO, rel=0.02
    )


@pytest.mark.parametrize("alone", [False, True])
def test_any_times_at_all_leave_it_able_to_say_how_unsure_it_is(alone: bool) -> None:
    """Pauses, bursts and clocks that jump, for thousands of rounds; with one number of drafts only, too."""
    rng = random.Random(4)
    for _ in range(20):
        times = filtered()
        for drafts in (1, 5, 8):
            times.add(drafts, 1.5, 3.0)
        speed = 1.0
        for _ in range(1000):
            if rng.random() < 0.03:
                speed = 10 ** rng.uniform(-4, 4)
            drafts = 3 if alone else rng.choice((0, 1, 3, 5, 8))
            times.pass_rounds(rng.choice((1, 1, 1, 500)))
            times.observe(drafts, speed * rng.lognormvariate(0, 0.1))
            assert all(0 <= times.spread(k) < 40 and times.ratio(k) > 0 for k in (1, 3, 5, 8))
        assert times.plain_seconds > 0
