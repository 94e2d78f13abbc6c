"""Tests of kernels in another process: whatever happens there is a result here, within the limits."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from kernel_pairs import quantised_pair
from mlx_mtp.cli import kernel_tests
from mlx_mtp.cli.chat import _converse
from mlx_mtp.cli.interrupts import Interrupts
from mlx_mtp.kernels import on_machine
from mlx_mtp.kernels.on_machine import jobs_of, plan_for, run_after_first_reply, run_of
from mlx_mtp.kernels.operations import ATTEND_TILED, Operation, operations_of
from mlx_mtp.kernels.results import place_of, read_outcomes, verdicts_of
from mlx_mtp.kernels.self_test_run import Job, Limits, Run
from mlx_mtp.machine import Machine, read_machine
from mlx_mtp.report.kernels import order_here
from self_test_cases import FORMS, clustered

HERE = Path(__file__).parent
CHILD = (sys.executable, str(HERE / "metal_child.py"))
SETTINGS = {"sizes": [2, 5], "columns": 72, "repeats": 1}
PATIENT = Limits(step=60, operation=120, total=240)
GIGA = 2**30


def job(form: str, rows: tuple[int, ...] = ()) -> Job:
    weight = {**FORMS[form], "shape": [72, 96]} if form != "4-bit" else {**FORMS[form], "shape": [72, 128]}
    operation = Operation("project", (weight["shape"][1], 72), form)
    return Job(operation, {"weight": weight, "dtype": "bfloat16"}, rows)


HEAD = Job(Operation("centroid_choose", (128, 32, 8, 8), "clusters"), clustered(), ())


def mac() -> Machine:
    return read_machine(HERE / "machines" / "m4_pro_24.json")


@pytest.fixture(autouse=True)
def child_finds_the_tests(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{HERE.parent}:{HERE}")


def run(jobs: list[Job], *fault: str, limits: Limits = PATIENT, **how: Any) -> Run:
    return Run(jobs, limits=limits, command=(*CHILD, *fault), settings=SETTINGS, **how)


def scripted(code: str, jobs: list[Job], limits: Limits = PATIENT) -> Run:
    """A process that does something else than test kernels."""
    return Run(jobs, limits=limits, command=(sys.executable, "-c", code))


def test_right_kernels_are_tested_and_raced(monkeypatch):
    """Nothing comes back that the self-test and the race did not say."""
    outcomes = []
    report = run([job("4-bit", (1, 2)), HEAD], on_outcome=outcomes.append).play()
    assert report.unfinished is None and list(report.outcomes.values()) == outcomes
    first, head = outcomes
    assert first.tested.bodies == ("scalar", "matrix") and first.tested.are_equal
    assert set(first.raced.times) == {1, 2} and set(first.raced.times[1]) == {"stock", "scalar", "matrix"}
    assert all(time.median > 0 for time in first.raced.times[2].values())
    assert head.tested.bodies == ("scalar",) and head.raced is None


@pytest.mark.parametrize(
    "fault, words",
    [
        ("wrong_value", "1 row: "),
        ("other_bits_by_rows", "5 rows at once: "),
        ("raises", "raised RuntimeError: [metal::Device]"),
        ("is_killed", "crashed in: 1 row (SIGSEGV)"),
    ],
)
def test_a_broken_kernel_fails_and_the_next_is_tested(fault, words):
    jobs = [job("4-bit", (1,)), job("dense")]
    report = run(jobs, fault).play()
    broken, right = (report.outcomes[own.operation] for own in jobs)
    assert not broken.tested.passed and broken.raced is None
    assert broken.tested.reason.startswith(words) or words in broken.tested.reason
    verdict = verdicts_of(report.outcomes)[jobs[0].operation]
    assert not verdict.use and verdict.reason == f"failed: {broken.tested.reason}"
    assert right.tested.passed and report.unfinished is None


@pytest.mark.parametrize("fault", ["sleeps", pytest.param("spins", marks=pytest.mark.slow)])
def test_a_kernel_that_hangs_is_ended_at_its_limit(fault):
    limits = Limits(step=6, operation=60, total=60)
    begun = time.monotonic()
    report = run([job("4-bit")], fault, limits=limits).play()
    assert time.monotonic() - begun < 30
    assert report.outcomes[job("4-bit").operation].tested.reason == "hung in: 1 row"


def test_what_a_kernel_prints_is_no_answer():
    report = run([job("4-bit")], "prints").play()
    assert report.outcomes[job("4-bit").operation].tested.passed and report.unfinished is None


def test_an_operation_that_goes_on_for_too_long_is_ended():
    """Each step is quick, and there is no end of them."""
    code = """
import json, time
while True:
    print(json.dumps({"operation": 0, "step": "again"}), flush=True)
    time.sleep(0.05)
"""
    report = scripted(code, [job("4-bit")], Limits(step=20, operation=1, total=60)).play()
    assert report.outcomes[job("4-bit").operation].tested.reason == "not done within 1 s, at: again"


def test_all_of_it_ends_at_the_total_limit():
    begun = time.monotonic()
    code = "import time; time.sleep(600)"
    report = scripted(code, [job("4-bit"), job("dense")], Limits(total=2)).play()
    assert time.monotonic() - begun < 20
    assert not report.outcomes
    assert report.unfinished == "2 operations not reached: 2 s were used up"


@pytest.mark.parametrize(
    "code, words",
    [
        ("raise SystemExit(7)", "the test process crashed in: start (exit code 7)"),
        ("import os; os.abort()", "crashed in: start (SIGABRT)"),
        (
            "print('no JSON', flush=True); import time; time.sleep(600)",
            "crashed in: start (closed its output)",
        ),
        ("print('[1]', flush=True)", "crashed in: start"),
        ("print('{\"operation\": 5}', flush=True)", "an answer that is none"),
    ],
)
def test_a_process_that_does_not_answer_is_no_verdict_on_any_kernel(code, words, monkeypatch):
    monkeypatch.setattr("mlx_mtp.kernels.self_test_run.KILL_SECONDS", 2.0)
    report = scripted(code, [job("4-bit")]).play()
    assert report.outcomes == {} and words in str(report.unfinished)


@pytest.mark.parametrize(
    "answer",
    [
        {"tested": {"bodies": "all"}},
        {"tested": 1},
        {"tested": {"bodies": ["simd"], "reason": "", "are_equal": True}},
    ],
)
def test_an_answer_that_is_none_fails_its_kernel(answer):
    code = f"import json; print(json.dumps({{'operation': 0, **{answer!r}}})); print('{{\"done\": true}}')"
    report = scripted(code, [job("4-bit")]).play()
    assert "an answer that is none" in report.outcomes[job("4-bit").operation].tested.reason


def test_no_process_can_be_started():
    report = Run([job("4-bit")], command=("/nonexistent/python",)).play()
    assert not report.outcomes and "no process can be started" in str(report.unfinished)


def test_processes_that_end_badly_are_not_started_without_end():
    code = """
import json, os, sys
for i, one in enumerate(json.load(sys.stdin)["operations"]):
    print(json.dumps({"operation": i, "step": "1 row"}), flush=True)
    os.abort()
"""
    jobs = [Job(Operation("project", (i, 1), ""), {}, ()) for i in range(9)]
    report = scripted(code, jobs, Limits(restarts=2)).play()
    assert len(report.outcomes) == 3
    assert "6 operations not reached: 3 processes ended badly" in str(report.unfinished)


def test_stop_ends_it_soon_and_judges_nothing():
    slow = scripted("import time; time.sleep(600)", [job("4-bit")])
    thread = threading.Thread(target=slow.play)
    thread.start()
    time.sleep(0.5)
    begun = time.monotonic()
    slow.stop()
    thread.join(10)
    assert not thread.is_alive() and time.monotonic() - begun < 5
    assert not slow.report.outcomes and slow.report.unfinished == "1 operations not reached: stopped"


def test_the_real_process_says_that_there_is_no_metal_here():
    """Without the runner in Metal's place, on this machine: each kernel fails, and nothing else happens."""
    report = Run([job("4-bit"), job("dense")], settings=SETTINGS).play()
    assert report.unfinished is None
    for outcome in report.outcomes.values():
        assert not outcome.tested.passed and "No Metal back-end" in outcome.tested.reason


def test_a_pair_is_tested_once_on_a_mac(monkeypatch):
    """Every operation with a kernel; what was found is not looked for again, and what was unclear is."""
    pair = quantised_pair("e2b", dtype=mx.bfloat16)
    jobs = jobs_of(pair)
    assert {own.operation for own in jobs} == set(operations_of(pair.target, pair.drafter))
    drafters = operations_of(pair.target, pair.drafter).keys() - operations_of(pair.target, None).keys()
    assert {own.rows for own in jobs if own.operation in drafters} == {(1,)}
    assert {own.rows for own in jobs if own.operation.name == ATTEND_TILED} == {(512,)}

    monkeypatch.setattr(on_machine, "free_bytes", lambda: 16 * GIGA)
    plan = plan_for(pair, mac())
    assert plan.reason is None and len(plan.jobs) == len(jobs)
    monkeypatch.setattr(on_machine, "jobs_of", lambda pair: [job("4-bit", (1,)), job("dense")])
    how = {"command": CHILD, "settings": SETTINGS, "limits": PATIENT}
    first = run_after_first_reply(pair, mac(), **how)
    assert first.known == 2 and first.unfinished is None
    known = read_outcomes(place_of(mac())).outcomes
    assert set(known) == {job("4-bit").operation, job("dense").operation}
    settled = {own.operation for own in known.values() if own.is_settled}
    left = {own.operation for own in plan_for(pair, mac()).jobs}
    assert left == set(known) - settled and job("dense").operation in left  # right, but not raced


def test_nothing_is_started_where_it_cannot_be(monkeypatch):
    pair = quantised_pair("31b", dtype=mx.bfloat16)

    def forbidden(*args: Any, **how: Any) -> Any:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    assert run_after_first_reply(pair).unfinished == "no Metal here"  # Linux
    monkeypatch.setattr(on_machine, "free_bytes", lambda: GIGA)
    assert "memory, which is short now" in str(run_after_first_reply(pair, mac()).unfinished)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    summary = run_after_first_reply(pair, mac())
    assert summary.known == 0 and "packed into one file" in str(summary.unfinished)


def test_generating_starts_no_test():
    """In a library nothing is measured unasked; loading does not even import what measures."""
    code = """
import subprocess, sys
subprocess.Popen = None
import mlx_mtp
pair = mlx_mtp.load("demo")
mlx_mtp.generate(pair, "def f(", max_tokens=4)
assert "mlx_mtp.kernels.on_machine" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


class Typist:
    """Somebody at a terminal, for `sys.stdin`."""

    def isatty(self) -> bool:
        return True


def test_a_chat_tests_while_somebody_types(monkeypatch, capsys):
    pair = quantised_pair("31b", dtype=mx.bfloat16)
    monkeypatch.setattr(kernel_tests.sys, "stdin", Typist())
    monkeypatch.setattr(on_machine, "this_machine", mac)
    monkeypatch.setattr(on_machine, "free_bytes", lambda: 16 * GIGA)
    monkeypatch.setattr(on_machine, "jobs_of", lambda pair: [job("4-bit", (1,)), job("dense")])

    def of(plan: Any, **how: Any) -> Run:
        return run_of(plan, command=CHILD, settings=SETTINGS, **how)

    monkeypatch.setattr("mlx_mtp.kernels.on_machine.run_of", of)
    tests = kernel_tests.KernelTests(pair)
    tests.resume()
    tests.pause()  # a message at once: nothing is known yet, and nothing is said
    said = capsys.readouterr().err
    assert "tested on this chip while you type" in said.replace("\n", " ") and "kernels tested" not in said
    tests.resume()
    assert tests._thread is not None
    tests._thread.join(60)
    tests.pause()
    said = capsys.readouterr().err
    assert "kernels tested: " in said and " of 2 operations" in said
    tests.resume()
    assert tests._thread is None and capsys.readouterr().err == ""


def test_a_chat_tests_after_its_first_reply_and_never_during_one(monkeypatch):
    events: list[str] = []

    class Chat:
        stats = None
        talk = SimpleNamespace(options=SimpleNamespace(num_draft_tokens="auto"))

        def say(self, text: str) -> None:
            events.append("reply")
            self.stats = 1

    class Tests:
        def resume(self) -> None:
            events.append("test")

        def pause(self) -> None:
            events.append("stop")

    class Calibration:
        def play(self) -> None:
            events.append("time")

    lines = iter(["", "Why?", "/help", "And then?"])

    def read() -> str:
        events.append("wait")
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    _converse(Chat(), read, Interrupts(), Tests(), Calibration())
    waits = ["time", "test", "wait", "stop"]
    assert events == ["wait", "stop", "wait", "stop", "reply", *waits, *waits, "reply", *waits]


def test_a_chat_without_metal_or_without_a_terminal_tests_nothing(monkeypatch, capsys):
    pair = quantised_pair("31b", dtype=mx.bfloat16)
    for stdin in (Typist(), None):
        monkeypatch.setattr(kernel_tests.sys, "stdin", stdin)
        tests = kernel_tests.KernelTests(pair)
        tests.resume()
        tests.pause()
        assert capsys.readouterr().err == ""


def test_the_order_of_sums_is_asked_in_another_process():
    assert "No Metal back-end" in order_here(60)["failed"]
    assert order_here(1, (sys.executable, "-c", "import time; time.sleep(60)")) == {"failed": "hung for 1 s"}
    assert "ended with -6" in order_here(60, (sys.executable, "-c", "import os; os.abort()"))["failed"]
    assert order_here(60, (sys.executable, "-c", "print('[')"))["failed"].startswith("JSONDecodeError")
    answer = {"float32": {"is_ours": True}}
    assert order_here(60, (sys.executable, "-c", f"print({json.dumps(json.dumps(answer))})")) == answer
