"""The workflow for Apple silicon runners: GitHub accepts it, it is pinned, and has no rights that it does not need."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
[APPLE] = FILES


def content() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(APPLE.read_text())
    return loaded


def steps() -> list[dict[str, Any]]:
    return [step for job in content()["jobs"].values() for step in job["steps"]]


def check(path: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.github-workflows",
        str(path),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_github_would_accept_it(tmp_path):
    done = check(APPLE)
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "broken.yml"
    broken.write_text(APPLE.read_text().replace("runs-on:", "run-on:"))
    assert check(broken).returncode == 1


def test_actions_are_pinned_by_commit_with_their_tag_beside():
    uses = re.findall(r"uses: (\S+)(.*)", APPLE.read_text())
    assert len(uses) >= 3
    for action, comment in uses:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), comment


def test_it_may_only_read_and_ends():
    workflow = content()
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 120
        assert "permissions" not in job
    checkout = next(step for step in steps() if step.get("uses", "").startswith("actions/checkout"))
    assert checkout["with"]["persist-credentials"] is False
    assert "secrets." not in APPLE.read_text() and "pull_request_target" not in APPLE.read_text()


def test_nothing_is_pasted_into_a_script():
    """An expression in `run` would let its value be read as commands."""
    for step in steps():
        assert "${{" not in step.get("run", ""), step


def test_it_tests_reports_and_keeps_the_reports():
    runs = {step["run"]: step for step in steps() if "run" in step}
    assert "continue-on-error" not in next(
        s for s in steps() if s.get("env") == {"PYTEST_ADDOPTS": "--mlx-device=cpu"}
    )
    assert sum(run == "make test" for run in (step.get("run") for step in steps())) == 2
    [on_cpu] = [run for run in runs if "--report demo" in run and "--device cpu" in run]
    assert "continue-on-error" not in runs[on_cpu] and "-o report-cpu.json" in on_cpu
    upload = steps()[-1]
    assert upload["uses"].startswith("actions/upload-artifact@")
    assert upload["with"]["path"] == "report-*.json" and upload["with"]["if-no-files-found"] == "error"
    assert upload["if"] == "${{ !cancelled() }}"
