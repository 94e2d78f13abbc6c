"""Numbers of drafts: what is refused, when drafting is parked and taken up again, and that no choice changes a text."""

import functools
import random
import re
from collections.abc import Callable
from itertools import pairwise

import pytest

from mlx_mtp import generate
from mlx_mtp.conversation import Conversation
from mlx_mtp.errors import ParameterError
from mlx_mtp.exactness_tax import Tax
from mlx_mtp.policy import MIN_GAIN, AutoPolicy, FixedPolicy, Plan, Policy, make_policy
from mlx_mtp.probing import SECOND_EVERY, Probing
from mlx_mtp.round_times import START, RoundTimes
from mlx_mtp.sampling import Sampling
from mlx_mtp.state import MAX_DRAFT_TOKENS
from pairs import VARIANTS, golden_pair
from talks import check_rows, golden_rows, golden_text

pair_of = functools.cache(golden_pair)


@pytest.mark.parametrize("number", [100, 16, -1, True, False, 2.0, "fast", "4", "", None, [3]])
def test_what_is_no_number_of_drafts_is_refused(number):
    with pytest.raises(ParameterError, match=r'"auto" or 0 \.\. 15.*use "auto"'):
        make_policy(number, has_drafter=True)
    with pytest.raises(ParameterError, match=r'"auto" or 0 \.\. 15'):
        generate(pair_of("e2b"), [1, 2, 3], num_draft_tokens=number)


def test_refused_in_a_conversation_that_has_used_its_equal():
    """True == 1 for a dictionary of policies."""
    conversation = Conversation(pair_of("e2b"))
    conversation.generate([1, 2, 3], max_tokens=2, num_draft_tokens=1)
    for number in (True, 1.0):
        with pytest.raises(ParameterError, match="num_draft_tokens"):
            conversation.stream([1, 2, 3], num_draft_tokens=number)


@pytest.mark.parametrize("k", [0, 1, MAX_DRAFT_TOKENS])
def test_a_fixed_number(k):
    policy = make_policy(k, has_drafter=True)
    assert isinstance(policy, FixedPolicy)
    assert policy.plan(0) == Plan(0, k) and policy.plan(k) == Plan(k, k)
    assert not policy.parked and policy.reason is None


def test_without_a_drafter():
    assert make_policy(0, has_drafter=False).plan(0) == Plan(0, 0)
    auto = make_policy("auto", has_drafter=False)
    assert auto.plan(0) == Plan(0, 0) and auto.parked and "no drafter" in str(auto.reason)
    with pytest.raises(ParameterError, match="without a drafter"):
        make_policy(3, has_drafter=False)


def play(
    policy: Policy,
    rounds: int,
    *,
    right: float,
    seconds: Callable[[int], float],
    seed: int = 1,
    clock: Callable[[int, float], float] = lambda index, time: time,
) -> list[int]:
    """The driver's schedule without a model: each draft is right with a fixed chance; -> drafts verified per round."""
    rng, verified = random.Random(seed), []
    running = policy.plan(policy.plan(0).draft)
    for index in range(rounds):
        ahead = policy.plan(running.draft)  # described before the running round is known
        agreed = next((i for i in range(running.verify) if rng.random() >= right), running.verify)
        policy.observe(running.verify, [agreed], clock(index, seconds(running.verify)))
        verified.append(running.verify)
        running = ahead
    return verified


def linear(k: int) -> float:
    """Verification costs as much as it has rows, as with a reference BLAS."""
    return 0.01 * (1 + k)


def cheap(k: int) -> float:
    return 0.01 * (1 + 0.1 * k)


def mean(numbers: list[int]) -> float:
    return sum(numbers) / len(numbers)


@pytest.mark.parametrize("seconds, right", [(linear, 0.0), (linear, 0.7), (cheap, 0.0)])
def test_parks_what_does_not_pay(seconds, right):
    policy = AutoPolicy()
    verified = play(policy, 400, right=right, seconds=seconds)
    assert policy.parked
    assert re.fullmatch(r"parked: break-even \d\.\d tokens a round, this text gives \d\.\d.*", policy.reason)
    later = verified[100:]
    spent = sum(seconds(k) for k in later) / (seconds(0) * len(later))
    assert spent < 1.05  # looking again now and then is all that drafting costs


def test_a_gain_too_small_to_draft_for_is_explained():
    """6.9 tokens a round at a break-even of 6.7 would look like a mistake."""
    policy = AutoPolicy()
    play(policy, 400, right=1.0, seconds=lambda k: 0.01 * (1 + 0.95 * k))
    assert policy.parked and "less than the 1.05x from which drafts are made" in str(policy.reason)
    policy = AutoPolicy()
    play(policy, 400, right=0.0, seconds=linear)
    assert policy.parked and "less than" not in str(policy.reason)


def test_a_parked_text_that_seems_to_pay_again_says_what_it_waits_for(monkeypatch):
    policy = AutoPolicy()
    play(policy, 400, right=0.0, seconds=cheap)
    assert policy.parked and "look" not in str(policy.reason)
    monkeypatch.setattr(policy, "expected_tokens", lambda k: 1.0 + k)
    policy.observe(0, [0], cheap(0))
    assert policy.parked and "to be seen in a look" in str(policy.reason)
    assert "less than" not in str(policy.reason)


def test_drafts_what_pays():
    policy = AutoPolicy()
    verified = play(policy, 200, right=0.95, seconds=cheap)
    assert not policy.parked and policy.reason is None
    assert mean(verified[20:]) > 5


def test_a_number_far_beyond_those_that_were_timed_is_not_played():
    """What it takes is a guess, and ten plain rounds are lost before the first time of it is known."""
    verified = [k for k in play(AutoPolicy(), 200, right=1.0, seconds=cheap) if k]
    assert max(verified) == 8
    for i, k in enumerate(verified):
        assert k <= 3 * max(verified[:i], default=1), verified[: i + 1]


def test_a_slow_moment_puts_no_number_out_of_play():
    """Eight drafts were timed only when the machine was slow: without another look they were never made again."""
    times = RoundTimes()
    for _ in range(20):
        for k in (0, 2, 3):
            times.observe(k, cheap(k))
    for _ in range(3):
        times.observe(8, 4 * cheap(8))
    assert times.ratio(8) > 2.5 * cheap(8) / cheap(0)
    policy = AutoPolicy(times)
    verified = play(policy, 600, right=0.97, seconds=cheap)
    assert 8 in verified and times.ratio(8) < 1.2 * cheap(8) / cheap(0)
    assert mean(verified[500:]) > 6


def test_second_looks_come_seldom_and_are_paid_for():
    times = RoundTimes()
    looks = []
    for number in range(1000):
        if number % 50 == 0:
            probing = Probing(times)  # another text
        probing.observe(0.0, 0.0, is_try=False)
        if probing.is_second_look_due() and probing.looks_again(1.0):
            looks.append(number)
    assert len(looks) == int(START) and {after - before for before, after in pairwise(looks)} == {
        SECOND_EVERY
    }
    assert 0 <= times.allowance < 1


def test_takes_up_drafting_when_acceptance_returns():
    """A parked policy looks again: its probe's drafts are verified, not thrown away."""
    policy = AutoPolicy()
    play(policy, 150, right=0.0, seconds=cheap)
    assert policy.parked
    verified = play(policy, 500, right=0.95, seconds=cheap, seed=2)
    assert not policy.parked and policy.reason is None
    assert mean(verified[400:]) > 3


@pytest.mark.parametrize("jump", [1000.0, 0.0, -5.0])
@pytest.mark.parametrize("at", [*range(9), 30])
def test_a_jumping_clock_changes_little(at, jump):
    """A sleep in mid-round, or a clock set back, must not decide what is played from then on."""

    def clock(index: int, time: float) -> float:
        return jump if index == at else time

    pays = AutoPolicy()
    assert mean(play(pays, 120, right=0.95, seconds=cheap, clock=clock)[60:]) > 3 and not pays.parked
    wasteful = AutoPolicy()
    assert mean(play(wasteful, 120, right=0.1, seconds=linear, clock=clock)[60:]) < 0.2 and wasteful.parked


def test_rounds_without_a_time_are_no_evidence_of_speed():
    policy = AutoPolicy()
    running = policy.plan(0)
    for _ in range(30):
        policy.observe(running.verify, [running.verify], None, drafted=running.draft)
        running = policy.plan(running.draft)
    assert not policy.times.is_known() and policy.times.plain_seconds() is None


@pytest.mark.parametrize("gain, parked", [(0.9, True), (MIN_GAIN - 0.02, True), (1.3, False)])
def test_the_gain_that_is_asked_for(gain, parked):
    policy = AutoPolicy()
    play(policy, 600, right=1.0, seconds=lambda k: 0.01 * (1 + k) / (gain if k else 1.0))
    assert policy.parked is parked


def test_the_tax_that_was_measured_reaches_the_policy(monkeypatch):
    """And the next run, with the times that are kept."""
    pair = pair_of("e2b")
    monkeypatch.setattr(pair.rounds, "tax", None)
    monkeypatch.setattr(pair.rounds, "times", RoundTimes())
    monkeypatch.setattr("mlx_mtp.pair.measure_tax", lambda *_, **__: Tax(1.3, "as told"))
    pair.exactness_tax()
    policy = make_policy("auto", has_drafter=True, times=pair.rounds.times)
    assert policy.plain_tax == 1.3
    assert pair.rounds.times.to_json()["plain_tax"] == 1.3


class AnyNumber:
    """Another number of drafts every round, of which any part is verified."""

    parked = False
    reason = None

    def __init__(self, seed: int):
        self._rng = random.Random(seed)
        self.plans: list[tuple[int, Plan]] = []

    def plan(self, pending: int) -> Plan:
        plan = Plan(self._rng.randint(0, pending), self._rng.randint(0, 9))
        self.plans.append((pending, plan))
        return plan

    def observe(self, verified: int, accepted: list[int], seconds: float | None, **_: object) -> None:
        assert all(0 <= n <= verified for n in accepted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_drafts_gives_the_golden_text(variant):
    ids, text = golden_text(variant, "long")
    conversation, policy = Conversation(pair_of(variant)), AnyNumber(seed=7)
    conversation._policies["auto"] = policy
    out = conversation.generate(ids, max_tokens=48)
    assert out.tokens == text
    assert any(0 < plan.verify < pending for pending, plan in policy.plans), "no prefix was verified"
    check_rows(conversation, golden_rows(variant, "long"))


@pytest.mark.parametrize(
    "sampling", [Sampling(seed=4), Sampling(temperature=0.8, top_k=20, repetition_penalty=1.2, seed=5)]
)
def test_any_number_of_drafts_gives_the_seeded_text(sampling):
    ids, _ = golden_text("31b", "long")
    plain = generate(pair_of("31b"), ids, max_tokens=30, sampling=sampling, num_draft_tokens=0)
    for seed in (1, 2):
        conversation = Conversation(pair_of("31b"))
        conversation._policies["auto"] = AnyNumber(seed)
        assert conversation.generate(ids, max_tokens=30, sampling=sampling).tokens == plain.tokens


def test_auto_gives_the_golden_text():
    ids, text = golden_text("e2b", "long")
    out = generate(pair_of("e2b"), ids, max_tokens=48)
    assert out.tokens == text
    assert len(set(out.stats.num_draft_tokens)) > 1
