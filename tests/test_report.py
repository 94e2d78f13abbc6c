"""The first-Mac protocol: sections that fail alone, within a limit, in a document that names nobody."""

import json
from pathlib import Path
from typing import Any

import pytest

from goldens import golden
from mlx_mtp.machine import this_machine
from mlx_mtp.report.privacy import publishable
from mlx_mtp.report.protocol import Deadline, NotHere, OutOfTime, Section, run_protocol
from mlx_mtp.report.sections import SECTIONS
from mlx_mtp.report.setting import Setting
from report_settings import setting_of


def test_sections_fail_alone_and_keep_what_they_found():
    def good(setting, found, deadline):
        found["answer"] = 42

    def broken(setting, found, deadline):
        found["before"] = 1
        raise RuntimeError(f"in {Path.home()}/models/x")

    def slow(setting, found, deadline):
        found["begun"] = True
        while True:
            deadline.check()

    def elsewhere(setting, found, deadline):
        raise NotHere("only with experts")

    kept: list[dict[str, Any]] = []
    sections = [
        Section("broken", "?", 9, broken, needs_pair=False),
        Section("slow", "?", 0.05, slow, needs_pair=False),
        Section("elsewhere", "?", 9, elsewhere, needs_pair=False),
        Section("no_pair", "?", 9, good),
        Section("good", "?", 9, good, needs_pair=False),
    ]
    setting = Setting("e2b", this_machine(), no_pair_because="nothing is downloaded")
    document = run_protocol(
        setting, sections, keep=lambda document: kept.append(json.loads(json.dumps(document)))
    )
    entries = document["sections"]
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "broken": "error",
        "slow": "out of time",
        "elsewhere": "skipped",
        "no_pair": "skipped",
        "good": "ok",
    }
    assert entries["broken"]["found"] == {"before": 1}
    assert entries["broken"]["reason"] == "RuntimeError: in ~/models/x"
    assert entries["slow"]["found"] == {"begun": True} and entries["slow"]["seconds"] < 5
    assert "nothing is downloaded" in entries["no_pair"]["reason"]
    assert entries["good"]["found"] == {"answer": 42}
    assert [document["running"] for document in kept] == [section.name for section in sections] + [None]
    assert [document["complete"] for document in kept] == [False] * 5 + [True]


def test_all_sections_share_one_limit():
    clock = iter(range(0, 1000, 10))
    deadline = Deadline(25, clock=lambda: float(next(clock)))
    deadline.check()
    deadline.check()
    with pytest.raises(OutOfTime):
        deadline.check()
    ran = []
    section = Section("late", "?", 60, lambda *_: ran.append(1), needs_pair=False)
    document = run_protocol(Setting("e2b", this_machine()), [section], seconds=0.0)
    assert document["sections"]["late"]["status"] == "out of time" and not ran


def test_the_protocol_ends_within_twenty_minutes():
    assert sum(section.seconds for section in SECTIONS) <= 19 * 60
    assert len({section.name for section in SECTIONS}) == len(SECTIONS)


def test_what_is_published_names_nobody():
    value = {
        "/Users/jane/x": ("/Users/jane/.cache/hub", Path("/home/jane"), "at /Volumes/jane/m, jane"),
        "n": float("nan"),
        "other": "/Users/joe/secret and /home/mary",
        "janet": "/Users/janet/x",
    }
    clean = publishable(value, home="/Users/jane")
    assert clean == {
        "~/x": ["~/.cache/hub", "~", "at /Volumes/USER/m, jane"],
        "n": "nan",
        "other": "~/secret and ~",
        "janet": "~/x",
    }
    json.dumps(clean, allow_nan=False)
    assert publishable(["/srv/people/jo/x:", "/srv/people/joe"], home="/srv/people/jo") == [
        "~/x:",
        "/srv/people/joe",
    ]


def test_a_whole_report_on_a_tiny_pair_with_experts():
    """Every section runs; those that cannot answer here say why."""
    setting = setting_of("a4b", tokens=7, repeats=1, prompts={"short": golden("a4b", "short").prompt})
    document = run_protocol(setting, SECTIONS)
    status = {name: (entry["status"], entry.get("reason")) for name, entry in document["sections"].items()}
    skipped = {name for name, (word, _) in status.items() if word == "skipped"}
    assert {name: found for name, found in status.items() if found[0] not in ("ok", "skipped")} == {}
    assert skipped <= {"published", "other_targets", "matrix_order"}
    found = {name: entry["found"] for name, entry in document["sections"].items()}
    assert found["machine"]["versions"]["mlx"]
    assert found["exactness"]["replies_equal"] == 1
    assert found["memory"]["contexts"][0]["mlx_peak_bytes"] > 0
    assert set(found["cost_curve"]["short"]["pass_ms_by_rows"]) == {str(m) for m in range(1, 10)}
    assert set(found["speeds"]["gain"]["short"]) == {"0", "1", "2", "3", "4", "auto"}
    assert found["kernels"]["ours"] == 0 and found["kernels"]["unfinished"] == "no Metal here"
    assert len(found["kernels"]["operations"]) > 10
    assert found["formats"]["float32"]["largest_logit_difference"] == 0
    text = json.dumps(document, allow_nan=False)
    assert str(Path.home()) + "/" not in text
