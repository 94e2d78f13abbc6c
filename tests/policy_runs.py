"""Scripted texts played against a policy without a model: the driver's schedule, acceptance by chance, given costs."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_mtp.policy import Policy

PLAIN_S = 0.02
CURVES: dict[str, tuple[float, ...]] = {
    # Time of k = 0, 1, ... drafts in plain rounds, drafter included; straight beyond the last two.
    "flat": (1.0, 1.03),
    "linear": (1.0, 2.0),
    "stock M4": (1.0, 1.12, 1.34, 1.55, 1.83, 2.14, 2.42, 2.68, 2.96),
    "stock M1": (1.0, 1.32, 1.64, 1.95, 2.5, 3.0),
    "MoE": (1.0, 1.45, 1.85, 2.22, 2.58, 2.9),
    "MoE, overlap": (1.0, 1.35, 1.6, 1.8, 2.05, 2.3),
    "padded": (1.0, 2.2, 2.23),
}
TEXTS = {"wrong": 0.0, "prose": 0.4, "chat": 0.6, "code": 0.75, "list": 0.92}


def seconds_on(curve: Sequence[float]) -> Callable[[int], float]:
    def seconds(k: int) -> float:
        if k < len(curve):
            return PLAIN_S * curve[k]
        return PLAIN_S * (curve[-1] + (curve[-1] - curve[-2]) * (k - len(curve) + 1))

    return seconds


@dataclass
class Played:
    """What a run took: drafts verified a round, tokens, seconds."""

    verified: list[int]
    tokens: int
    seconds: float


def play_text(
    policy: Policy,
    tokens: int,
    *,
    right: Callable[[int], float],
    seconds: Callable[[int], float],
    seed: int = 1,
    noise: float = 0.03,
    late: bool = True,
    rows: int = 1,
) -> Played:
    """Rounds until each row has `tokens` tokens on average; `right(tokens so far)` is the chance of each draft.

    late: a round's time holds the drafts that it makes, as on the CPU backend; else those that it verifies.
    """
    rng, played, given, taken = random.Random(seed), [], 0.0, 0.0
    running = policy.plan(policy.plan(0).draft)
    while given < tokens:
        ahead = policy.plan(running.draft)  # described before the running round is known
        accepted = []
        for _ in range(rows):
            chance = right(int(given))
            wrong_at = (i for i in range(running.verify) if rng.random() >= chance)
            accepted.append(next(wrong_at, running.verify))
        step = 0.02 * PLAIN_S  # what a drafter step takes of the curve
        taken_now = seconds(running.verify) + step * (
            (running.draft if late else running.verify) - running.verify
        )
        taken_now *= rng.lognormvariate(0, noise)
        policy.observe(running.verify, accepted, taken_now, drafted=running.draft)
        played.append(running.verify)
        given += 1 + sum(accepted) / rows
        taken += taken_now
        running = ahead
    return Played(played, int(given), taken)


def best_fixed(right: float, seconds: Callable[[int], float], most: int = 8) -> tuple[float, int]:
    """Seconds a token of the best fixed number of drafts, and that number."""

    def per_token(k: int) -> float:
        return seconds(k) / sum(right**j for j in range(k + 1))

    best = min(range(most + 1), key=per_token)
    return per_token(best), best
