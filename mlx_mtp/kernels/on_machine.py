"""When kernels are tested on the machine: after a first reply, for those who ask; it counts from the next load on."""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_mtp.admission import gigabytes
from mlx_mtp.errors import KernelError
from mlx_mtp.kernels.families import FAMILIES, key_of
from mlx_mtp.kernels.operations import ATTEND_TILED, AttentionShape, Operation, Subject, operations_of
from mlx_mtp.kernels.results import Outcome, Place, place_of, read_outcomes, verdicts_of, write_outcomes
from mlx_mtp.kernels.self_test_run import COMMAND, Job, Limits, Run
from mlx_mtp.kernels.specimens import bytes_of, describe
from mlx_mtp.machine import Machine, free_bytes, this_machine

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair

ROWS = (1, 2, 4, 8)  # what a round's passes have, with 0 to 7 drafts
DRAFTER_ROWS = (1,)
CHUNK_ROWS = (512,)
SPARE_BYTES = 2 << 30  # that must stay free beside the specimens

NO_METAL = "no Metal here"
NO_PROCESS = "a program that is packed into one file cannot start the process that kernels are tested in"


class Plan(NamedTuple):
    """What is left to find out about a pair's operations here; `reason` says why nothing is done, None if it is."""

    place: Place | None
    jobs: tuple[Job, ...]
    reason: str | None


class Summary(NamedTuple):
    """What became of a run: operations now known, how many of those are ours from the next load on, what was left."""

    known: int
    ours: int
    unfinished: str | None


def plan_for(pair: "Pair", machine: Machine | None = None) -> Plan:
    """Which operations a kernel supports and nobody has tested and raced to an end here. Raises nothing."""
    machine = machine or this_machine()
    if not machine.has_metal:
        return Plan(None, (), NO_METAL)
    if "frozen" in vars(sys) or not sys.executable:
        return Plan(None, (), NO_PROCESS)
    try:
        place = place_of(machine)
        known = read_outcomes(place).outcomes
    except (KernelError, OSError) as error:
        return Plan(None, (), str(error))
    jobs = tuple(job for job in jobs_of(pair) if not _is_settled(known.get(job.operation)))
    needed = SPARE_BYTES + max((3 * bytes_of(job.description) for job in jobs), default=0)
    if jobs and free_bytes() < needed:
        return Plan(
            place, (), f"testing kernels takes up to {gigabytes(needed)} of memory, which is short now"
        )
    return Plan(place, jobs, None)


def jobs_of(pair: "Pair") -> list[Job]:
    """Every operation of the pair that a kernel supports, as it is to be tested and raced."""
    own = operations_of(pair.target, None)
    return [
        Job(operation, describe(subject), _rows(operation, operation in own))
        for operation, subject in operations_of(pair.target, pair.drafter).items()
        if _is_supported(operation.name, subject)
    ]


def run_of(
    plan: Plan,
    *,
    limits: Limits | None = None,
    command: Sequence[str] = COMMAND,
    settings: dict[str, Any] | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> Run:
    """A run over the plan's jobs that keeps each outcome as it comes; `play` it, from any thread."""
    place = plan.place

    def keep(outcome: Outcome) -> None:
        if place is not None:
            write_outcomes(place, {outcome.operation: outcome})
        on_outcome(outcome)

    return Run(plan.jobs, limits=limits, command=command, settings=settings, on_outcome=keep)


def run_after_first_reply(pair: "Pair", machine: Machine | None = None, **how: Any) -> Summary:
    """Test and race what is not known yet, in another process and within limits (`how`: as `run_of`); keep it.

    For programs to call once a reply has been given; nothing in the library calls it by itself. It takes up to some
    minutes the first time and no time later. The verdicts apply to pairs that are loaded from then on. Raises nothing
    that a kernel does.
    """
    plan = plan_for(pair, machine)
    unfinished = plan.reason
    if plan.jobs:
        unfinished = run_of(plan, **how).play().unfinished
    return summary_of(pair, plan, unfinished)


def summary_of(pair: "Pair", plan: Plan, unfinished: str | None) -> Summary:
    """Counted over the pair's operations that a kernel supports."""
    if plan.place is None:
        return Summary(0, 0, unfinished)
    outcomes = read_outcomes(plan.place).outcomes
    verdicts = verdicts_of(outcomes)
    own = [job.operation for job in jobs_of(pair) if job.operation in outcomes]
    return Summary(len(own), sum(verdicts[operation].use for operation in own), unfinished)


def _is_supported(name: str, subject: Subject) -> bool:
    family = FAMILIES.get(key_of(name, subject))
    if family is None:
        return False
    parts = (subject,) if isinstance(subject, AttentionShape) else subject
    return family.unsupported(*parts) is None


def _is_settled(outcome: Outcome | None) -> bool:
    return outcome is not None and outcome.is_settled


def _rows(operation: Operation, is_targets: bool) -> tuple[int, ...]:
    if operation.name == ATTEND_TILED:
        return CHUNK_ROWS
    return ROWS if is_targets else DRAFTER_ROWS
