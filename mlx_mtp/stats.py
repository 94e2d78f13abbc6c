"""Every figure about a generation, each with its formula."""

from dataclasses import dataclass, field

from mlx_mtp.decode import Step


@dataclass(frozen=True, slots=True)
class Stats:
    """One row's generation so far; rates are per second of wall time."""

    prompt_tokens: int = 0
    reused_tokens: int = 0  # prompt tokens whose K/V was there already
    generation_tokens: int = 0
    rounds: int = 0
    drafted: int = 0  # drafts that were verified
    accepted: int = 0  # drafts that were emitted
    accepted_by_position: tuple[int, ...] = ()  # how often the draft at each position was emitted
    num_draft_tokens: tuple[int, ...] = ()  # drafts verified, per round
    prompt_tps: float = 0.0  # (prompt_tokens - reused_tokens) / prefill time
    generation_tps: float = 0.0  # tokens after the first / time since the first
    ttft_s: float = 0.0  # from the call to the first token
    peak_memory_bytes: int = 0
    parked: bool = False
    reason: str | None = None
    warning: str | None = None  # the drafter hardly ever guesses right (see `fit`)
    seed: int | None = None
    exact: bool | None = (
        None  # promise (a): bitwise the text of MTP off; None: not asked yet (`Pair.exactness`)
    )
    exactness_tax: float | None = (
        None  # plain decoding's time on our kernels / on stock ones; None: not measured
    )

    @property
    def tokens_per_round(self) -> float:
        """Tokens emitted / rounds; counts the target's own, leaves out the one that prefill gives."""
        return (self.generation_tokens - 1) / self.rounds if self.rounds else 0.0

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted / drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass(slots=True)
class RowCount:
    """Adds up one row's steps."""

    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    by_position: list[int] = field(default_factory=list)
    num_draft_tokens: list[int] = field(default_factory=list)

    def add(self, step: Step, row: int, used: int) -> None:
        """Count `used` of the tokens that `step` gave this row; a stop may have cut the rest."""
        self.tokens += used
        if step.accepted[row] < 0:
            return
        self.rounds += 1
        self.drafted += step.verified
        emitted = min(step.accepted[row], used)
        self.accepted += emitted
        self.by_position += [0] * (step.verified - len(self.by_position))
        for position in range(emitted):
            self.by_position[position] += 1
        self.num_draft_tokens.append(step.verified)
