"""Which model suits a machine: the strongest of a short list that its memory admits with room for a conversation."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_mtp.admission import GIB, budget_bytes, gigabytes
from mlx_mtp.aliases import ALIASES, Alias, alias_of, find_alias
from mlx_mtp.errors import MemoryRefusal
from mlx_mtp.memory import MemoryEstimate, estimate_memory

if TYPE_CHECKING:
    from mlx_mtp.machine import Machine

CONTEXT = 8192  # tokens that a recommended model must have room for
SMALLER_CONTEXTS = (4096, 2048)  # for the smallest model only
# Installed memory in GB from which each is recommended, the strongest first. The first two are dense: a token reads
# all of their weights, so that 48 GB, where 31b:4bit fits, are better used by 26b, which reads a tenth as many bytes.
TIERS = (
    (96, "31b:8bit"),
    (64, "31b:4bit"),
    (32, "26b:4bit"),
    (24, "12b:4bit"),
    (16, "e4b:4bit"),
    (0, "e2b:4bit"),
)
TOLD_OF_INSTALLED = 0.9  # Linux and virtual machines tell less than is installed
LARGER = "Larger models leave the system too little of this memory, or answer slowly."
WHY = {
    "31b": "It is the strongest of the family; 26b:4bit reads a tenth of the bytes a token, and is the faster one.",
    "26b": "Of its 26B weights a token uses 4B, so it is fast for its strength.",
    "12b": LARGER,
    "e4b": LARGER,
    "e2b": "It is the smallest of the family.",
}


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The model for a machine, its estimate at `context` tokens, the reason in words, and what else fits there."""

    alias: Alias
    estimate: MemoryEstimate
    reason: str
    alternatives: tuple[Alias, ...]
    context: int = CONTEXT


def recommend(machine: "Machine") -> Recommendation:
    """The model to start with on `machine`, by its memory and what models may take of it, whatever runs now.

    Raises MemoryRefusal where not even the smallest model fits.
    """
    budget = budget_bytes(machine)
    for least, name in TIERS:
        if machine.memory_bytes < least * GIB * TOLD_OF_INSTALLED:
            continue
        alias = _named(name)
        contexts = (CONTEXT, *SMALLER_CONTEXTS) if least == 0 else (CONTEXT,)
        for context in contexts:
            estimate = estimate_on(machine, alias, context)
            if estimate.total <= budget:
                return Recommendation(
                    alias=alias,
                    estimate=estimate,
                    reason=_reason(alias, estimate, context, machine, budget),
                    alternatives=_alternatives(alias, machine, budget),
                    context=context,
                )
    raise MemoryRefusal(
        f"the smallest model, {alias.name}, needs {gigabytes(estimate.total)} at a context of {context:,} tokens, and "
        f"models may take {gigabytes(budget)} of this machine's {gigabytes(machine.memory_bytes)}; "
        "use a machine with more memory, or try the tiny pair that comes with this package, demo"
    )


def instead_of(name: str, machine: "Machine", room: int) -> tuple[Alias, MemoryEstimate] | None:
    """What to use where the model `name` does not fit into `room` bytes: the recommended one, else the strongest other.

    None where nothing else fits, or the machine is too small for any.
    """
    try:
        choice = recommend(machine)
    except MemoryRefusal:
        return None
    refused = find_alias(name) or alias_of(name)
    for alias in (choice.alias, *choice.alternatives):
        estimate = estimate_on(machine, alias, choice.context)
        if alias != refused and estimate.total <= room:
            return alias, estimate
    return None


def estimate_on(machine: "Machine", alias: Alias, context: int = CONTEXT) -> MemoryEstimate:
    """What an alias takes on this machine: a CPU casts what is not quantised, and all activations, to float32."""
    return estimate_memory(alias.name, context, dtype=None if machine.has_metal else "float32")


def _named(name: str) -> Alias:
    return next(alias for alias in ALIASES if alias.name == name)


def _reason(alias: Alias, estimate: MemoryEstimate, context: int, machine: "Machine", budget: int) -> str:
    takes = (
        f"It takes about {gigabytes(estimate.total)} with {context:,} tokens of context; models may take "
        f"{gigabytes(budget)} of this machine's {gigabytes(machine.memory_bytes)}."
    )
    where = () if machine.has_metal else ("There is no Metal here: it runs on the CPU, which is slow.",)
    return " ".join((WHY[alias.size], takes, *where))


def _alternatives(chosen: Alias, machine: "Machine", budget: int) -> tuple[Alias, ...]:
    """What else fits at the full context: the other sizes in 4 bits and the chosen one in 4 or 8, largest first."""
    others = [
        alias
        for alias in reversed(ALIASES)
        if alias != chosen and (alias.bits == 4 or (alias.size == chosen.size and alias.bits == 8))
    ]
    return tuple(alias for alias in others if estimate_on(machine, alias).total <= budget)
