"""What is shown of a run: every row in every format, tables that fit, plots."""

import csv
import io
import json
import xml.etree.ElementTree as ET

import pytest

from bench_runs import FAST, FINGERPRINT, SLOW, STEADY, WIDE, timed_run
from cli_runs import one_line, run_main
from mlx_mtp.cli.bench_text import as_text, findings_text
from mlx_mtp.cli.sizes import columns_of
from mlx_mtp.measure import plots
from mlx_mtp.measure.compare import compare_runs
from mlx_mtp.measure.guarantee import check_guarantee
from mlx_mtp.measure.results import as_json, read_document
from mlx_mtp.measure.summary import rows_of
from mlx_mtp.measure.tables import in_format


def test_every_format_holds_every_row():
    document = timed_run(plain=STEADY, mlx_lm=SLOW, auto=FAST, k2=WIDE)
    rows = rows_of(document)
    lines = list(csv.DictReader(io.StringIO(in_format(document, "csv"))))
    assert [line["arm"] for line in lines] == [row.arm for row in rows]
    assert {line["schema"] for line in lines} == {"1"}
    assert float(lines[2]["speedup"]) == pytest.approx(2.0)
    assert lines[3]["noisy"] == "True" and lines[2]["acceptance_by_position"] == "0.6 0.4"
    head, *records = [json.loads(line) for line in in_format(document, "jsonl").splitlines()]
    assert head["schema"] == 1 and head["fingerprint"] == FINGERPRINT
    assert [record["arm"] for record in records] == [row.arm for row in rows]
    whole = json.loads(in_format(document, "json"))
    assert whole["schema"] == 1 and whole["cases"].keys() == document["cases"].keys()
    assert [record["arm"] for record in whole["rows"]] == [row.arm for row in rows]
    table = [line for line in in_format(document, "md").splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    assert len({line.count(" | ") for line in table[2:]}) == 1


def test_json_that_was_written_can_be_resumed_and_compared(tmp_path):
    document, path = timed_run(plain=STEADY, auto=FAST), tmp_path / "out.json"
    path.write_text(in_format(document, "json"))
    assert compare_runs(read_document(path), document)
    assert read_document(path) == json.loads(as_json(document)), "figures are computed anew"


@pytest.mark.parametrize("columns", [40, 80, 140])
def test_the_table_fits_its_terminal(columns):
    document = timed_run(plain=STEADY, mlx_lm=SLOW, auto=FAST, k2=WIDE)
    text = as_text(document, columns)
    assert all(columns_of(line) <= columns for line in text.splitlines() if "chat/" not in line)
    assert "2.00" in text and "noisy" in text
    if columns == 80:
        [header] = [line for line in text.splitlines() if line.startswith("  arm ")]
        assert "tok/round" in header
    said = findings_text(check_guarantee(document), columns)
    assert said.startswith("guarantee: 3 of 3 checks hold")


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plots_are_drawn(tmp_path, suffix):
    document = timed_run(plain=STEADY, mlx_lm=SLOW, auto=FAST, k2=WIDE)
    path = tmp_path / f"out.{suffix}"
    plots.write_plots(document, path)
    if suffix == "svg":
        assert ET.parse(path).getroot().tag.endswith("svg")
    else:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
    plots.write_plots({**document, "cases": {}}, path)


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = run_main("bench", "demo", "--plot", tmp_path / "out.svg")
    assert done.returncode == 2
    assert "pip install 'mlx-mtp[plot]'" in one_line(done.stderr)
    assert one_line(run_main("bench", "demo", "--plot", tmp_path / "out.pdf").stderr).startswith(
        "--plot writes"
    )
