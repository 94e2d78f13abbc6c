"""Races by a scripted clock, and what is judged from them."""

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import pytest

from kernel_pairs import quantised_pair
from mlx_mtp.kernels import families
from mlx_mtp.kernels.chains import chain_of, stock_of
from mlx_mtp.kernels.judge import is_clear, judge
from mlx_mtp.kernels.race import Time, race
from mlx_mtp.kernels.results import Outcome
from mlx_mtp.kernels.self_test import Checked
from mlx_mtp.kernels.specimens import describe, specimen
from self_test_cases import PLACE, RIGHT, SCALAR, UNEQUAL, WRONG, by_name, clustered, family, raced


class Clock:
    """Seconds that pass only while an arm runs; each arm's runs last as its list says, again and again."""

    def __init__(self, **lasting: list[float]):
        self.now, self.order = 0.0, ""
        self._lasting = lasting
        self._count = dict.fromkeys(lasting, 0)

    def __call__(self) -> float:
        return self.now

    def runs(self) -> dict[str, Callable[[], None]]:
        return {arm: lambda arm=arm: self._run(arm) for arm in self._lasting}

    def _run(self, arm: str) -> None:
        own = self._lasting[arm]
        self.now += own[self._count[arm] % len(own)]
        self._count[arm] += 1
        self.order += arm[0]


def test_arms_run_in_turn_and_medians_count():
    clock = Clock(stock=[9.0, 9.0, 2.0, 2.0, 50.0], ours=[1.0])
    times = race(clock.runs(), clock=clock, repeats=7)
    assert clock.order == "so" * 9
    assert times["ours"] == Time(1e6, 0.0)
    # after two warm-ups: 2 2 50 9 9 2 2
    assert times["stock"] == Time(2e6, 3.5)


def test_a_machine_that_grows_warm_slows_both_alike():
    warming = [1.0 + 0.1 * i for i in range(9)]
    clock = Clock(stock=[2 * t for t in warming], ours=warming)
    times = race(clock.runs(), clock=clock, repeats=7)
    assert times["stock"].median == 2 * times["ours"].median


def test_who_wins_is_used_and_who_loses_is_not():
    won = judge(SCALAR, raced(stock=[100, 150, 270], scalar=[100, 101, 120]))
    assert won.use and won.how == {}
    assert (
        won.reason
        == "right, and as fast as stock or faster: 1.00x at 1 row, 1.49x at 4 rows, 2.25x at 8 rows"
    )
    lost = judge(SCALAR, raced(stock=[100, 100, 100], scalar=[125, 125, 125]))
    assert not lost.use
    assert lost.reason == (
        "slower than stock: 0.80x at 1 row, 0.80x at 4 rows, 0.80x at 8 rows; "
        "equal bits for every number of rows cost 25% here"
    )
    slower_at_1 = judge(SCALAR, raced(stock=[100, 150, 270], scalar=[130, 130, 140]))
    assert slower_at_1.use and "0.77x at 1 row" in slower_at_1.reason


def test_with_exactness_wanted_a_slower_kernel_is_used_and_its_cost_is_said():
    race_lost = raced(stock=[100, 100, 100], scalar=[125, 125, 125])
    exact = judge(SCALAR, race_lost, exact=True)
    assert exact.use and "slower than stock" in exact.reason and "cost 25% here" in exact.reason
    assert not judge(WRONG, None, exact=True).use
    assert judge(SCALAR, None, exact=True).use and not judge(SCALAR, None).use


def test_a_tie_is_ours_and_noise_decides_nothing():
    tie = raced(stock=[100, 100, 100], scalar=[102, 102, 102])
    assert judge(SCALAR, tie).use
    noisy = replace(
        tie,
        times={rows: {arm: Time(t.median, 0.4) for arm, t in own.items()} for rows, own in tie.times.items()},
    )
    assert not is_clear(noisy) and not Outcome(PLACE, SCALAR, noisy).is_settled
    verdict = judge(SCALAR, noisy)
    assert not verdict.use and verdict.reason == "right; no clear race yet: times scatter by 40%"
    assert Outcome(PLACE, SCALAR, tie).is_settled and Outcome(PLACE, WRONG).is_settled
    assert not Outcome(PLACE, SCALAR).is_settled


def test_what_failed_is_stock_whatever_its_times():
    verdict = judge(WRONG, None)
    assert not verdict.use and verdict.reason == "failed: 1 row: 3 of 9 values are wrong"


@pytest.mark.parametrize(
    "tested, scalar, matrix, body",
    [
        (RIGHT, [90, 150, 250], [160, 100, 100], 4),  # from 4 rows on
        (RIGHT, [90, 95, 250], [160, 100, 100], 8),
        (RIGHT, [90, 95, 99], [160, 100, 100], "scalar"),
        (RIGHT, [90, 95, 99], [80, 80, 80], 1),
        (UNEQUAL, [90, 150, 250], [160, 100, 100], "matrix"),  # one of them for every number of rows
        (UNEQUAL, [90, 95, 99], [160, 100, 100], "scalar"),
        (Checked(("matrix",), "right"), [1, 1, 1], [160, 100, 100], "matrix"),
    ],
)
def test_bodies_are_mixed_only_where_their_bits_are_equal(tested, scalar, matrix, body):
    own = {"scalar": scalar, "matrix": matrix}
    times = raced(stock=[400, 400, 400], **{name: own[name] for name in tested.bodies})
    verdict = judge(tested, times)
    assert verdict.use and verdict.how == {"body": body}


@pytest.mark.parametrize("rows", [1, 5])
def test_a_number_of_rows_chooses_the_body(metal, rows):
    weight = specimen(describe(by_name(quantised_pair("31b"))["project"][1]), seed=3, columns=64).weight
    x = mx.random.normal((rows, weight.shape[1]), key=mx.random.key(1))
    kernel = families.QMM.kernel
    assert mx.array_equal(kernel(weight, x, body=4), kernel(weight, x))
    assert metal.launches[0].kernel == ("verify_qmm_matrix" if rows >= 4 else "verify_qmm_scalar")


@pytest.mark.parametrize(
    "name", ["project", "experts", "attend", "attend_tiled", "head_choose", "centroid_choose"]
)
def test_both_arms_compute_the_same(metal, monkeypatch, name):
    """Chains of ours and of stock operations: near each other after every link."""
    monkeypatch.setattr("mlx_mtp.kernels.chains.LINKS", 2)
    monkeypatch.setattr("mlx_mtp.kernels.chains.LONG_LINKS", 2)
    monkeypatch.setattr("mlx_mtp.kernels.chains.MOST_COPIES", 2)
    monkeypatch.setattr("mlx_mtp.kernels.chains.CONTEXT", 300)
    pair = quantised_pair("a4b")
    description = (
        {**clustered(), "dtype": "float32"} if name == "centroid_choose" else describe(by_name(pair)[name][1])
    )
    chain = chain_of(name, description, 3)
    subject = specimen(description, seed=1)
    ours, stock = chain(family(name, subject).kernel), chain(stock_of(name))
    off = float(mx.abs(ours - stock).max()) / float(mx.abs(stock).max())
    assert ours.shape == stock.shape and off < 1e-3, off
    assert metal.launches
