"""The law of the text: whatever the drafts, tokens follow the target's own distribution under the settings (T4).

The first tokens alone cannot show a wrong bonus token, so every token up to the (K+4)th is tested given the one before.
"""

import itertools

import numpy as np
import pytest

from markov_pair import MarkovPair, decode_streams, markov_pair
from mlx_mtp.sampling import Sampling
from sampling_law import law_report

PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}
TEMPERATURES, TOP_KS, TOP_PS, MIN_PS = (0.5, 0.8, 1.0, 1.5), (0, 6), (1.0, 0.8), (0.0, 0.1)


def setting_of(temperature: float, top_k: int, top_p: float, min_p: float, penalties: bool) -> Sampling:
    return Sampling(temperature, top_k, top_p, min_p, **(PENALTIES if penalties else {}))


# Every value of every axis, every K, and the axes in pairs as far as eleven runs reach.
SPREAD = [
    (1, setting_of(1.0, 0, 1.0, 0.0, False)),
    (2, setting_of(0.8, 6, 1.0, 0.0, False)),
    (3, setting_of(0.8, 6, 0.8, 0.0, False)),
    (4, setting_of(1.5, 0, 0.8, 0.0, False)),
    (5, setting_of(1.0, 0, 1.0, 0.0, False)),
    (1, setting_of(0.5, 0, 1.0, 0.1, True)),
    (2, setting_of(1.5, 6, 0.8, 0.1, True)),
    (3, setting_of(1.0, 0, 1.0, 0.0, True)),
    (4, setting_of(0.8, 0, 0.8, 0.1, False)),
    (5, setting_of(1.5, 6, 1.0, 0.1, True)),
    (3, setting_of(0.5, 6, 0.8, 0.0, True)),
]
EVERY = [
    (k, setting_of(*values))
    for values in itertools.product(TEMPERATURES, TOP_KS, TOP_PS, MIN_PS, (False, True))
    for k in range(1, 6)
]


def name_of(case: object) -> str:
    if isinstance(case, int):
        return f"K{case}"
    assert isinstance(case, Sampling)
    penalties = "penalties" if case.penalises else "plain"
    return f"T={case.temperature} top_k={case.top_k} top_p={case.top_p} min_p={case.min_p} {penalties}"


@pytest.fixture(scope="module")
def pair() -> MarkovPair:
    return markov_pair()


def check(pair: MarkovPair, k: int, setting: Sampling, *, first_seed: int, streams: int, batch: int) -> None:
    tokens, drafted, accepted = [], 0, 0
    for low in range(first_seed, first_seed + streams, batch):
        got = decode_streams(pair, setting, k=k, seeds=range(low, low + batch), length=k + 4)
        tokens.append(got.tokens)
        drafted, accepted = drafted + got.drafted, accepted + got.accepted
    report = law_report(np.concatenate(tokens), pair.logits, setting)
    assert report.holds, report
    assert 0.2 < accepted / drafted < 0.95, "both ends of a round must occur"


@pytest.mark.parametrize(("k", "setting"), SPREAD, ids=name_of)
def test_tokens_follow_the_targets_law(pair: MarkovPair, k: int, setting: Sampling) -> None:
    check(pair, k, setting, first_seed=1000 * k, streams=4000, batch=2000)


@pytest.mark.slow
@pytest.mark.parametrize(("k", "setting"), EVERY, ids=name_of)
def test_tokens_follow_the_targets_law_at_every_setting(pair: MarkovPair, k: int, setting: Sampling) -> None:
    check(pair, k, setting, first_seed=10**6 * k, streams=20_000, batch=2000)


def test_plain_decoding_follows_the_same_law(pair: MarkovPair) -> None:
    setting = setting_of(1.0, 6, 0.8, 0.0, True)
    got = decode_streams(pair, setting, k=0, seeds=range(4000), length=6)
    assert law_report(got.tokens, pair.logits, setting).holds
