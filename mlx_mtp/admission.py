"""Whether a model or a prompt may take the memory it needs: asked before a download, a load and a prefill."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from mlx_mtp.errors import MemoryRefusal

if TYPE_CHECKING:
    from mlx_mtp.machine import Machine
    from mlx_mtp.memory import MemoryEstimate

GIB = 2**30  # what Apple calls a GB of memory

# A Mac whose wired memory leaves the system too little freezes rather than swaps: 16 GB Macs did with everything wired
# that Metal recommends (10.7 GB), and got better once a third, at least 8 GB, was left (osaurus' vmlx-swift, PR 421).
RESERVED_SHARE, RESERVED_AT_LEAST, RESERVED_AT_MOST = 0.35, 8 * GIB, 40 * GIB
RESERVED_SHARE_ELSEWHERE = 0.1  # a CPU's memory is not wired; this is room for other programs

SMALLEST_CONTEXT = 1024


def budget_bytes(machine: "Machine") -> int:
    """What models may take on this machine at most, whatever else runs: its memory less a reserve for the system."""
    memory = machine.memory_bytes
    if machine.system != "Darwin":
        return memory - int(memory * RESERVED_SHARE_ELSEWHERE)
    reserve = min(max(int(memory * RESERVED_SHARE), RESERVED_AT_LEAST), RESERVED_AT_MOST, memory // 2)
    if machine.gpu_budget_bytes is None:
        return memory - reserve
    return min(machine.gpu_budget_bytes, memory - reserve)


def admit_model(
    estimate: "MemoryEstimate",
    machine: "Machine",
    *,
    free: int | None,
    name: str,
    context: int,
    estimate_at: Callable[[int], "MemoryEstimate"] | None = None,
) -> None:
    """Refuse a model that exceeds the machine's budget or, where given, what is `free` (live, before loading).

    `estimate` is for `context` tokens; with `estimate_at` the refusal says which smaller context would fit. Raises
    MemoryRefusal with the figures and what to do instead.
    """
    budget = budget_bytes(machine)
    room = budget if free is None else min(budget, free)
    if estimate.total <= room:
        return
    needs = f"{name} needs {gigabytes(estimate.total)} at a context of {context:,} tokens"
    smaller = _context_that_fits(estimate_at, context, room)
    if estimate.total > budget:
        has = (
            f"models may take {gigabytes(budget)} of this machine's {gigabytes(machine.memory_bytes)}, "
            "the rest is left to the system"
        )
        remedies = [*smaller, *_recommended(machine, room, other_than=name)]
        last_resort = "use a machine with more memory"
    else:
        has = f"{gigabytes(room)} can be taken now without swapping"
        remedies = ["close other programs", *smaller, *_recommended(machine, room, other_than=name)]
        last_resort = ""
    raise MemoryRefusal(f"{needs}, and {has}; {', or '.join(remedies) or last_resort}")


def admit_prefill(needed_bytes: int, free: int) -> None:
    """Refuse a prompt whose K/V rows and scratch do not fit into `free` bytes, before any of it is allocated."""
    if needed_bytes <= free:
        return
    raise MemoryRefusal(
        f"this prompt with its reply needs {gigabytes(needed_bytes)} more, and {gigabytes(free)} can be taken now "
        "without swapping; close other programs, shorten the prompt or lower max_tokens"
    )


def gigabytes(count: int) -> str:
    """Bytes as macOS counts memory: 2**30 to the GB."""
    return f"{count / GIB:.1f} GB"


def _context_that_fits(
    estimate_at: Callable[[int], "MemoryEstimate"] | None, context: int, room: int
) -> list[str]:
    """A remedy naming the largest power of two below `context` at which the model fits, if there is one."""
    if estimate_at is None or context <= SMALLEST_CONTEXT:
        return []
    smaller = 1 << (context - 1).bit_length() - 1
    while smaller >= SMALLEST_CONTEXT:
        if estimate_at(smaller).total <= room:
            return [f"load it with max_context={smaller} (--context {smaller})"]
        smaller //= 2
    return []


def _recommended(machine: "Machine", room: int, *, other_than: str) -> list[str]:
    """A remedy with another alias, the one recommended for this machine if that fits now."""
    from mlx_mtp.recommend import instead_of  # asks for a budget in its turn

    found = instead_of(other_than, machine, room)
    return [] if found is None else [f"use {found[0].name}, which needs {gigabytes(found[1].total)}"]
