"""Width and drafts chosen together, on made-up costs whose best is known by hand, and while a batch runs."""

import itertools

import pytest

from mlx_mtp.batch_choice import (
    KEPT,
    NEAR,
    START,
    Seconds,
    WidthChooser,
    check_goal,
    choose_batch,
    measured_seconds,
    widths_up_to,
)
from mlx_mtp.cost import CostModel
from mlx_mtp.errors import ParameterError
from mlx_mtp.round_times import RoundTimes


def tokens(chance: float):
    """Expected tokens of a round in which each draft is right with this chance."""
    return lambda k: sum(chance**i for i in range(k + 1))


def predicted_seconds(cost: CostModel, context: int = 0) -> Seconds:
    """What a cost model says of rounds, by width and drafts."""
    return lambda width, drafts: cost.seconds(drafts + 1, width, context, drafts)


def test_rows_that_cost_nothing_are_all_taken():
    free = predicted_seconds(CostModel(launch_s=0.0, weights_s=1.0, row_s=0.0))
    chosen = choose_batch(free, tokens(0.5), widths=range(1, 9))
    assert (chosen.width, chosen.num_draft_tokens) == (8, 8)


def test_rows_that_cost_a_pass_leave_one_row_and_no_drafts():
    linear = predicted_seconds(CostModel(launch_s=0.0, weights_s=1.0, row_s=1.0, draft_s=0.05))
    chosen = choose_batch(linear, tokens(0.9), widths=range(1, 9))
    assert (chosen.width, chosen.num_draft_tokens) == (1, 0)
    assert chosen.tokens_per_second == pytest.approx(1.0)


def test_a_wider_batch_plays_fewer_drafts():
    cost = predicted_seconds(CostModel(launch_s=0.0, weights_s=1.0, row_s=0.1, draft_s=0.03))
    drafts = [
        choose_batch(cost, tokens(0.7), widths=range(1, width + 1)).num_draft_tokens for width in (1, 8, 32)
    ]
    assert drafts == sorted(drafts, reverse=True) and drafts[0] >= 2 > drafts[-1]


@pytest.mark.parametrize(
    "row_s, experts, chance", list(itertools.product((0.01, 0.1, 0.4), (0, 128), (0.3, 0.8)))
)
def test_against_all_that_could_be_chosen(row_s, experts, chance):
    cost = CostModel(0.02, 1.0, row_s, 0.01 if experts else 0.0, 1e-5, 0.04, experts, 8)
    expected = tokens(chance)

    def rate(width: int, k: int) -> float:
        return width * expected(k) / cost.seconds(k + 1, width, 1000, k)

    rates = {(width, k): rate(width, k) for width in range(1, 17) for k in range(9)}
    fast = choose_batch(predicted_seconds(cost, 1000), expected, widths=range(1, 17))
    assert fast.tokens_per_second == pytest.approx(rates[fast.width, fast.num_draft_tokens])
    assert fast.tokens_per_second >= NEAR * max(rates.values())
    narrower = [own for (width, _), own in rates.items() if width < fast.width]
    assert not narrower or max(narrower) < NEAR * max(rates.values())
    quick = choose_batch(predicted_seconds(cost, 1000), expected, widths=range(1, 17), goal="latency")
    alone = max(rates[1, k] for k in range(9))
    assert quick.of_each >= KEPT * alone
    wider = [own / width for (width, _), own in rates.items() if width > quick.width]
    assert not wider or max(wider) < KEPT * alone


def observe(times: RoundTimes, cost: CostModel, width: int, drafts: tuple[int, ...] = (0, 2)) -> None:
    """As many rounds as make a time, of each number of drafts, as `cost` has them."""
    for k in drafts:
        for _ in range(6):
            times.observe(k, cost.seconds(k + 1, width, 0, k), drafted=k, batch=width)


def test_what_was_timed_replaces_the_prediction():
    """Timed at 1 and 4, on a line between them; beyond, the prior's growth from the nearest."""
    real = CostModel(0.0, 0.020, 0.001, draft_s=0.002)
    times = RoundTimes(CostModel(0.0, 1.0, 0.5, draft_s=0.05))
    for width in (1, 4):
        observe(times, real, width)
    seconds = measured_seconds(times)
    for width in (1, 2, 4):
        assert seconds(width, 0) == pytest.approx(real.seconds(1, width), rel=2e-3)
        assert seconds(width, 2) == pytest.approx(real.seconds(3, width, 0, 2), rel=0.15)
    assert seconds(8, 0) == pytest.approx(0.023 * (1 + 7 * 0.5) / (1 + 3 * 0.5), rel=2e-3)


def test_nothing_timed_is_the_prior():
    cost = CostModel(0.01, 1.0, 0.2, draft_s=0.05)
    assert measured_seconds(RoundTimes(cost))(4, 3) == pytest.approx(cost.seconds(4, 4, 0, 3))


def play(chooser: WidthChooser, times: RoundTimes, cost: CostModel, *, left: int, looks: int) -> list[int]:
    """Widths, one after each look, with rounds of the width that is chosen in between."""
    widths = [chooser.width]
    for _ in range(looks):
        observe(times, cost, chooser.width)
        widths.append(chooser.look(left))
    return widths


NEARLY_FREE = CostModel(0.0, 0.030, 0.0005, draft_s=0.002)
LINEAR = CostModel(0.0, 0.030, 0.030, draft_s=0.002)


def test_it_widens_while_that_pays():
    times = RoundTimes()
    chooser = WidthChooser(times, tokens(0.7), most=32)
    assert play(chooser, times, NEARLY_FREE, left=100, looks=4) == [4, 8, 16, 32, 32]


def test_a_wider_batch_that_does_not_pay_is_tried_once():
    times = RoundTimes()
    chooser = WidthChooser(times, tokens(0.7), most=32)
    assert play(chooser, times, LINEAR, left=100, looks=5) == [4, 8, 4, 4, 4, 4]


def test_no_wider_than_rows_are_left():
    times = RoundTimes()
    chooser = WidthChooser(times, tokens(0.7), most=32)
    assert play(chooser, times, NEARLY_FREE, left=7, looks=2) == [4, 4, 4]
    assert WidthChooser(RoundTimes(), tokens(0.7), most=3).width == 3


def test_latency_begins_with_one_and_keeps_each_reply_fast():
    times = RoundTimes()
    chooser = WidthChooser(times, tokens(0.7), most=32, goal="latency")
    widths = play(chooser, times, NEARLY_FREE, left=100, looks=8)
    assert widths[:3] == [1, 2, 4] and widths[-1] == widths[-2]
    kept = NEARLY_FREE.seconds(1, 1) / NEARLY_FREE.seconds(1, widths[-1])
    assert kept > 0.7 and widths[-1] >= 4
    chooser = WidthChooser(times := RoundTimes(), tokens(0.7), most=32, goal="latency")
    assert play(chooser, times, LINEAR, left=100, looks=3) == [1, 2, 1, 1]


def test_a_prediction_is_where_it_begins():
    """A machine of which something is published starts there, and is not tried where no gain is predicted."""
    free = RoundTimes(NEARLY_FREE)
    assert WidthChooser(free, tokens(0.7), most=16).width == 16
    times = RoundTimes(LINEAR)
    chooser = WidthChooser(times, tokens(0.7), most=16)
    assert play(chooser, times, LINEAR, left=100, looks=2) == [1, 1, 1]


def test_what_earlier_batches_took_is_where_the_next_begins():
    times = RoundTimes()
    play(WidthChooser(times, tokens(0.7), most=32), times, NEARLY_FREE, left=100, looks=4)
    assert WidthChooser(times, tokens(0.7), most=32).width == 32
    assert WidthChooser(times, tokens(0.7), most=8).width == 8


def test_a_width_of_which_too_little_was_timed_stays():
    times = RoundTimes()
    chooser = WidthChooser(times, tokens(0.7), most=32)
    times.observe(0, 0.03, drafted=0, batch=4)
    assert chooser.look(100) == START["throughput"]


def test_widths_and_goals():
    assert widths_up_to(8) == [1, 2, 4, 8] and widths_up_to(12) == [1, 2, 4, 8, 12] and widths_up_to(1) == [1]
    assert check_goal("latency") == "latency"
    with pytest.raises(ParameterError, match="throughput"):
        check_goal("speed")
