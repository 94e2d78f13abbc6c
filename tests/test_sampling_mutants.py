"""Mutation test of the sampling tests (T5): each wrong round is caught, by the checks that the table says and no other.

| mutant                       | law    | same text | same in any batch | perfect drafter |
|------------------------------|--------|-----------|-------------------|-----------------|
| noise keyed by row           | killed | killed    |                   | killed          |
| noise keyed by batch row     |        |           | killed            |                 |
| noise keyed by rows in pass  |        | killed    |                   | killed          |
| bonus noise one back         | killed | killed    |                   |                 |
| bonus noise one ahead        | killed | killed    |                   |                 |
| drafts emitted               | killed | killed    |                   |                 |
| drafts favoured              | killed | killed    |                   |                 |
| rejected drafts penalised    | killed | killed    |                   |                 |
| drafts not penalised         | killed | killed    |                   |                 |
| temperature forgotten        | killed |           |                   | killed          |
| one accepted too many        | killed | killed    |                   |                 |
| one accepted too few         |        |           |                   | killed          |
| drafter noise of its own     |        |           |                   | killed          |

law: chi-square and total variation of 2000 streams in rounds of 3 drafts (test_sampling_law.py).
same text: rounds of 3 drafts give what plain decoding gives, seed by seed (test_same_text.py).
same in any batch: a seed gives the same text in another row of another batch (test_same_text.py).
perfect drafter: one with the target's own logits has every draft accepted, without penalties.
"""

from collections.abc import Callable

import numpy as np
import pytest

from markov_pair import decode_streams, markov_pair
from mlx_mtp.sampling import Sampling
from mutants import (
    Patch,
    bonus_noise_one_ahead,
    bonus_noise_one_back,
    drafter_noise_of_its_own,
    drafts_emitted,
    drafts_favoured,
    drafts_not_penalised,
    noise_keyed_by_batch_row,
    noise_keyed_by_row,
    noise_keyed_by_rows_in_pass,
    one_accepted_too_few,
    one_accepted_too_many,
    rejected_drafts_penalised,
    temperature_forgotten,
)
from sampling_law import law_report

FREE = Sampling(temperature=0.6, top_k=8)
PENALISED = Sampling(
    temperature=0.8, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, top_p=0.9
)
K, LENGTH, STREAMS = 3, 8, 2000

LAW, TEXT, BATCH, DRAFTER = "law", "same text", "same in any batch", "perfect drafter"
KILLED_BY: dict[Callable[[], list[Patch]], set[str]] = {
    noise_keyed_by_row: {LAW, TEXT, DRAFTER},
    noise_keyed_by_batch_row: {BATCH},
    noise_keyed_by_rows_in_pass: {TEXT, DRAFTER},
    bonus_noise_one_back: {LAW, TEXT},
    bonus_noise_one_ahead: {LAW, TEXT},
    drafts_emitted: {LAW, TEXT},
    drafts_favoured: {LAW, TEXT},
    rejected_drafts_penalised: {LAW, TEXT},
    drafts_not_penalised: {LAW, TEXT},
    temperature_forgotten: {LAW, DRAFTER},
    one_accepted_too_many: {LAW, TEXT},
    one_accepted_too_few: {DRAFTER},
    drafter_noise_of_its_own: {DRAFTER},
}


NEEDS_PENALTIES = {rejected_drafts_penalised, drafts_not_penalised}


def kills(setting: Sampling) -> set[str]:
    """The checks that fail with the stages as they are now."""
    pair, perfect = markov_pair(), markov_pair(drafter_noise=0.0)
    found = set()
    tokens = decode_streams(pair, setting, k=K, seeds=range(STREAMS), length=LENGTH).tokens
    if not law_report(tokens, pair.logits, setting).holds:
        found.add(LAW)
    some = slice(0, 100)
    plain = decode_streams(pair, setting, k=0, seeds=range(STREAMS)[some], length=LENGTH).tokens
    if not np.array_equal(tokens[some], plain):
        found.add(TEXT)
    moved = decode_streams(pair, setting, k=K, seeds=range(STREAMS)[some][::-1], length=LENGTH).tokens
    if not np.array_equal(tokens[some], moved[::-1]):
        found.add(BATCH)
    drafts = decode_streams(perfect, FREE, k=K, seeds=range(200), length=LENGTH)
    if drafts.accepted < drafts.drafted:
        found.add(DRAFTER)
    return found


def test_a_sound_round_fails_no_check() -> None:
    assert kills(FREE) == kills(PENALISED) == set()


@pytest.mark.parametrize("mutant", KILLED_BY, ids=lambda mutant: mutant.__name__)
def test_each_mutant_is_killed_by_the_checks_of_the_table(
    mutant: Callable[[], list[Patch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, wrong in mutant():
        monkeypatch.setattr(module, name, wrong)
    assert kills(PENALISED if mutant in NEEDS_PENALTIES else FREE) == KILLED_BY[mutant]
