"""The tables of what auto gains are what the committed result files say."""

import json
import shutil

import pytest


@pytest.fixture
def gains(bench):
    return bench("gain_tables")


def test_the_page_holds_what_the_script_writes(gains):
    text = gains.README.read_text()
    assert gains.with_tables(text, gains.tables()) == text, "run bench/gain_tables.py --write"


def test_a_changed_result_changes_the_table(gains, tmp_path):
    shutil.copytree(gains.RESULTS, tmp_path / "results")
    path = tmp_path / "results" / "auto_gain.json"
    result = json.loads(path.read_text())
    own = next(iter(result["results"]["summary"].values()))["measured"]["auto, later"]
    own["best for each text"] |= {"speed": 0.123, "lower": 0.1, "upper": 0.2}
    path.write_text(json.dumps(result))
    before, after = gains.tables().splitlines(), gains.tables(tmp_path / "results").splitlines()
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 1 and "0.12 (0.10 to 0.20)" in changed[0]
    path.unlink()
    assert "in hindsight" not in gains.tables(tmp_path / "results")


def test_bounds_that_too_few_passes_give_are_left_out(gains):
    assert gains.bounded({"speed": 0.951, "lower": None, "upper": None}) == "0.95"


def test_a_page_without_marks_is_refused(gains):
    with pytest.raises(ValueError, match="end of gains"):
        gains.with_tables("no marks", "| a |")


def test_widths_are_compared_within_each_pass(bench, gains, monkeypatch):
    """A pass that was slow for all arms changes no ratio; a width without plain rounds has none."""
    widths = bench("batch_width")
    arms = {"width 1 plain": 2.0, "width 1 k=2": 1.0, "width 1 auto": 1.25, "width auto auto": 0.5}
    passes = [{name: slow * own for name, own in arms.items()} | {"load": [0]} for slow in (1, 3, 2)]
    found = widths.speeds(passes, 100)
    assert (
        found["width 1 plain"]["median"] == 25
        and found["width 1 auto"]["this / plain of the width"]["min"] == 1.6
    )
    assert found["width 1 auto"]["this / best fixed of the width"]["max"] == 0.8
    assert found["width auto auto"]["this / width 1 plain"]["all"] == [4, 4, 4]
    record = {"results": {"tokens a second": found, "passes": passes}}
    table = gains.width_table(record, "a pair")
    assert "| width 1 | 25 | 50 |  | 40 | 1.60 (1.60 to 1.60) |" in table and table.startswith(
        "| a pair, 3 passes |"
    )
    assert "| width chosen meanwhile |  |  |  | 100 |  |" in table
