"""bench/expert_overlap.py: its counts on the golden MoE pair, against bounds, independence and the committed ones."""

import json
import random
from pathlib import Path

import pytest

from mlx_mtp.cost import independent_experts

ROOT = Path(__file__).parent.parent


@pytest.fixture
def overlap(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import expert_overlap

    return expert_overlap


def test_rows_that_choose_independently_are_on_the_formula(overlap):
    """3,000 rows with 2 of 8 at random: within 2 % at every number of rows; one text or many makes no difference."""
    rng = random.Random(3)
    routes = [[set(rng.sample(range(8), 2)) for _ in range(3000)] for _ in range(2)]
    for ends in ([3000], list(range(100, 3001, 100))):
        for rows, value in enumerate(overlap.distinct(routes, ends, 8, 2), 1):
            assert value == pytest.approx(independent_experts(rows, 8, 2), rel=0.02)


def test_runs_do_not_cross_from_one_text_to_the_next(overlap):
    """Two texts, each of one pair of experts: 2 distinct at any number of rows, 4 if they were one text."""
    routes = [[{0, 1}] * 20 + [{2, 3}] * 20]
    assert overlap.distinct(routes, [20, 40], 8, 2) == [2.0] * overlap.MOST_ROWS
    assert overlap.distinct(routes, [40], 8, 2)[-1] > 2.0
    shuffled = overlap.shuffled(routes, random.Random(1))
    assert sorted(map(sorted, shuffled[0])) == sorted(map(sorted, routes[0])) and shuffled != routes


def test_the_golden_pair_as_committed(overlap):
    """Real routing: within the bounds, neighbours share more than rows in any order; the committed figures, to 2 %."""
    found = overlap.measured()
    kept = json.loads((ROOT / "bench" / "results" / "expert_overlap.json").read_text())
    assert "says nothing of the 26B-A4B" in kept["label"]
    for kind, own in found["texts"].items():
        assert own["rows"] == 96 and own["distinct"][0] == 2.0
        for rows, value in enumerate(own["distinct"], 1):
            low, high = own["least_of_layers"][rows - 1], own["most_of_layers"][rows - 1]
            assert 2 <= low <= value <= high <= min(8, 2 * rows)
        assert own["distinct"] == sorted(own["distinct"])
        assert all(a < b for a, b in list(zip(own["distinct"], own["rows_in_any_order"], strict=True))[1:])
        for name, values in own.items():
            assert values == pytest.approx(kept["texts"][kind][name], rel=0.02)


def test_the_plot(overlap, tmp_path):
    pytest.importorskip("matplotlib")
    kept = json.loads((ROOT / "bench" / "results" / "expert_overlap.json").read_text())
    overlap.plot(kept, tmp_path / "o.svg")
    drawn = (tmp_path / "o.svg").read_text(encoding="utf-8")
    for words in (
        "rows of the pass",
        "distinct experts, mean over layers",
        "not how much the 26B-A4B shares",
    ):
        assert words in drawn and words in (ROOT / "docs" / "expert_overlap.svg").read_text(encoding="utf-8")
