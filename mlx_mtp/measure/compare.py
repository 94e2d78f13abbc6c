"""Two runs side by side: refused where they are not of the same thing, else ratios with intervals."""

from dataclasses import dataclass
from typing import Any

from mlx_mtp.errors import ParameterError
from mlx_mtp.measure.fingerprint import differences
from mlx_mtp.measure.intervals import Ratio, unpaired_ratio
from mlx_mtp.measure.plan import Case
from mlx_mtp.measure.results import Document

PLAYED_ALIKE = ("prompts", "tokens")  # settings without which a case of the same name is another one


@dataclass(frozen=True, slots=True)
class Compared:
    """One arm of one case in both runs; time over time, below 1: the second is faster."""

    case: Case
    arm: str
    before_ms: float  # a token
    after_ms: float
    ratio: Ratio

    @property
    def word(self) -> str:
        return "faster" if self.ratio.high < 1 else "slower" if self.ratio.low > 1 else "no difference shown"


def unlike(one: Document, other: Document) -> list[str]:
    """Why figures of the two must not be compared; empty where they may."""
    found = differences(one["fingerprint"], other["fingerprint"])
    for name in PLAYED_ALIKE:
        a, b = one["settings"][name], other["settings"][name]
        found += [f"{name}: {a}, {b}"] if a != b else []
    return found


def compare_runs(one: Document, other: Document, *, force: bool = False) -> list[Compared]:
    """Every arm of every case that both have. Raises ParameterError for unlike runs, unless forced, and for none."""
    why = unlike(one, other)
    if why and not force:
        raise ParameterError(
            f"the two runs are not of the same thing ({'; '.join(why)[:600]}); repeat one, or add --force"
        )
    found = []
    for key, entry in one["cases"].items():
        again = other["cases"].get(key)
        if again is None:
            continue
        for name, arm in entry["arms"].items():
            before, after = _per_token(arm), _per_token(again["arms"].get(name))
            if len(before) > 1 and len(after) > 1:
                found.append(
                    Compared(
                        Case(**entry["case"]),
                        name,
                        _median(before),
                        _median(after),
                        unpaired_ratio(after, before),
                    )
                )
    if not found:
        raise ParameterError(
            "the two runs have no arm of a case in common; measure the same workloads in both"
        )
    return found


def _per_token(arm: dict[str, Any] | None) -> list[float]:
    """Milliseconds a token of the clean samples."""
    if arm is None or arm["fault"]:
        return []
    return [1e3 * s["decode_s"] / s["tokens"] for s in arm["samples"] if not s["marks"]]


def _median(values: list[float]) -> float:
    from statistics import median

    return median(values)
