"""The README's table of numbers is what the committed result files say, each row with its machine."""

import json
import shutil
from pathlib import Path

import pytest

from bench_runs import made_document
from mlx_mtp.measure.results import write_document

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def numbers(bench):
    return bench("readme_numbers")


def test_the_readme_holds_what_the_script_writes(numbers):
    text = (ROOT / "README.md").read_text()
    assert numbers.with_table(text, numbers.numbers()) == text, "run bench/readme_numbers.py --write"


def test_every_row_says_where_and_predictions_say_that_they_are(numbers):
    rows = numbers.numbers()
    assert 4 <= len(rows) <= numbers.MOST
    for row in rows:
        assert row.where.startswith(("Linux, ", "Apple ", "**predicted**")), row
    assert sum(row.where == numbers.PREDICTED for row in rows) == 1


def test_a_changed_result_changes_the_table(numbers, tmp_path):
    shutil.copytree(numbers.RESULTS, tmp_path / "results")
    path = tmp_path / "results" / "prefill.json"
    result = json.loads(path.read_text())
    arms = result["results"]["seconds to the first token"]
    next(own for name, own in arms.items() if name.startswith("ours"))["this / mlx-lm"] = 0.123
    path.write_text(json.dumps(result))
    before, after = numbers.numbers(), numbers.numbers(tmp_path / "results")
    assert [row for row in after if row not in before] == [
        numbers.Number(row.what, "0.12x", row.where) for row in before if "first token" in row.what
    ]
    path.unlink()
    assert len(numbers.numbers(tmp_path / "results")) == len(before) - 1


def test_a_run_of_the_bench_on_a_mac_comes_first(numbers, tmp_path):
    run = made_document({"plain": (1.0, 1.01, 1.0, 1.01), "auto": (0.5, 0.505, 0.5, 0.505)})
    run["fingerprint"]["machine"] = {
        **run["fingerprint"]["machine"],
        "system": "Darwin",
        "chip": "Apple M9",
        "gpu_cores": 10,
    }
    shutil.copytree(numbers.RESULTS, tmp_path / "results")
    write_document(tmp_path / "results" / "m9-test.json", run)
    first = numbers.numbers(tmp_path / "results")[0]
    assert first == numbers.Number(
        "test: `auto` over our plain decoding, 1 workload; text equal to plain",
        "2.00x",
        "Apple M9, 10 GPU cores, MLX 0.32.4",
    )
    run["cases"]["chat/greedy/0/1"]["verdicts"]["auto"]["parted"] = 1
    write_document(tmp_path / "results" / "m9-test.json", run)
    assert numbers.numbers(tmp_path / "results")[0].what.endswith("**text not always equal**")
    run["complete"] = False
    write_document(tmp_path / "results" / "m9-test.json", run)
    assert "Apple" not in numbers.numbers(tmp_path / "results")[0].where, "an unfinished run has no row"
