"""Tests and races in another process, within limits: a kernel that crashes or hangs there is only a result here."""

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_mtp.kernels.operations import Operation
from mlx_mtp.kernels.results import Outcome, read_raced, read_tested
from mlx_mtp.kernels.self_test import Checked
from mlx_mtp.kernels.specimens import Description

COMMAND = (sys.executable, "-m", "mlx_mtp.kernels.self_test_process")
LEAST_LEFT = 1.0  # seconds for which no process is worth starting
KILL_SECONDS = 10.0  # a process that a GPU holds may not end at once, and nobody waits longer


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds: of one step (a call of a kernel in one arrangement, a race at one number of rows), of one operation, of
    all; starting the process counts as a step. `restarts`: of processes that ended badly."""

    step: float = 30.0
    operation: float = 60.0
    total: float = 240.0
    restarts: int = 4


@dataclass(frozen=True, slots=True)
class Job:
    """One operation to be tested, on a specimen of `description`, and raced on each of `rows` rows (none: not)."""

    operation: Operation
    description: Description
    rows: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        return {"name": self.operation.name, "description": self.description, "rows": list(self.rows)}


@dataclass(slots=True)
class Report:
    """Outcomes so far; `unfinished` says why not all were reached, None where they were."""

    outcomes: dict[Operation, Outcome] = field(default_factory=dict)
    unfinished: str | None = None


class Run:
    """One run over `jobs`, in the foreground by `play`, ended from another thread by `stop`."""

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        limits: Limits | None = None,
        command: Sequence[str] = COMMAND,
        settings: Mapping[str, Any] | None = None,
        on_outcome: Callable[[Outcome], None] = lambda outcome: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.report = Report()
        self._left = list(jobs)
        self._limits = limits or Limits()
        self._command = tuple(command)
        seconds = int(self._limits.total + KILL_SECONDS)
        self._settings = {"seconds": seconds, "columns": None, "sizes": None, "repeats": None}
        self._settings |= settings or {}
        self._on_outcome = on_outcome
        self._clock = clock
        self._stop = threading.Event()

    def stop(self) -> None:
        """End the process that runs; what it was doing is not recorded, and is done again another time."""
        self._stop.set()

    def play(self) -> Report:
        """Test everything that the limits allow. Raises nothing."""
        end = self._clock() + self._limits.total
        bad_ends = 0
        while self._left and not self._stop.is_set():
            if end - self._clock() < LEAST_LEFT:
                self._stays(f"{self._limits.total:.0f} s were used up")
                break
            reason = self._one_process(end)
            if reason is None:
                continue
            bad_ends += 1
            if bad_ends > self._limits.restarts:
                self._stays(f"{bad_ends} processes ended badly, the last one: {reason}")
                break
        if self._stop.is_set() and self._left:
            self._stays("stopped")
        return self.report

    def _stays(self, reason: str) -> None:
        self.report.unfinished = f"{len(self._left)} operations not reached: {reason}"

    def _one_process(self, end: float) -> str | None:
        """As many jobs as one process survives -> how it ended, None where it did all or was asked to stop."""
        try:
            child = _Child(self._command, {**self._settings, "operations": [j.as_json() for j in self._left]})
        except OSError as error:
            self._left.clear()
            self.report.unfinished = f"no process can be started: {error}"
            return None
        try:
            return self._follow(child, end)
        finally:
            child.kill()

    def _follow(self, child: "_Child", end: float) -> str | None:
        """Take in lines until the process ends, hangs or is stopped."""
        jobs, limits = list(self._left), self._limits
        begun = step_begun = self._clock()
        at, doing, tested = -1, "start", None
        while True:
            now = self._clock()
            until = min(step_begun + limits.step, begun + limits.operation, end)
            if at < 0:
                until = min(step_begun + limits.step, end)
            line = child.line(min(max(until - now, 0.0), 0.2))
            if self._stop.is_set():
                return None
            if line is None and self._clock() < until:
                continue
            if line is None:
                if until == end:
                    return None
                if until == step_begun + limits.step:
                    return self._failed(jobs, at, f"hung in: {doing}")
                return self._failed(jobs, at, f"not done within {limits.operation:.0f} s, at: {doing}")
            if line == {}:
                return self._failed(jobs, at, f"crashed in: {doing} ({child.how_it_ended()})")
            if "done" in line:
                return None
            step_begun = self._clock()
            if line.get("operation") not in range(len(jobs)):
                return self._failed(jobs, at, f"crashed in: {doing} (an answer that is none)")
            if line["operation"] != at:
                at, begun, tested = line["operation"], step_begun, None
            doing = line.get("step", doing)
            tested = self._take(jobs[at], line, tested)
            if "tested" in line:
                doing = "race"

    def _take(self, job: Job, line: dict[str, Any], tested: Checked | None) -> Checked | None:
        """One answer about `job`; -> what its self-test gave, once it has."""
        if job not in self._left:
            return tested
        try:
            return self._read_answer(job, line, tested)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._settle(job, Outcome(job.operation, Checked((), f"an answer that is none: {error!r}")))
            return None

    def _read_answer(self, job: Job, line: dict[str, Any], tested: Checked | None) -> Checked | None:
        if "raised" in line:
            self._settle(job, Outcome(job.operation, Checked((), f"raised {line['raised']}")))
        elif "tested" in line:
            tested = read_tested(line["tested"])
            if not tested.passed or not job.rows:
                self._settle(job, Outcome(job.operation, tested))
        elif "raced" in line and tested is not None:
            self._settle(job, Outcome(job.operation, tested, read_raced(line["raced"])))
        return tested

    def _failed(self, jobs: list[Job], at: int, how: str) -> str:
        """A kernel that ends or blocks its process has failed, also in a race after it was found right."""
        if at >= 0 and jobs[at] in self._left:
            self._settle(jobs[at], Outcome(jobs[at].operation, Checked((), how)))
        elif at < 0:  # it would end the same way again
            self._left.clear()
            self.report.unfinished = f"the test process {how}"
        return how

    def _settle(self, job: Job, outcome: Outcome) -> None:
        self._left.remove(job)
        self.report.outcomes[job.operation] = outcome
        self._on_outcome(outcome)


class _Child:
    """The process: its lines as they come, {} for its end."""

    def __init__(self, command: Sequence[str], asked: dict[str, Any]):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is not for it
        )
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._write, args=(json.dumps(asked).encode(),), daemon=True).start()
        threading.Thread(target=self._read, daemon=True).start()

    def line(self, seconds: float) -> dict[str, Any] | None:
        """The next answer, {} at the end, None if there is none within `seconds`."""
        try:
            return self._lines.get(timeout=seconds) if seconds else self._lines.get_nowait()
        except queue.Empty:
            return None

    def how_it_ended(self) -> str:
        try:
            code = self._process.wait(timeout=KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its output"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        self._process.kill()
        try:
            self._process.wait(timeout=KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return

    def _write(self, asked: bytes) -> None:
        assert self._process.stdin is not None
        try:
            with self._process.stdin as stream:
                stream.write(asked)
        except OSError:
            return  # it ended before it had read everything: `line` says so

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for text in stream:
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    break
                if not isinstance(line, dict) or not line:
                    break
                self._lines.put(line)
        self._lines.put({})
