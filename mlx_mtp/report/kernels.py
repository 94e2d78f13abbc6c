"""Our kernels on this chip: right or not, times against stock MLX, and in which order a matrix unit adds."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from mlx_mtp.kernels.chooser import choose_kernels
from mlx_mtp.kernels.on_machine import plan_for, run_of
from mlx_mtp.kernels.results import Known, place_of, raced_entry, read_outcomes, verdicts_of
from mlx_mtp.kernels.self_test_run import Limits
from mlx_mtp.report.protocol import Deadline, Found, NotHere
from mlx_mtp.report.setting import Setting

ORDER = (sys.executable, "-m", "mlx_mtp.kernels.multiply_accumulate")
ORDER_SECONDS = 45.0


def matrix_order(setting: Setting, found: Found, deadline: Deadline) -> None:
    """Whether an 8x8x8 multiply-accumulate is a fixed chain of fma: what decides between the bodies of a product."""
    if not setting.machine.has_metal:
        raise NotHere("no Metal here")
    found.update(order_here(min(ORDER_SECONDS, deadline.left)))


def order_here(seconds: float, command: Sequence[str] = ORDER) -> dict[str, Any]:
    """The answer for each type of operands, or `failed`: in another process, whatever it does there."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, start_new_session=True
        )
        answer: Any = json.loads(done.stdout) if done.returncode == 0 else None
    except subprocess.TimeoutExpired:
        return {"failed": f"hung for {seconds:.0f} s"}
    except (OSError, ValueError) as error:
        return {"failed": f"{type(error).__name__}: {error}"[:200]}
    if not isinstance(answer, dict):
        return {
            "failed": f"ended with {done.returncode}: {done.stderr.decode(errors='replace').strip()[-200:]}"
        }
    return answer


def kernels(setting: Setting, found: Found, deadline: Deadline) -> None:
    """Every operation of the pair: by whom, why, and the times; what was not known is tested and raced first."""
    pair, machine = setting.the_pair, setting.machine
    plan = plan_for(pair, machine)
    if plan.jobs:
        run = run_of(plan, limits=Limits(total=max(deadline.left - 5, 1)))
        found["unfinished"] = run.play().unfinished
    else:
        found["unfinished"] = plan.reason
    known = read_outcomes(plan.place or place_of(machine)) if machine.has_metal else Known({}, None)
    choice = choose_kernels(
        pair.target, pair.drafter, has_metal=machine.has_metal, verdicts=verdicts_of(known.outcomes)
    )
    found["operations"] = []
    for row in choice.rows:
        outcome = known.outcomes.get(row.operation)
        found["operations"].append(
            {
                "operation": row.operation.name,
                "shape": list(row.operation.shape),
                "format": row.operation.format,
                "by": row.by,
                "reason": row.reason,
                "bits_equal_by_matrix_units": None if outcome is None else outcome.tested.are_equal,
                "us_by_rows": None
                if outcome is None or outcome.raced is None
                else raced_entry(outcome.raced),
            }
        )
    found["ours"] = sum(row.by == "ours" for row in choice.rows)
