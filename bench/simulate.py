"""Replays texts through predicted costs of rounds against the real AutoPolicy; every figure is a prediction.

    python bench/simulate.py                          # a table for each model and kernels, then the goals: 8 minutes
    python bench/simulate.py --sizes 31b --chips 'M4 Max' 'M5'
    python bench/simulate.py --json bench/results/simulation.json
    python bench/simulate.py --record demo            # writes traces/demo.json from the demo pair

A trace says for each place in a text how many drafts made there would be right, so that every number of drafts is
played on the same text. Costs of rounds are cost_model.py's. Not in it: time to trace a new kind of round (such rounds
have no time, as in the driver), prefill, heat.
"""

import argparse
import json
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sim_curves import BY_NAME, CHIP_NAMES, MOST, WAYS, CostCurve, curve_of, prior_of, ways_of
from sim_texts import SHIPPED_MLP_BITS, TRACES, Text, fixed_seconds, luck, read_text, tokens_of

from mlx_mtp.policy import AutoPolicy, Policy
from mlx_mtp.published_configs import SIZES
from mlx_mtp.round_times import RoundTimes

NOISE = 0.03  # spread of a round's time about what the curve says, as the policy sees it
WINDOW, NEAR = 20, 0.92  # recovered: from here so many rounds have that share of the best speed
SEEDS = (1, 2, 3)  # those that the policy was tuned on
HELD_OUT = (11, 12, 13)  # and those that it was not
FIRST, UNKNOWN_CHIP, LATER = STARTS = ("first texts", "first texts, unknown chip", "later texts")
GOALS = {"mean": 0.03, "worst": 0.08, "plain": 0.02, "recovery": 30, "wrong": 0.02}


@dataclass(frozen=True, slots=True)
class Played:
    """A whole text: seconds on the curve, without noise, and for each round where it began, verified and took."""

    seconds: float
    starts: tuple[int, ...]
    verified: tuple[int, ...]
    drafted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """AutoPolicy on one text with one seed; times over the best fixed number and over plain rounds."""

    size: str
    kernels: str
    chip: str
    text: str
    start: str  # one of STARTS
    seed: int
    best: int
    over_best: float
    over_plain: float
    recovery: tuple[int | None, ...]  # rounds until a change was followed; None: not before the next


def play(policy: Policy, right: Sequence[int], curve: CostCurve, seed: int, *, late: bool = False) -> Played:
    """The driver's schedule: a round is described before the outcome of the one that runs is known.

    late: a round's time holds the drafts that it makes, as on MLX's CPU backend; else those that it verifies.
    """
    rng, at, seconds = random.Random(seed), 0, 0.0
    shapes: set[tuple[int, int]] = set()
    starts, verified, drafted = [], [], []
    first = policy.plan(0).draft
    seconds += first * curve.step
    running = policy.plan(first)
    was_new, comparable = _is_new(shapes, running), False
    while at < len(right):
        ahead = policy.plan(running.draft)
        next_is_new = _is_new(shapes, ahead)
        accepted = min(right[at], running.verify, len(right) - at - 1)
        told = curve.seconds(running.verify, running.draft if late else running.verify)
        told *= rng.lognormvariate(0, NOISE)
        policy.observe(
            running.verify,
            [accepted],
            told if comparable and not was_new and not next_is_new else None,
            drafted=running.draft,
            batch=1,
            distinct=curve.distinct[running.verify] if curve.distinct else None,
        )
        starts.append(at)
        verified.append(running.verify)
        drafted.append(running.draft)
        seconds += curve.seconds(running.verify, running.draft)
        at += 1 + accepted
        running, was_new, comparable = ahead, next_is_new, True
    return Played(seconds, tuple(starts), tuple(verified), tuple(drafted))


def _is_new(shapes: set[tuple[int, int]], plan: tuple[int, int]) -> bool:
    is_new = plan not in shapes
    shapes.add(plan)
    return is_new


def recovery(played: Played, text: Text, curve: CostCurve) -> tuple[int | None, ...]:
    """For each change of the text, rounds until `WINDOW` rounds in a row have `NEAR` of the best speed there.

    Judged by the expected tokens of what was played, not by luck.
    """
    found: list[int | None] = []
    ends = (*text.starts[1:], len(text.right))
    for part in range(1, len(text.starts)):
        chance = text.chances[part]
        best = max(tokens_of(chance, k) / curve.own(k) for k in range(MOST + 1))
        rounds = [i for i, at in enumerate(played.starts) if text.starts[part] <= at < ends[part]]
        speeds = []
        for first in range(len(rounds)):
            window = rounds[first : first + WINDOW]
            tokens = sum(tokens_of(chance, played.verified[i]) for i in window)
            speeds.append(tokens / sum(curve.own(played.verified[i]) for i in window))
        whole = range(max(1, len(rounds) - WINDOW + 1))
        found.append(next((i for i in whole if speeds[i] >= NEAR * best), None))
    return tuple(found)


def outcomes_of(
    size: str, kernels: str, chip: str, text: Text, seed: int, late: bool, starts: Sequence[str] = STARTS
) -> Iterator[Outcome]:
    """The text as a pair's first on a chip with a prior, on one that is unknown, and as one after another text."""
    curve = curve_of(size, BY_NAME[chip], WAYS[kernels], mlp_bits=SHIPPED_MLP_BITS.get(size))
    fixed = [fixed_seconds(text.right, curve, k) for k in range(MOST + 1)]
    best = min(range(len(fixed)), key=fixed.__getitem__)
    for start in starts:
        policy = AutoPolicy(RoundTimes(None if start == UNKNOWN_CHIP else prior_of(size, chip, kernels)))
        if start == LATER:
            play(policy, text.right[: len(text.right) // 3], curve, seed + 1000, late=late)
            policy = AutoPolicy(policy.times, policy.fit)
        played = play(policy, text.right, curve, seed, late=late)
        over = (round(played.seconds / fixed[at] - 1, 5) for at in (best, 0))
        yield Outcome(size, kernels, chip, text.name, start, seed, best, *over, recovery(played, text, curve))


def simulate(
    sizes: Sequence[str], chips: Sequence[str], *, seeds: Sequence[int] = SEEDS, late: bool = False
) -> Iterator[Outcome]:
    """All kernels, all texts of each size and all starts."""
    paths = sorted(TRACES.glob("*.json"))
    for seed in seeds:
        for text in (read_text(path, seed) for path in paths):
            for size in sizes:
                for kernels in ways_of(size) if size in text.sizes else ():
                    for chip in chips:
                        yield from outcomes_of(size, kernels, chip, text, seed, late)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the goals are about, and how many of all outcomes miss each."""
    right = [one for one in outcomes if one.text != "wrong"]
    changes = [rounds for one in outcomes for rounds in one.recovery]
    reached = sorted(rounds for rounds in changes if rounds is not None)
    wrong = [one.over_plain for one in outcomes if one.text == "wrong"]
    return {
        "runs": len(outcomes),
        "mean over best fixed": statistics.mean(one.over_best for one in right),
        "mean, texts of one kind": statistics.mean(one.over_best for one in right if not one.recovery),
        "worst over best fixed": max(one.over_best for one in right),
        "beyond the worst allowed": sum(one.over_best > GOALS["worst"] for one in right),
        "worst over plain": max(one.over_plain for one in outcomes),
        "beyond plain allowed": sum(one.over_plain > GOALS["plain"] for one in outcomes),
        "changes of text": len(changes),
        "median rounds to recover": statistics.median(reached) if reached else None,
        "recovered in time": sum(rounds <= GOALS["recovery"] for rounds in reached),
        "never recovered": len(changes) - len(reached),
        "worst cost of a wrong drafter": max(wrong, default=None),
    }


def misses(one: Outcome) -> bool:
    """Whether a run is beyond what is allowed at worst."""
    late = any(rounds is None or rounds > GOALS["recovery"] for rounds in one.recovery)
    return one.over_best > GOALS["worst"] or one.over_plain > GOALS["plain"] or late


def table(outcomes: Sequence[Outcome], start: str) -> str:
    """Rows are chips, columns texts: time over the best fixed number of drafts (which that was), seeds averaged."""
    own = [one for one in outcomes if one.start == start]
    texts = sorted({one.text for one in own})
    lines = [f"| chip | {' | '.join(texts)} | worst over plain |", f"|---|{'---|' * (len(texts) + 1)}"]
    for chip in dict.fromkeys(one.chip for one in own):
        cells = []
        for text in texts:
            runs = [one for one in own if one.chip == chip and one.text == text]
            cells.append(f"{percent(statistics.mean(one.over_best for one in runs))} (k {runs[0].best})")
        worst = max(one.over_plain for one in own if one.chip == chip)
        lines.append(f"| {chip} | {' | '.join(cells)} | {percent(worst)} |")
    return "\n".join(lines) + "\n"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:+.1f} %"


def words(found: dict[str, Any]) -> str:
    """A summary in one paragraph."""
    return (
        f"{found['runs']} runs: over the best fixed number {percent(found['mean over best fixed'])} on average "
        f"({percent(found['mean, texts of one kind'])} on texts of one kind), "
        f"{percent(found['worst over best fixed'])} at worst ({found['beyond the worst allowed']} runs beyond 8 %); "
        f"over plain {percent(found['worst over plain'])} at worst ({found['beyond plain allowed']} beyond 2 %); "
        f"recovered within 30 rounds from {found['recovered in time']} of {found['changes of text']} changes "
        f"(median {found['median rounds to recover']}, {found['never recovered']} never); a drafter that is always "
        f"wrong costs {percent(found['worst cost of a wrong drafter'])} at worst."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES, metavar="SIZE")
    parser.add_argument("--chips", nargs="+", default=list(CHIP_NAMES), choices=CHIP_NAMES, metavar="CHIP")
    parser.add_argument("--seeds", nargs="+", type=int, default=[*SEEDS, *HELD_OUT], metavar="SEED")
    parser.add_argument("--late", action="store_true", help="times of rounds as on MLX's CPU backend")
    parser.add_argument("--json", type=Path, help="also write the summaries and every run that misses a goal")
    parser.add_argument("--record", metavar="PAIR", help="write traces/demo.json from a pair, and end")
    args = parser.parse_args()
    if args.record:
        from sim_record import record_trace

        record_trace(args.record, TRACES / "demo.json", MOST)
        return
    outcomes = list(simulate(args.sizes, args.chips, seeds=args.seeds, late=args.late))
    for size in args.sizes:
        for kernels in ways_of(size):
            own = [one for one in outcomes if (one.size, one.kernels) == (size, kernels)]
            print(f"\n## {size}, {kernels} (predicted)\n")
            print(*(f"{start}:\n\n{table(own, start)}" for start in STARTS), words(summary(own)), sep="\n")
    for name, found in summaries(outcomes).items():
        print(f"\nAll, {name}: {words(found)}")
    if args.json:
        settings = {"noise": NOISE, "seeds": args.seeds, "late": args.late, "chips": args.chips}
        kept = json.dumps(kept_of(outcomes, args.sizes, settings), separators=(",", ":"))
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(kept.replace("},{", "},\n{") + "\n")


def kept_of(outcomes: Sequence[Outcome], sizes: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """The summaries and every run that misses a goal."""
    tables = {
        f"{size}, {kernels}": [one for one in outcomes if (one.size, one.kernels) == (size, kernels)]
        for size in sizes
        for kernels in ways_of(size)
    }
    return {
        "label": "predicted; nothing was measured on a Mac",
        "settings": settings,
        "summary": summaries(outcomes),
        "summary of tables": {name: summary(own) for name, own in tables.items()},
        "missed": [asdict(one) for one in outcomes if misses(one)],
        "whoever knows": known_summary(luck(sizes, settings["chips"], settings["seeds"])),
    }


def known_summary(lost: Sequence[float]) -> dict[str, Any]:
    """Of `luck`: the mean, the worst and how many are beyond the worst that is allowed."""
    return {
        "texts": len(lost),
        "mean over best fixed": statistics.mean(lost),
        "worst over best fixed": max(lost),
        "beyond the worst allowed": sum(one > GOALS["worst"] for one in lost),
    }


def summaries(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """By how a pair starts, and the seeds that the policy was not tuned on apart."""
    found = {start: summary([one for one in outcomes if one.start == start]) for start in STARTS}
    for start in STARTS:
        held_out = [one for one in outcomes if one.start == start and one.seed in HELD_OUT]
        if held_out:
            found[f"{start}, held-out seeds"] = summary(held_out)
    return found


if __name__ == "__main__":
    main()
