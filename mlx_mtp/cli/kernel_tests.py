"""Testing our kernels on this machine: while a chat waits for its user, or at once for `doctor --kernels`."""

import json
import sys
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from mlx_mtp.cli.terminal import say, write_answer

if TYPE_CHECKING:
    from mlx_mtp.kernels.on_machine import Plan
    from mlx_mtp.kernels.self_test_run import Run
    from mlx_mtp.pair import Pair

BEGINS = (
    "(our Metal kernels are tested on this chip while you type, once and for {minutes} minutes at most; what passes is "
    "used from the next start on)"
)
ENDED = "(kernels tested: {ours} of {known} operations are ours from the next start on; mlx-mtp doctor shows which)"
JOIN_SECONDS = 15.0  # the process is killed, and that does not take long


class KernelTests:
    """Tests that run while somebody types and stand still while a reply is made; what was found is kept at once."""

    def __init__(self, pair: "Pair"):
        self._pair = pair
        self._plan: Plan | None = None
        self._run: Run | None = None
        self._thread: threading.Thread | None = None
        self._left: float | None = None  # seconds that all runs together may still take
        self._begun = 0.0
        self._is_over = sys.stdin is None or not sys.stdin.isatty()  # nobody types

    def resume(self) -> None:
        """Go on with what is left; the first time, say so."""
        if self._is_over:
            return
        from mlx_mtp.kernels.on_machine import plan_for, run_of
        from mlx_mtp.kernels.self_test_run import Limits

        is_first, self._plan = self._plan is None, plan_for(self._pair)
        if not self._plan.jobs:
            self._is_over = True
            return
        if is_first or self._left is None:
            self._left = Limits().total
            say(BEGINS.format(minutes=round(self._left / 60)))
        self._begun = time.monotonic()
        self._run = run_of(self._plan, limits=Limits(total=self._left))
        self._thread = threading.Thread(target=self._run.play, daemon=True)
        self._thread.start()

    def pause(self) -> None:
        """Stop until `resume`; if all is done, say what came of it."""
        if self._run is None or self._thread is None or self._plan is None:
            return
        self._run.stop()
        self._thread.join(JOIN_SECONDS)
        self._left = max(0.0, (self._left or 0.0) - (time.monotonic() - self._begun))
        unfinished, self._run, self._thread = self._run.report.unfinished, None, None
        if unfinished is not None and unfinished.endswith("stopped"):
            return
        from mlx_mtp.kernels.on_machine import summary_of

        self._is_over = True
        summary = summary_of(self._pair, self._plan, unfinished)
        say(ENDED.format(ours=summary.ours, known=summary.known))
        if unfinished is not None:
            say(f"({unfinished})")


def show_kernels(model: str, *, yes: bool, as_json: bool) -> None:
    """Open `model`, test what is not known of its operations here, and write the table."""
    from mlx_mtp.cli.doctor_text import kernel_table
    from mlx_mtp.cli.layout import terminal_columns
    from mlx_mtp.cli.opening import Opening, opened
    from mlx_mtp.kernels.chooser import choose_kernels
    from mlx_mtp.kernels.listing import lines_of_rows, summary
    from mlx_mtp.kernels.on_machine import plan_for, run_of
    from mlx_mtp.kernels.results import place_of, read_outcomes, verdicts_of
    from mlx_mtp.machine import this_machine

    machine = this_machine()
    with opened(Opening(model, yes=yes)) as pair:
        plan = plan_for(pair, machine)
        unfinished = plan.reason
        if plan.jobs:
            say(f"testing {len(plan.jobs)} operations; Ctrl-C leaves, and what was found stays")
            run = run_of(
                plan, on_outcome=lambda outcome: say(f"{outcome.operation}: {outcome.tested.reason}")
            )
            try:
                unfinished = run.play().unfinished
            finally:
                run.stop()
        outcomes = read_outcomes(place_of(machine)).outcomes if machine.has_metal else {}
        verdicts = verdicts_of(outcomes)
        choice = choose_kernels(pair.target, pair.drafter, has_metal=machine.has_metal, verdicts=verdicts)
        lines = lines_of_rows(choice.rows, outcomes)
    if as_json:
        fields = {"model": model, "unfinished": unfinished, "kernels": [asdict(line) for line in lines]}
        write_answer(json.dumps(fields, indent=1) + "\n")
        return
    write_answer(f"{kernel_table(lines, terminal_columns(sys.stdout))}\n\n{summary(lines)}\n")
    if unfinished is not None:
        say(f"not tested: {unfinished}")
