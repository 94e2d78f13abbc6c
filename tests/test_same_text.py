"""The same seed gives the same text: drafting on or off, whatever k, the batch, the sampler and the drafter's quality.

Golden targets have a window of 16, so every text goes past it, and the longest prompt starts beyond it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

import mlx_mtp.round
from mlx_mtp import Sampling, generate, generate_batch
from mlx_mtp.pair import Pair
from mlx_mtp.reply import Generation
from pairs import VARIANTS, golden_pair, random_drafter
from scripted_drafts import ScriptedDrafts

TOKENS = 28
PROMPTS = [[(i * step + 3) % 256 for i in range(count)] for step, count in ((37, 45), (11, 5), (101, 20))]
TEMPERATURES, TOP_KS, TOP_PS, DRAFTERS = (
    (0.0, 0.7, 1.0, 1.5),
    (0, 20, 64),
    (1.0, 0.9),
    ("wrong", "half", "perfect", "random"),
)
PENALTIES = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2}


def setting_of(temperature: float, top_k: int, top_p: float, penalties: bool) -> Sampling:
    return Sampling(temperature, top_k, top_p, **(PENALTIES if penalties else {}))


SETTINGS = [setting_of(*values) for values in itertools.product(TEMPERATURES, TOP_KS, TOP_PS, (False, True))]


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison with plain decoding alone; the first `batch` prompts are decoded together."""

    variant: str
    setting: Sampling
    k: int
    batch: int
    drafter: str

    def __str__(self) -> str:
        s = self.setting
        sampling = f"T{s.temperature} top_k{s.top_k} top_p{s.top_p}{' penalties' if s.penalises else ''}"
        return f"{self.variant} {sampling} k{self.k} batch{self.batch} {self.drafter}"


ORDER = 1402  # with it 24 cases hold 305 of the 335 pairs of values from two axes


def dealt(values: Sequence[Any], count: int, order: int) -> list[Any]:
    """`count` values, each as often as the others, in an order of their own."""
    shuffled = np.random.default_rng(order).permutation(count)
    return [values[i % len(values)] for i in shuffled]


SPREAD = [
    Case(variant, setting_of(*setting), k, batch, drafter)
    for variant, k, batch, drafter, *setting in zip(
        *(
            dealt(values, 24, order)
            for order, values in enumerate(
                (VARIANTS, range(1, 7), (1, 3), DRAFTERS, TEMPERATURES, TOP_KS, TOP_PS, (False, True)),
                start=ORDER,
            )
        ),
        strict=True,
    )
]


def settings_of_rows(setting: Sampling, batch: int) -> list[Sampling]:
    return [replace(setting, seed=50 + row) for row in range(batch)]


def plain_texts(pair: Pair, rows: list[Sampling]) -> list[list[int]]:
    """Each row alone, without drafts."""
    replies = (
        generate(pair, prompt, max_tokens=TOKENS, sampling=row, num_draft_tokens=0)
        for prompt, row in zip(PROMPTS, rows, strict=False)
    )
    return [reply.tokens for reply in replies]


def decoded(
    pair: Pair, rows: list[Sampling], k: int, drafter: str, texts: list[list[int]], patch: pytest.MonkeyPatch
) -> list[Generation]:
    """All rows together in rounds of k drafts of the given quality."""
    with patch.context() as patched:
        if drafter != "random":
            script = [prompt + text for prompt, text in zip(PROMPTS, texts, strict=False)]
            right = {"wrong": 0.0, "half": 0.5, "perfect": 1.0}[drafter]
            patched.setattr(
                mlx_mtp.round, "draft", ScriptedDrafts(script[: len(rows)], right, [row.seed for row in rows])
            )
        if len(rows) == 1:
            return [generate(pair, PROMPTS[0], max_tokens=TOKENS, sampling=rows[0], num_draft_tokens=k)]
        return generate_batch(
            pair, PROMPTS[: len(rows)], max_tokens=TOKENS, sampling=rows, num_draft_tokens=k
        )


def agrees_as_meant(reply: Generation, k: int, drafter: str) -> bool:
    """Whether the drafter was as good as its name says, so that the rounds ended where they should."""
    if k == 0:
        return reply.stats.drafted == 0
    if drafter == "wrong":
        return reply.stats.accepted == 0
    if drafter == "perfect":
        return reply.stats.rounds == -(-(TOKENS - 1) // (k + 1))
    first_right = reply.stats.accepted_by_position[0] / reply.stats.rounds
    # Flat distributions let even a random drafter agree, because it draws with the target's noise.
    return first_right < 0.7 if drafter == "random" else 0.2 < first_right < 0.9


def check(case: Case, pair: Pair, texts: list[list[int]], patch: pytest.MonkeyPatch) -> None:
    rows = settings_of_rows(case.setting, case.batch)
    replies = decoded(pair, rows, case.k, case.drafter, texts, patch)
    assert [reply.tokens for reply in replies] == texts[: case.batch], str(case)
    for reply in replies:
        assert agrees_as_meant(reply, case.k, case.drafter), (str(case), reply.stats)


@pytest.mark.parametrize("case", SPREAD, ids=str)
def test_text_is_that_of_plain_decoding_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = golden_pair(case.variant, drafter=random_drafter(case.variant))
    check(case, pair, plain_texts(pair, settings_of_rows(case.setting, case.batch)), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: str(Case("", setting, 0, 1, "")))
def test_text_is_that_of_plain_decoding_alone_in_every_combination(
    setting: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """k 0 to 6, batch 1 and 3, four drafters; the five shapes take turns."""
    variant = VARIANTS[SETTINGS.index(setting) % 5]
    pair = golden_pair(variant, drafter=random_drafter(variant))
    texts = plain_texts(pair, settings_of_rows(setting, 3))
    for k, batch, drafter in itertools.product(range(7), (1, 3), DRAFTERS):
        if k or drafter == "random":
            check(Case(variant, setting, k, batch, drafter), pair, texts, monkeypatch)


@pytest.mark.parametrize("k", [0, 3])
def test_rows_with_different_settings_do_not_influence_each_other(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy beside top-k beside penalties and bias: the batch runs in the most general sampler class."""
    pair = golden_pair("e2b", drafter=random_drafter("e2b"))
    rows = [
        Sampling(temperature=0.0, seed=1),
        Sampling(temperature=1.0, top_k=20, top_p=0.95, seed=2),
        Sampling(temperature=0.8, seed=3, repetition_penalty=1.3, logit_bias={9: 3.0, 40: -2.0}),
    ]
    texts = plain_texts(pair, rows)
    for drafter in DRAFTERS:
        assert [reply.tokens for reply in decoded(pair, rows, k, drafter, texts, monkeypatch)] == texts


def test_another_seed_gives_another_text() -> None:
    pair = golden_pair("31b", drafter=None)
    texts = [
        generate(pair, PROMPTS[1], max_tokens=12, sampling=Sampling(temperature=0.7, seed=seed)).tokens
        for seed in range(4)
    ]
    assert len(set(map(tuple, texts))) == 4
