"""Predicted seconds of a round by drafts, for the simulator: cost_model.py's ways, with distinct experts apart."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cost_model
from cost_model import CAUTIOUS, STOCK, Way, bytes_of, pass_seconds

from mlx_mtp.chips import CHIPS, OTHERS, OVERLAP, Chip
from mlx_mtp.cost import CostModel, prior

LAUNCHES = Path(__file__).parent / "results" / "launches.json"
CHIP_NAMES = ("M1 Max", "M2 Ultra", "M3 Ultra", "M4 Pro", "M4 Max", "M5", "M5 Max")
BY_NAME = {chip.name: chip for chip in (*CHIPS, *OTHERS)}
MOST = 8  # the largest number of drafts that a fixed one is tried with
# Stock reads an expert once a (row, expert) pair, whatever the rows share; ours once a distinct expert.
WAYS: dict[str, Way] = {
    "stock": STOCK,
    "ours": CAUTIOUS,
    "ours, experts shared as elsewhere": replace(CAUTIOUS, distinct=OVERLAP),
}
DRAFTER_BITS = 4
bytes_of_size = functools.cache(bytes_of)


@dataclass(frozen=True, slots=True)
class CostCurve:
    """What a round takes: seconds of verifying 0, 1, .. drafts, seconds of a drafter step, experts read in a layer."""

    verify: tuple[float, ...]
    step: float
    distinct: tuple[float, ...] | None

    def seconds(self, verified: int, drafted: int) -> float:
        return self.verify[verified] + drafted * self.step

    def own(self, drafts: int) -> float:
        """A round that verifies as many drafts as it makes."""
        return self.seconds(drafts, drafts)


def ways_of(size: str) -> tuple[str, ...]:
    """Whether experts are shared makes a difference only where there are any."""
    return tuple(WAYS) if size == "26b-a4b" else ("stock", "ours")


@functools.cache
def counted_launches() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(LAUNCHES.read_text())["results"]
    return found


def curve_of(
    size: str,
    chip: Chip,
    way: Way,
    *,
    bits: int = 4,
    mlp_bits: int | None = None,
    drafter_bits: int = DRAFTER_BITS,
    context: int = cost_model.CONTEXT,
    most: int = MOST,
) -> CostCurve:
    """Batch 1, greedy."""
    target, drafter = configs(size)
    launches = counted_launches()[size][way.launches]["greedy"]
    ours, drafters = bytes_of_size(target, bits, mlp_bits, context), bytes_of_size(drafter, drafter_bits)
    verify = tuple(
        pass_seconds(ours, chip, k + 1, launches["k=3" if k else "k=0"]["verify"], way)
        for k in range(most + 1)
    )
    step = pass_seconds(drafters, chip, 1, launches["k=3"]["draft"] / 3, way)
    distinct: Callable[[int], float] = way.distinct or cost_model.independent
    experts = tuple(distinct(k + 1) for k in range(most + 1)) if ours.experts else None
    return CostCurve(verify, step, experts)


@functools.cache
def prior_of(size: str, chip: str, kernels: str) -> CostModel:
    """What a pair starts from on a known chip; shares published figures with the curves, which flatters it."""
    target, drafter = configs(size)
    by = "stock" if kernels == "stock" else "ours"
    return prior(target, drafter, BY_NAME[chip], drafter_bits=DRAFTER_BITS, kernels=by)


configs = functools.cache(cost_model.configs_of)
