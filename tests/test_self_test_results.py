"""What tests and races of kernels gave: where it is kept, what follows from it, and how `doctor` shows it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlx_mtp.diagnosis
import mlx_mtp.kernels.results
import mlx_mtp.pair
from cli_runs import run_cli, run_main
from kernel_pairs import quantised_pair
from mlx_mtp.cli.doctor_text import as_text, kernel_table
from mlx_mtp.cli.sizes import columns_of
from mlx_mtp.diagnosis import diagnose
from mlx_mtp.kernels.chooser import choose_kernels
from mlx_mtp.kernels.listing import lines_of_outcomes, lines_of_rows
from mlx_mtp.kernels.operations import Operation, operations_of
from mlx_mtp.kernels.results import (
    known_verdicts,
    place_of,
    read_outcomes,
    source_hash,
    verdicts_of,
    write_outcomes,
)
from mlx_mtp.machine import Machine, read_machine
from mlx_mtp.store import KERNEL_RESULTS, cache_folder
from self_test_cases import OTHER, PLACE, RIGHT, SCALAR, WRONG, outcome

MACHINES = Path(__file__).parent / "machines"


def mac() -> Machine:
    return read_machine(MACHINES / "m4_pro_24.json")


def kept_file() -> Path:
    [path] = (cache_folder() / KERNEL_RESULTS).iterdir()
    return path


def test_outcomes_are_kept_and_added_to():
    place = place_of(mac())
    first, second = outcome(PLACE), outcome(OTHER, WRONG)
    assert read_outcomes(place) == ({}, None)
    assert write_outcomes(place, {PLACE: first}) is None
    assert write_outcomes(place, {OTHER: second}) is None
    known = read_outcomes(place)
    assert known.warning is None and known.outcomes == {PLACE: first, OTHER: second}
    assert known_verdicts(mac()) == verdicts_of({PLACE: first, OTHER: second})
    assert known_verdicts(mac())[PLACE].use and not known_verdicts(mac())[OTHER].use
    slow = outcome(PLACE, SCALAR, ours=200.0)
    write_outcomes(place, {PLACE: slow})
    assert not known_verdicts(mac())[PLACE].use and known_verdicts(mac(), exact=True)[PLACE].use


@pytest.mark.parametrize(
    "changed",
    [
        {"chip": "Apple M4 Max"},
        {"gpu_cores": 20},
        {"system": "Darwin 27.0"},
        {"mlx": "0.33.0"},
        {"source": "0" * 64},
    ],
)
def test_another_place_knows_nothing(changed):
    place = place_of(mac())
    write_outcomes(place, {PLACE: outcome(PLACE)})
    elsewhere = replace(place, **changed)
    assert elsewhere != place and read_outcomes(elsewhere) == ({}, None)
    write_outcomes(elsewhere, {OTHER: outcome(OTHER)})
    assert set(read_outcomes(place).outcomes) == {PLACE} and set(read_outcomes(elsewhere).outcomes) == {OTHER}


def test_a_changed_kernel_is_another_place(tmp_path, monkeypatch):
    for name in ("a.metal", "b.py"):
        (tmp_path / name).write_text("1")
    before = source_hash([tmp_path])
    assert source_hash([tmp_path]) == before
    (tmp_path / "a.metal").write_text("2")
    changed = source_hash([tmp_path])
    (tmp_path / "b.py").write_text("2")
    assert len({before, changed, source_hash([tmp_path])}) == 3
    write_outcomes(place_of(mac()), {PLACE: outcome(PLACE)})
    monkeypatch.setattr(mlx_mtp.kernels.results, "source_hash", lambda: changed)
    assert known_verdicts(mac()) == {}


def test_a_damaged_file_is_set_aside_and_tested_anew():
    place = place_of(mac())
    write_outcomes(place, {PLACE: outcome(PLACE)})
    path = kept_file()
    path.write_text(path.read_text()[:-20])
    known = read_outcomes(place)
    assert known.outcomes == {} and "kept aside" in str(known.warning)
    assert path.with_name(path.name + ".corrupt").exists()
    assert write_outcomes(place, {PLACE: outcome(PLACE)}) is None
    assert set(read_outcomes(place).outcomes) == {PLACE}


def entries() -> Any:
    return json.loads(kept_file().read_text())["value"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry.pop("tested"),
        lambda entry: entry["tested"].update(bodies=["simd"]),
        lambda entry: entry["operation"].update(shape=[None]),
        lambda entry: entry["raced"].update({"4": {}}),
        lambda entry: entry["raced"]["4"].update(stock=[0.0, 0.0]),
        lambda entry: entry["raced"]["4"].update(stock=["1", 0.0]),
        lambda entry: entry.update(raced={}),
        lambda entry: entry.update(operation=[]),
    ],
)
def test_an_entry_that_cannot_be_read_is_left_out_and_said(damage):
    place = place_of(mac())
    write_outcomes(place, {PLACE: outcome(PLACE), OTHER: outcome(OTHER)})
    content = json.loads(kept_file().read_text())
    damage(content["value"][0])
    kept_file().write_text(json.dumps(content))
    known = read_outcomes(place)
    assert set(known.outcomes) == {OTHER} and "cannot be read" in str(known.warning)
    assert known_verdicts(mac())[OTHER].use
    content["value"] = {"not": "a list"}
    kept_file().write_text(json.dumps(content))
    assert read_outcomes(place).outcomes == {} and "cannot be read" in str(read_outcomes(place).warning)


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(mlx_mtp.kernels.results, "cache_folder", lambda: tmp_path / "file" / "x")
    assert "not kept for the next run" in str(write_outcomes(place_of(mac()), {PLACE: outcome(PLACE)}))
    assert read_outcomes(place_of(mac())).outcomes == {}


def test_a_pair_takes_what_passed_and_won(metal):
    pair = quantised_pair("31b", dtype=mx.bfloat16)
    operations = list(operations_of(pair.target, pair.drafter))
    outcomes = {own: outcome(own, RIGHT if own.name == "project" else SCALAR) for own in operations}
    outcomes[operations[0]] = outcome(operations[0], WRONG)
    outcomes[operations[1]] = outcome(operations[1], SCALAR, ours=300.0)
    del outcomes[operations[2]]
    choice = choose_kernels(pair.target, pair.drafter, has_metal=True, verdicts=verdicts_of(outcomes))
    by = {row.operation: row for row in choice.rows}
    assert by[operations[0]].reason.startswith("failed: 1 row")
    assert by[operations[1]].reason.startswith("slower than stock: 0.33x")
    assert by[operations[2]].reason == "not tested yet on this chip"
    assert {row.by for row in choice.rows[:3]} == {"stock"} and {row.by for row in choice.rows[3:]} == {
        "ours"
    }
    lines = lines_of_rows(choice.rows, outcomes)
    assert lines[3].speed_up == {"1": 2.0, "4": 2.0, "8": 2.0} and lines[2].speed_up is None


def test_loading_asks_what_is_known_of_this_machine(monkeypatch):
    """On Linux nothing is; with Metal, what was kept, under the wish for exactness."""
    asked = []

    def known(machine: Machine, *, exact: bool) -> dict[Any, Any]:
        asked.append(exact)
        return {}

    monkeypatch.setattr(mlx_mtp.pair, "known_verdicts", known)
    pair = mlx_mtp.pair.load("demo")
    assert asked == [] and {row.by for row in pair.kernel_table} == {"stock"}
    monkeypatch.setattr(mlx_mtp.pair, "this_machine", mac)
    monkeypatch.setattr(mlx_mtp.pair, "free_bytes", lambda: 2**34)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    for exact in (False, True):
        pair = mlx_mtp.pair.load("demo", exact=exact, dtype=mx.float32)
    assert asked == [False, True]
    assert {row.reason for row in pair.kernel_table} == {"not tested yet on this chip"}


def test_doctor_shows_what_was_found_on_a_mac(monkeypatch):
    place = place_of(mac())
    loser = Operation("project", (704, 2816), "8-bit affine, groups of 64, bfloat16")
    found = {PLACE: outcome(PLACE), OTHER: outcome(OTHER, WRONG), loser: outcome(loser, SCALAR, ours=200.0)}
    monkeypatch.setattr("mlx_mtp.machine.this_machine", mac)
    before = diagnose()
    assert "were not tested here yet" in before.kernels and before.kernel_lines == ()
    write_outcomes(place, found)
    diagnosis = diagnose()
    assert diagnosis.kernels.startswith("1 of 3 operations by our own Metal kernels")
    text = as_text(diagnosis, 400)
    [row] = [line for line in text.splitlines() if "2816x2112" in line]
    assert "ours" in row and "4: 2.00x" in row
    assert "failed: 1 row: 3 of 9 values" in text and "slower than stock: 0.50x" in text
    [told] = [line for line in diagnosis.as_json()["kernel_lines"] if line["shape"] == [2816, 2112]]
    assert told["by"] == "ours" and told["speed_up"] == {"1": 2.0, "4": 2.0, "8": 2.0}
    json.dumps(diagnosis.as_json(), allow_nan=False)
    for columns in (40, 80):
        for line in kernel_table(lines_of_outcomes(found), columns).splitlines():
            assert columns_of(line) <= columns or " " not in line.strip()


def test_doctor_says_when_the_file_was_damaged(monkeypatch):
    monkeypatch.setattr("mlx_mtp.machine.this_machine", mac)
    write_outcomes(place_of(mac()), {PLACE: outcome(PLACE)})
    kept_file().write_text("{")
    [check] = [check for check in diagnose().checks if check.name == "kernel results"]
    assert check.status == "warning" and "not JSON" in check.found and diagnose().is_usable


def test_doctor_on_linux_and_of_other_machines():
    assert diagnose().kernels == "stock MLX operations: no Metal here" and diagnose().kernel_lines == ()
    assert "until our kernels were tested" in diagnose(mac()).kernels


def test_doctor_kernels_on_linux():
    done = run_cli("doctor", "--kernels", "demo", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["unfinished"] == "no Metal here" and len(told["kernels"]) > 10
    assert {line["by"] for line in told["kernels"]} == {"stock"}
    assert {line["reason"] for line in told["kernels"]} == {"no Metal on this machine"}
    text = run_main("doctor", "--kernels", "demo").stdout.decode()
    assert "no Metal on this machine" in text and text.rstrip().endswith("by stock MLX")


@pytest.mark.parametrize("words", [("--report",), ("--machine", MACHINES / "m1_16.json")])
def test_kernels_are_tested_here_and_for_themselves(words):
    done = run_main("doctor", "--kernels", *words)
    assert done.returncode == 2 and b"--kernels tests this machine alone" in done.stderr
