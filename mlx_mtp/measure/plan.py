"""What is to be measured: settings, and the cases and arms that follow from them."""

from dataclasses import asdict, dataclass
from typing import Any

from mlx_mtp.errors import ParameterError
from mlx_mtp.measure.workloads import AS_WRITTEN, PROMPTS_EACH, WORKLOADS, check_workload
from mlx_mtp.state import MAX_DRAFT_TOKENS

SAMPLINGS = ("greedy", "default")
CONTEXTS = (512, 4096, 16_384)
WIDTHS = (1, 4, 8)
PLAIN, PEER, AUTO = "plain", "mlx-lm", "auto"
MIN_REPEATS, MAX_REPEATS = 5, 20
LARGEST_CONTEXT = 1 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """One line of questions to all arms: what is written, how it is chosen, after how much, how many at once."""

    workload: str
    sampling: str
    context: int  # tokens of each prompt; 0: as it is written
    batch: int

    @property
    def key(self) -> str:
        return f"{self.workload}/{self.sampling}/{self.context}/{self.batch}"


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that a run's figures depend on, beside the model and the machine."""

    workloads: tuple[str, ...] = WORKLOADS
    samplings: tuple[str, ...] = SAMPLINGS
    contexts: tuple[int, ...] = (CONTEXTS[0],)
    batches: tuple[int, ...] = (1,)
    arms: tuple[str, ...] = (PLAIN, PEER, AUTO, "k=2", "k=4")
    prompts: int = 5  # of each workload, played one after another (batch 1)
    tokens: int = 256  # of each reply
    min_repeats: int = MIN_REPEATS
    max_repeats: int = MAX_REPEATS
    budget_s: float | None = None  # repeats beyond the fewest are played only while there is time

    def __post_init__(self) -> None:
        for name in self.workloads:
            check_workload(name)
        _check_each("sampling", self.samplings, SAMPLINGS)
        for name in self.arms:
            drafts_of(name)
        if PLAIN not in self.arms:
            raise ParameterError("every speed-up is over plain decoding; name plain among the arms")
        for what, values, most in (("context", self.contexts, LARGEST_CONTEXT), ("batch", self.batches, 64)):
            least = AS_WRITTEN if what == "context" else 1
            for value in values:
                _check_number(what, value, least, most)
        _check_number("prompts", self.prompts, 1, PROMPTS_EACH)
        _check_number("tokens", self.tokens, 2, 1 << 16)
        _check_number("repeats", self.min_repeats, 2, 1000)
        _check_number("repeats", self.max_repeats, self.min_repeats, 1000)
        for what, chosen in (
            ("workload", self.workloads),
            ("sampling", self.samplings),
            ("context", self.contexts),
            ("batch", self.batches),
            ("arm", self.arms),
        ):
            if not chosen or len(set(chosen)) != len(chosen):
                raise ParameterError(f"each {what} is named once, and at least one; got {list(chosen)}")

    def cases(self) -> list[Case]:
        """Every combination, in an order in which a run that is stopped early has seen every workload."""
        return [
            Case(workload, sampling, context, batch)
            for context in self.contexts
            for batch in self.batches
            for sampling in self.samplings
            for workload in self.workloads
        ]

    def rows(self, case: Case) -> int:
        """Replies of a sample: as many prompts as are asked for, in whole batches."""
        if case.batch == 1:
            return self.prompts
        return -(-self.prompts // case.batch) * case.batch if case.batch <= PROMPTS_EACH else case.batch

    def as_json(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def settings_of(raw: dict[str, Any]) -> Settings:
    """What `Settings.as_json` gave; TypeError or ParameterError where it is no such thing."""
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in raw.items()}
    return Settings(**fields)


def drafts_of(arm: str) -> int | str | None:
    """An arm's number of draft tokens, "auto", 0 for plain, None for mlx-lm; ParameterError for no arm."""
    known: dict[str, int | str | None] = {PLAIN: 0, AUTO: AUTO, PEER: None}
    if arm in known:
        return known[arm]
    text = arm.removeprefix("k=")
    if arm.startswith("k=") and text.isascii() and text.isdigit() and 1 <= int(text[:4]) <= MAX_DRAFT_TOKENS:
        return int(text)
    raise ParameterError(
        f"an arm is {PLAIN}, {PEER}, {AUTO} or k=1 .. k={MAX_DRAFT_TOKENS}, got {arm!r}; choose among these"
    )


def _check_each(what: str, chosen: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in chosen:
        if name not in known:
            raise ParameterError(f"{what} is one of {', '.join(known)}, got {name!r}; choose among these")


def _check_number(what: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ParameterError(f"{what} takes a whole number, {least} .. {most}, got {value!r}; choose another")


# Minutes rather than hours, for a tiny model on a CPU: what `bench demo` plays unless told otherwise.
SHORT = Settings(
    workloads=("code", "chat", "repetition"),
    samplings=("greedy", "default"),
    contexts=(AS_WRITTEN,),
    arms=(PLAIN, PEER, AUTO, "k=1", "k=3"),
    prompts=1,
    tokens=32,
    max_repeats=8,
    budget_s=120.0,
)
