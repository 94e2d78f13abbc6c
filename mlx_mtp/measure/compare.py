"""Two runs side by side: refused where they are not of the same thing, else ratios with intervals."""

import statistics
from dataclasses import dataclass

from mlx_mtp.errors import ParameterError
from mlx_mtp.measure.fingerprint import differences
from mlx_mtp.measure.intervals import Ratio, unpaired_ratio
from mlx_mtp.measure.plan import Case
from mlx_mtp.measure.results import Document
from mlx_mtp.measure.summary import chosen_samples

PLAYED_ALIKE = ("prompts", "tokens")  # settings without which a case of the same name is another one


@dataclass(frozen=True, slots=True)
class Compared:
    """One arm of one case in both runs; time over time, below 1: the second is faster."""

    case: Case
    arm: str
    before_ms: float  # a token
    after_ms: float
    ratio: Ratio
    is_clean: bool  # no sample met other conditions

    @property
    def word(self) -> str:
        if not self.is_clean:
            return "unknown: a machine was not at rest"
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
        for name in entry["arms"]:
            samples = chosen_samples(entry, name), chosen_samples(again, name)
            if not all(samples):
                continue
            before, after = ([1e3 * s["decode_s"] / s["tokens"] for s in own] for own in samples)
            found.append(
                Compared(
                    Case(**entry["case"]),
                    name,
                    statistics.median(before),
                    statistics.median(after),
                    unpaired_ratio(after, before),
                    is_clean=not any(s["marks"] for own in samples for s in own),
                )
            )
    if not found:
        raise ParameterError(
            "the two runs have no arm of a case in common; measure the same workloads in both"
        )
    return found
