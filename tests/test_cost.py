"""What rounds cost: the model and its prior, times that are compared, pauses and jumps, rising curves, calibration."""

import json
import random
from pathlib import Path

import pytest

from mlx_mtp import load
from mlx_mtp.calibration import ROUNDS, calibrate
from mlx_mtp.chips import CHIPS, OTHERS, chip_of
from mlx_mtp.config_parse import parse_drafter_config, parse_target_config
from mlx_mtp.cost import UNKNOWN, CostModel, independent_experts, monotone, prior
from mlx_mtp.errors import ParameterError
from mlx_mtp.machine import Machine, read_machine
from mlx_mtp.published_configs import SIZES, published_drafter, published_target
from mlx_mtp.round_times import BELIEVED, RoundTimes

PLAIN = 0.02


def machine(name: str) -> Machine:
    return read_machine(Path(__file__).parent / "machines" / f"{name}.json")


def configs(size: str):
    target = parse_target_config(published_target(size), size)
    return target, parse_drafter_config(published_drafter(size), size)


def test_the_parts_add_up() -> None:
    model = CostModel(1.0, 10.0, 2.0, 0.5, 0.001, 0.25, experts=128, top_k=8)
    experts = 128 * (1 - (1 - 8 / 128) ** 6)
    expected = 1 + 10 + 2 * 5 + 0.5 * experts + 0.001 * 1000 * 2 + 0.25 * 2
    assert model.seconds(3, batch=2, context=1000, drafts=2) == pytest.approx(expected)
    assert model.seconds(3, distinct_experts=20) == pytest.approx(1 + 10 + 4 + 10)
    assert model.ratio(0) == 1.0


def test_independent_experts() -> None:
    """The second row wakes 8 experts, of which each was woken with chance 8 / 128."""
    assert independent_experts(1, 128, 8) == pytest.approx(8)
    assert independent_experts(2, 128, 8) == pytest.approx(8 + 8 * 120 / 128)
    assert independent_experts(4, 0, 0) == 0


@pytest.mark.parametrize("size", SIZES)
def test_priors_are_near_the_full_model_of_the_benches(size: str) -> None:
    """Rounds rise with drafts on every chip, MoE rows dearest, and a dense 31B step takes what bytes say."""
    target, drafter = configs(size)
    for chip in (*CHIPS, *OTHERS):
        for kernels in ("stock", "ours"):
            model = prior(target, drafter, chip, kernels=kernels)
            ratios = [model.ratio(k) for k in range(9)]
            assert ratios == sorted(ratios) and 1.0 < ratios[1] < 2.0
            if size == "31b":  # 17.3 GB at 4.5 bits, 0.86 of the bandwidth, and launches
                assert model.seconds(1) == pytest.approx(17.3 / (0.86 * chip.gb_per_s) + 0.0038, rel=0.05)
    slopes = {kind: prior(target, drafter, CHIPS[5], kernels=kind).ratio(3) for kind in ("stock", "ours")}
    assert slopes["ours"] < slopes["stock"]


def test_experts_make_rows_dear() -> None:
    dense, moe = (prior(*configs(size), CHIPS[5]).ratio(3) for size in ("31b", "26b-a4b"))
    assert moe > 1.15 * dense


def test_an_unknown_chip_promises_nothing() -> None:
    assert prior(*configs("e2b"), None) is UNKNOWN
    assert max((k + 1) / UNKNOWN.ratio(k) for k in range(1, 16)) < 1.1


def test_chips_by_the_name_that_the_system_gives() -> None:
    assert chip_of(machine("m4_pro_24")) is next(chip for chip in CHIPS if chip.name == "M4 Pro")
    assert chip_of(machine("m1_8")) is next(chip for chip in OTHERS if chip.name == "M1")
    assert chip_of(machine("linux_24")) is None


def test_monotone_is_the_nearest_rising_sequence() -> None:
    assert monotone([1, 3, 2, 4], [1, 1, 1, 1]) == [1, 2.5, 2.5, 4]
    assert monotone([3, 2, 1], [1, 1, 2]) == pytest.approx([1.75] * 3)
    rng = random.Random(4)
    for _ in range(50):
        values = [rng.random() for _ in range(6)]
        made = monotone(values, [1] * 6)
        assert made == sorted(made) and sum(made) == pytest.approx(sum(values))


SEEN = 0.01  # what was seen a few times outweighs what was expected before, but for so much


def see(times: RoundTimes, drafts: int, seconds: float, rounds: int = 4) -> None:
    for _ in range(rounds):
        times.observe(drafts, seconds)


def test_measured_on_the_line_between_and_beyond() -> None:
    """A prior that is wrong is replaced where rounds were timed, and scaled beyond."""
    times = RoundTimes(CostModel(0, 1.0, 0.5))
    assert times.ratio(2) == 2.0
    see(times, 0, PLAIN)
    see(times, 2, 1.2 * PLAIN)
    see(times, 6, 1.8 * PLAIN)
    assert [times.ratio(k) for k in (0, 1, 2, 4, 6)] == pytest.approx([1, 1.1, 1.2, 1.5, 1.8], rel=SEEN)
    assert times.ratio(8) == pytest.approx(1.8 + 2 * 0.5 * (0.6 / 2.0), rel=SEEN)
    assert times.measured() == (2, 6) and times.plain_seconds() == pytest.approx(PLAIN, rel=SEEN)


def test_more_drafts_never_take_less() -> None:
    times = RoundTimes()
    for _ in range(4):  # one time that is so far from the line is not believed
        see(times, 0, PLAIN)
        see(times, 4, 1.5 * PLAIN)
        see(times, 2, 1.9 * PLAIN)
    assert times.ratio(2) == pytest.approx(times.ratio(4)) and 1.5 < times.ratio(2) < 1.9


@pytest.mark.parametrize("late", [False, True])
def test_drafts_are_timed_with_the_round_they_are_for(late: bool) -> None:
    """A probe of one round, whether a round's time holds the drafts that it makes or those that it verifies."""
    times, verify, draft = RoundTimes(), 1.3, 0.4
    for _ in range(3):
        for verified, made in ((0, 0), (0, 0), (0, 2), (2, 0), (0, 0)):
            drafting = draft if (made if late else verified) else 0.0
            times.observe(verified, PLAIN * ((verify if verified else 1.0) + drafting), drafted=made)
    assert times.ratio(2) == pytest.approx(verify + draft, rel=SEEN)
    assert times.plain_seconds() == pytest.approx(PLAIN, rel=SEEN)


def test_a_machine_that_gets_busy_changes_no_comparison() -> None:
    times, rng, slow = RoundTimes(), random.Random(2), 1.0
    for _ in range(200):
        slow *= 1.005  # 2.7x in the end
        k = rng.choice((0, 4))
        times.observe(k, PLAIN * slow * (1.5 if k else 1.0))
    assert times.ratio(4) == pytest.approx(1.5, rel=0.05)


@pytest.mark.parametrize("wrong", [7200.0, 1e-7, 0.0, -3.0, float("nan"), float("inf")])
@pytest.mark.parametrize("at", [3, 5, 8, 13, 20])
def test_a_pause_or_a_jump_poisons_nothing(wrong: float, at: int) -> None:
    times = RoundTimes()
    for index in range(24):
        k = 2 if index // 4 % 2 else 0
        times.observe(k, wrong if index == at else PLAIN * (1.4 if k else 1.0))
    assert times.ratio(2) == pytest.approx(1.4, rel=SEEN)
    assert times.plain_seconds() == pytest.approx(PLAIN, rel=SEEN)


def test_what_stays_slow_is_believed() -> None:
    times = RoundTimes()
    see(times, 0, PLAIN, 10)
    see(times, 0, 30 * PLAIN, BELIEVED + 1)
    assert times.plain_seconds() == pytest.approx(30 * PLAIN, rel=SEEN)


def test_rounds_that_compiled_teach_nothing() -> None:
    times = RoundTimes()
    for k in (0, 0, 2, 2, 4, 4):
        times.observe(k, None)
    assert not times.is_known() and times.plain_seconds() is None


def test_widths_are_kept_apart_and_a_new_one_starts_from_the_nearest() -> None:
    times = RoundTimes(CostModel(0, 1.0, 0.1))
    see(times, 0, PLAIN)
    see(times, 2, 1.4 * PLAIN)
    assert times.ratio(2, batch=4) > 1 + 1.5 * (
        times.prior.ratio(2, 4) - 1
    )  # twice as dear as expected here too
    for k, seconds in ((0, 2 * PLAIN), (2, 6 * PLAIN)):
        for _ in range(4):
            times.observe(k, seconds, batch=4)
    assert times.ratio(2, batch=4) == pytest.approx(3.0, rel=SEEN)
    assert times.ratio(2) == pytest.approx(1.4, rel=SEEN)


def test_kept_and_learned_again() -> None:
    times = RoundTimes()
    see(times, 0, PLAIN)
    see(times, 4, 1.5 * PLAIN)
    times.observe(4, None, distinct=24.0)
    kept = json.loads(json.dumps(times.to_json()))
    other = RoundTimes()
    other.learn(kept)
    assert (
        other.ratio(4) == pytest.approx(times.ratio(4)) and other.is_known() and other.distinct == {5: 24.0}
    )
    see(other, 0, PLAIN, 10)
    see(other, 4, 2.5 * PLAIN, 9)  # what is measured now outvotes it
    see(other, 0, PLAIN, 2)  # the machine is not slower: such rounds are
    assert other.ratio(4) == pytest.approx(2.5, rel=0.05)


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {"widths": 3, "distinct_experts": {}, "plain_tax": None},
        {
            "widths": {"1": {"plain_seconds": 0.02, "ratios": {"99": 1.5}}},
            "distinct_experts": {},
            "plain_tax": None,
        },
        {
            "widths": {"1": {"plain_seconds": 0.02, "ratios": {"2": -1}}},
            "distinct_experts": {},
            "plain_tax": None,
        },
        {
            "widths": {"1": {"plain_seconds": 0.02, "ratios": {"2": True}}},
            "distinct_experts": {},
            "plain_tax": None,
        },
        {
            "widths": {"x": {"plain_seconds": None, "ratios": {"2": 1.5}}},
            "distinct_experts": {},
            "plain_tax": None,
        },
        {"widths": {"1": {}}, "distinct_experts": {}, "plain_tax": None},
        {"widths": {}, "distinct_experts": {}, "plain_tax": "high"},
    ],
)
def test_damaged_times_are_refused_whole(damage: dict) -> None:
    times = RoundTimes()
    with pytest.raises(ValueError):
        times.learn(damage)
    assert not times.is_known() and times.to_json() == RoundTimes().to_json()


def test_calibration_plays_at_most_twenty_rounds() -> None:
    pair, seen = load("demo"), []
    pair.rounds.compiled = False
    times = calibrate(pair, seen.append)
    assert times is pair.rounds.times and times.measured() == (1, 2, 4, 8) and times.plain_seconds() > 0
    assert len(seen) == ROUNDS + 1 == 21 and seen[-1].done == seen[-1].total == ROUNDS
    assert {report.stage for report in seen} == {"calibrate"}
    ratios = [times.ratio(k) for k in range(9)]
    assert ratios == sorted(ratios)
    with pytest.raises(ParameterError, match="without a drafter; load it with its assistant"):
        calibrate(load("demo", drafter=None))


def test_a_pause_in_the_first_round_of_a_kind_is_no_time_of_it() -> None:
    times = RoundTimes()
    see(times, 0, PLAIN)
    times.observe(2, 7200.0)
    assert not times.is_known()
    times.observe(2, 1.4 * PLAIN)
    assert times.ratio(2) == pytest.approx(1.4, rel=SEEN)
