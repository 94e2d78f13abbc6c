"""Width and drafts chosen together, on made-up costs whose best is known by hand."""

import itertools

import pytest

from mlx_mtp.batch_choice import KEPT, NEAR, choose_batch
from mlx_mtp.cost import CostModel


def tokens(chance: float):
    """Expected tokens of a round in which each draft is right with this chance."""
    return lambda k: sum(chance**i for i in range(k + 1))


def test_rows_that_cost_nothing_are_all_taken():
    free = CostModel(launch_s=0.0, weights_s=1.0, row_s=0.0)
    chosen = choose_batch(free, tokens(0.5), max_batch=8)
    assert (chosen.width, chosen.num_draft_tokens) == (8, 8)


def test_rows_that_cost_a_pass_leave_one_row_and_no_drafts():
    linear = CostModel(launch_s=0.0, weights_s=1.0, row_s=1.0, draft_s=0.05)
    chosen = choose_batch(linear, tokens(0.9), max_batch=8)
    assert (chosen.width, chosen.num_draft_tokens) == (1, 0)
    assert chosen.tokens_per_second == pytest.approx(1.0)


def test_a_wider_batch_plays_fewer_drafts():
    cost = CostModel(launch_s=0.0, weights_s=1.0, row_s=0.1, draft_s=0.03)
    drafts = [
        choose_batch(cost, tokens(0.7), max_batch=width, goal="throughput").num_draft_tokens
        for width in (1, 8, 32)
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
    fast = choose_batch(cost, expected, max_batch=16, context=1000)
    assert fast.tokens_per_second == pytest.approx(rates[fast.width, fast.num_draft_tokens])
    assert fast.tokens_per_second >= NEAR * max(rates.values())
    narrower = [own for (width, _), own in rates.items() if width < fast.width]
    assert not narrower or max(narrower) < NEAR * max(rates.values())
    quick = choose_batch(cost, expected, max_batch=16, context=1000, goal="latency")
    alone = max(rates[1, k] for k in range(9))
    assert quick.of_each >= KEPT * alone
    wider = [own / width for (width, _), own in rates.items() if width > quick.width]
    assert not wider or max(wider) < KEPT * alone
