"""`mlx-mtp doctor`: what it says of machines of every kind, in every width, and that its words have one meaning."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mlx_mtp.diagnosis
import mlx_mtp.versions
from cli_runs import one_line, run_cli, run_main
from mlx_mtp import health
from mlx_mtp.cli.doctor_text import as_text
from mlx_mtp.cli.sizes import columns_of
from mlx_mtp.diagnosis import Diagnosis, diagnose
from mlx_mtp.errors import StorageError
from mlx_mtp.machine import Machine, read_machine, this_machine

MACHINES = Path(__file__).parent / "machines"
NAMES = sorted(path.stem for path in MACHINES.glob("*.json"))


def described(name: str) -> Machine:
    return read_machine(MACHINES / f"{name}.json")


def by_name(diagnosis: Diagnosis) -> dict[str, health.Check]:
    return {check.name: check for check in diagnosis.checks}


def test_this_machine_is_usable_and_everything_is_said(tmp_path):
    done = run_cli("doctor", "--json", HF_HOME=str(tmp_path), XDG_DATA_HOME=str(tmp_path / "data"))
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["schema"] == 1 and told["usable"] is True
    machine = this_machine()
    assert told["machine"]["memory_bytes"] == machine.memory_bytes
    assert told["software"]["packages"]["mlx"] and told["software"]["free_bytes"] > 0
    assert told["places"]["downloads"] == str(tmp_path / "hub")
    assert told["places"]["data"].startswith(str(tmp_path / "data"))
    assert told["cached"] == [] and len(told["models"]) == 15
    assert {check["status"] for check in told["checks"]} <= {"ok", "warning"}
    for check in told["checks"]:
        assert (check["remedy"] is None) == (check["status"] == "ok"), check


@pytest.mark.parametrize(
    "name, recommended", [("m1_16", "e4b:4bit"), ("m2_max_32", "26b:4bit"), ("m4_max_128", "31b:8bit")]
)
def test_described_machines_get_their_model(name, recommended):
    done = run_main("doctor", "--machine", MACHINES / f"{name}.json")
    text = done.stdout.decode()
    assert done.returncode == 0
    [line] = [line for line in text.splitlines() if line.endswith("recommended")]
    assert line.split()[0] == recommended
    assert text.rstrip().endswith(f"mlx-mtp chat {recommended}")
    assert "GPU cores" in text and "stock MLX operations" in text
    assert "our files" not in text  # of this machine, which was not asked about


def test_a_model_too_large_does_not_fit_on_16_gb():
    fits = {fit.name: fit for fit in diagnose(described("m1_16")).models}
    assert not fits["26b:4bit"].fits and fits["e2b:4bit"].fits
    assert fits["26b:4bit"].memory_bytes > fits["e2b:4bit"].memory_bytes > 2**31


@pytest.mark.parametrize("name, words", [("rosetta", "Rosetta"), ("macos_vm", "virtual machine")])
def test_machines_that_cannot_run_models_are_told_why(name, words):
    """Fault 65: exit code 3, the reason and the remedy."""
    done = run_main("doctor", "--machine", MACHINES / f"{name}.json")
    assert done.returncode == 3
    check = by_name(diagnose(described(name)))["machine"]
    assert check.status == "problem" and words in check.found
    assert str(check.remedy).startswith(("install a Python for arm64", "run it on the Mac itself"))
    text = re.sub(r"\s+", " ", done.stdout.decode())
    assert f"machine: {check.found} -> {check.remedy}" in text
    assert "Models cannot run here: machine" in text


def test_other_hardware_and_systems():
    mac = described("m2_16")
    assert health.check_hardware(mac).status == "ok"
    assert health.check_hardware(replace(mac, is_virtual=True)).status == "warning"
    assert health.check_hardware(described("linux_24")).status == "warning"
    old = health.check_system(replace(mac, os_version="13.6.1"))
    assert old.status == "problem" and old.remedy == "update macOS"
    assert health.check_memory(replace(mac, memory_bytes=2**31, gpu_budget_bytes=2**30)).status == "problem"


def test_memory_that_is_taken_and_pressure_are_warnings():
    check = health.check_free(2**30, "normal", 2**33, "e4b:4bit")
    assert check.status == "warning" and "1.0 GB" in check.found and "e4b:4bit needs 8.0 GB" in check.found
    assert health.check_free(2**34, "critical", 2**33, "e4b:4bit").status == "warning"
    assert health.check_free(2**34, "normal", 2**33, "e4b:4bit").status == "ok"


def test_packages_missing_or_out_of_range(monkeypatch):
    """Fault 66: too old or missing is a problem, newer than tested a warning."""
    versions = {"mlx": "0.40.0", "mlx-lm": "0.20", "numpy": None}
    sound = mlx_mtp.versions.find_versions

    def version_of(name: str) -> str:
        given = versions.get(name, "tested")
        if given is None:
            raise mlx_mtp.versions.metadata.PackageNotFoundError(name)
        return mlx_mtp.versions.metadata.version(name) if given == "tested" else given

    monkeypatch.setattr(
        mlx_mtp.versions, "find_versions", lambda: sound(mlx_mtp.versions.EVERYTHING, version_of)
    )
    found = {check.name: check for check in health.check_packages()}
    assert {name: check.status for name, check in found.items()} == {
        "package mlx": "warning",
        "package mlx-lm": "problem",
        "package numpy": "problem",
    }
    assert all(check.remedy and "pip install" in check.remedy for check in found.values())


def test_folders_that_cannot_keep_anything():
    def nowhere() -> Path:
        raise StorageError("this user has no home folder; set HOME to a folder")

    check = health.check_folder("records", nowhere)
    assert (check.status, check.remedy) == ("warning", "set HOME to a folder")
    free = shutil.disk_usage("/").free
    check = health.check_folder("downloads", lambda: Path("/"), needed=free + 10**12)
    assert check.status == "warning" and "free some space" in str(check.remedy)


def test_a_folder_that_may_not_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(health.os, "access", lambda path, mode: False)
    check = health.check_folder("downloads", lambda: tmp_path / "hub")
    assert check.status == "warning" and "HF_HOME" in str(check.remedy)


def test_offline_and_damaged_records_are_said(tmp_path):
    """Fault 75: a record that is not JSON is set aside, said once, and no reason not to run."""
    data = tmp_path / "mlx-mtp"
    data.mkdir(parents=True)
    (data / "last-model.json").write_text("{")
    done = run_cli(
        "doctor", "--json", HF_HUB_OFFLINE="1", XDG_DATA_HOME=str(tmp_path), HF_HOME=str(tmp_path / "hf")
    )
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0
    assert checks["hub"]["status"] == "warning" and "HF_HUB_OFFLINE" in checks["hub"]["found"]
    assert "not JSON" in checks["our files"]["found"]
    again = json.loads(
        run_cli("doctor", "--json", XDG_DATA_HOME=str(tmp_path), HF_HOME=str(tmp_path / "hf")).stdout
    )
    assert (
        "kept aside: last-model.json.corrupt" in {c["name"]: c for c in again["checks"]}["our files"]["found"]
    )


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
@pytest.mark.parametrize("name", NAMES)
def test_text_is_as_wide_as_the_terminal(name, columns):
    """Words that are longer than a line are left whole, so that they can be copied."""
    text = as_text(diagnose(described(name)), columns)
    for line in text.splitlines():
        assert columns_of(line) <= columns or " " not in line.strip(), line
    assert "\x1b" not in text
    assert max(columns_of(line) for line in text.splitlines()) <= 100


def test_no_escape_reaches_a_file_or_a_terminal_without_colour(monkeypatch):
    assert b"\x1b" not in run_main("doctor", "--machine", MACHINES / "rosetta.json").stdout
    diagnosis = diagnose(described("rosetta"))
    monkeypatch.setattr("mlx_mtp.cli.doctor_text.has_style", lambda stream: True)
    assert "\x1b[31mPROBLEM\x1b[0m       machine" in as_text(diagnosis, 80)


@pytest.mark.parametrize(
    "words, part",
    [
        (("-o", "x.json"), "-o belongs to --report"),
        (("e2b",), "MODEL belongs to --report"),
        (("--offline",), "--offline belongs to --report"),
        (("--report", "--machine", MACHINES / "m1_16.json"), "give one"),
        (("--device", "npu"), "--device is auto, cpu or gpu"),
    ],
)
def test_words_that_do_not_go_together_are_refused(words, part):
    done = run_main("doctor", *words)
    assert done.returncode == 2 and part in one_line(done.stderr)


def test_a_bad_description_is_refused():
    done = run_main("doctor", "--machine", MACHINES / "nothing.json")
    assert done.returncode == 3 and "nothing.json" in one_line(done.stderr)


def test_a_report_without_its_model_says_so_and_is_written(tmp_path):
    """Nothing is downloaded unasked: the sections that need a model say why they were skipped."""
    out = tmp_path / "report.json"
    done = run_cli(
        "doctor", "--report", "e2b", "--offline", "-o", out, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().strip() == str(out)
    document = json.loads(out.read_text())
    assert document["complete"] is True and document["model"] == "e2b"
    sections = document["sections"]
    assert sections["machine"]["status"] == "ok"
    assert sections["speeds"]["status"] == "skipped"
    assert "no model is loaded" in sections["speeds"]["reason"]
    assert sections["published"]["status"] == "skipped"


@pytest.mark.slow
def test_the_report_of_the_demo_pair(tmp_path):
    """The command as a person types it; minutes on a CPU."""
    out = tmp_path / "report.json"
    done = run_cli("doctor", "--report", "demo", "--offline", "-o", out, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    found = {name: entry["found"] for name, entry in document["sections"].items()}
    assert {entry["status"] for entry in document["sections"].values()} <= {"ok", "skipped", "out of time"}
    assert found["donation"]["plain"]["in_place"] and found["donation"]["k=3"]["in_place"]
    assert found["acceptance"]["drafters"]["16-bit"]["greedy"]["acceptance_rate"] > 0.3
    assert found["position"]["P against P-16"]["difference"] > 0
    assert str(Path.home()) + "/" not in out.read_text()
