"""Texts to simulate: how many drafts made at each place would be right, and what fixed numbers of them take."""

import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim_curves import BY_NAME, MOST, WAYS, CostCurve, curve_of, ways_of

TRACES = Path(__file__).parent / "traces"
SHIPPED_MLP_BITS = {"12b": 8}  # as published checkpoints keep it; others as the rest


@dataclass(frozen=True, slots=True)
class Text:
    """`right[i]`: drafts made behind token i that are right, at most `MOST`; `starts`, `chances`: of its parts."""

    name: str
    title: str
    sizes: tuple[str, ...]
    right: tuple[int, ...]
    starts: tuple[int, ...]
    chances: tuple[float, ...]  # of a draft, if those before it were right; empty where recorded


def read_text(path: Path, seed: int) -> Text:
    """A trace of traces/, its synthetic parts drawn anew by `seed`."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    if "right" in raw:
        shift = (seed - 1) * len(raw["right"]) // 7  # a seed is where the text begins
        right = (*raw["right"][shift:], *raw["right"][:shift])
        return Text(path.stem, raw["title"], tuple(raw["sizes"]), right, (0,), ())
    rng, right, starts, chances = random.Random(f"{path.stem} {seed}"), [], [], []
    for part in raw["segments"]:
        starts.append(len(right))
        chances.append(chance_of(part))
        for _ in range(part["tokens"]):
            wrong = (j for j in range(MOST) if rng.random() >= chances[-1])
            right.append(next(wrong, MOST))
    return Text(path.stem, raw["title"], tuple(raw["sizes"]), tuple(right), tuple(starts), tuple(chances))


def chance_of(part: dict[str, Any]) -> float:
    """The chance of each draft, alike for all positions, that gives the published rate or tokens a round."""
    if "rate" in part:
        wanted = part["rate"]
        return solved(lambda a: statistics.mean((tokens_of(a, k) - 1) / k for k in part["drafts"]), wanted)
    return solved(lambda a: statistics.mean(tokens_of(a, k) for k in part["drafts"]), part["tokens_a_round"])


def tokens_of(chance: float, drafts: int) -> float:
    """Expected tokens of a round."""
    return sum(chance**j for j in range(drafts + 1))


def solved(rising: Callable[[float], float], wanted: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return low


def fixed_seconds(right: Sequence[int], curve: CostCurve, drafts: int) -> float:
    """The same as `play` with a `FixedPolicy`, without a policy to tell."""
    at, rounds = 0, 0
    while at < len(right):
        at += 1 + min(right[at], drafts)
        rounds += 1
    return rounds * curve.own(drafts) + drafts * curve.step


def luck(
    sizes: Sequence[str], chips: Sequence[str], seeds: Sequence[int], texts: Sequence[str] | None = None
) -> list[float]:
    """Time over the best fixed number in hindsight of whoever knows a text's chance and all costs, and plays the number
    that is best by expectation: for each text of one kind. No policy can be asked for less."""
    lost = []
    for path in sorted(TRACES.glob("*.json")):
        for text in (read_text(path, seed) for seed in seeds):
            if len(text.chances) != 1 or text.name == "wrong" or (texts and text.name not in texts):
                continue
            for size in (size for size in sizes if size in text.sizes):
                for kernels in ways_of(size):
                    for chip in chips:
                        curve = curve_of(
                            size, BY_NAME[chip], WAYS[kernels], mlp_bits=SHIPPED_MLP_BITS.get(size)
                        )
                        fixed = [fixed_seconds(text.right, curve, k) for k in range(MOST + 1)]
                        knows = max(
                            range(MOST + 1), key=lambda k: tokens_of(text.chances[0], k) / curve.own(k)
                        )
                        lost.append(fixed[knows] / min(fixed) - 1)
    return lost
