"""What samples of auto_gain.py say: auto against the best fixed number of drafts, text by text, with an interval."""

import json
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sim_curves import CostCurve
from sim_texts import TRACES, fixed_seconds, read_text
from simulate import play

from mlx_mtp.cost import monotone
from mlx_mtp.policy import AutoPolicy
from mlx_mtp.round_times import RoundTimes

ARMS = ("auto, later", "auto, first")
RESAMPLES = 2000
TRACE_SEEDS = (1, 2, 3)
REPLAYS = 20  # seeds of the noise about a curve
GOALS = {"measured": 0.95, "replayed": 0.98}

Samples = Sequence[Mapping[str, Any]]


def summary(variants: Mapping[str, Any]) -> dict[str, Any]:
    """By variant: seconds of each arm and text, the best fixed arm, auto's speed over that, and the same replayed."""
    right = recorded()
    return {
        name: {
            "passes": len({sample["turn"] for sample in own["samples"]}),
            "ms a token": milliseconds(own["samples"]),
            "best fixed": best_fixed(own["samples"]),
            "measured": {arm: speed(own["samples"], arm) for arm in played(own["samples"])},
            "in processor time": {
                arm: speed(in_processor_time(own["samples"]), arm) for arm in played(own["samples"])
            },
            "replayed": replayed(own["curves"], right)
            | {"all traces, later": replayed_traces(own["curves"], is_moe="moe" in name)},
        }
        for name, own in variants.items()
    }


def played(samples: Samples) -> list[str]:
    """The arms of auto that were measured; first texts are left out of some passes."""
    return [arm for arm in ARMS if any(sample["arm"] == arm for sample in samples)]


def recorded() -> dict[str, list[int]]:
    """For each place in two texts of code, and in two of chat: how many drafts made there are right."""
    right = json.loads((TRACES / "demo.json").read_text(encoding="utf-8"))["right"]
    return {"code": right[: len(right) // 2], "chat": right[len(right) // 2 :]}


def in_processor_time(samples: Samples) -> list[dict[str, Any]]:
    """The same samples as if the clock were the processor's."""
    return [{**one, "seconds": one["processor"]} for one in samples]


def milliseconds(samples: Samples) -> dict[str, dict[str, float]]:
    """text -> arm -> median milliseconds a token after the first."""
    found: dict[str, dict[str, list[float]]] = {}
    for one in samples:
        own = found.setdefault(one["text"], {}).setdefault(one["arm"], [])
        own.append(1e3 * one["seconds"] / (one["tokens"] - 1))
    return {
        text: {arm: round(statistics.median(own), 2) for arm, own in arms.items()}
        for text, arms in found.items()
    }


def best_fixed(samples: Samples) -> dict[str, str]:
    """text -> the arm that is best in hindsight, plain decoding included."""
    return {
        text: min((arm for arm in arms if arm not in ARMS), key=arms.__getitem__)
        for text, arms in milliseconds(samples).items()
    }


def speed(samples: Samples, arm: str) -> dict[str, Any]:
    """Auto's speed over the best fixed arm's, all texts together and each, with 95 % bounds of paired resampling.

    A pair is one text in one pass; as many of each text are drawn as were played, so that the bounds are for these
    texts. All seconds are added up before they are divided.
    """
    pairs = paired(samples, arm)
    rng, texts = random.Random(1), sorted({text for text, _, _ in pairs})
    by_text = [[pair for pair in pairs if pair[0] == text] for text in texts]
    drawn = sorted(
        ratio([pair for own in by_text for pair in rng.choices(own, k=len(own))]) for _ in range(RESAMPLES)
    )
    return {
        "speed": round(ratio(pairs), 4),
        "lower": round(drawn[int(0.025 * RESAMPLES)], 4),
        "upper": round(drawn[int(0.975 * RESAMPLES) - 1], 4),
        "pairs": len(pairs),
        "by text": {text: round(ratio([pair for pair in pairs if pair[0] == text]), 4) for text in texts},
        "over plain": round(ratio(paired(samples, arm, "plain")), 4),
    }


def paired(samples: Samples, arm: str, against: str | None = None) -> list[tuple[str, float, float]]:
    """(text, seconds of `against`, seconds of auto) of each pass; `against` None: the text's best fixed arm."""
    best = best_fixed(samples)
    seconds = {(one["turn"], one["text"], one["arm"]): one["seconds"] for one in samples}
    places = dict.fromkeys((turn, text) for turn, text, own in seconds if own == arm)
    return [
        (text, seconds[turn, text, against or best[text]], seconds[turn, text, arm]) for turn, text in places
    ]


def ratio(pairs: Sequence[tuple[str, float, float]]) -> float:
    return sum(fixed for _, fixed, _ in pairs) / sum(auto for _, _, auto in pairs)


def replayed(curves: Sequence[Sequence[float]], right: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The same on the median curve of rounds, made to rise, and recorded acceptance, without the machine's moods.

    Drafts are paid for in the round that verifies them. Later texts: the others were played before, in turn.
    """
    curve = median_curve(curves)
    own = curve.verify
    best = {
        text: min(fixed_seconds(places, curve, k) for k in range(len(own))) for text, places in right.items()
    }
    spent: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in range(REPLAYS):
        later = AutoPolicy(RoundTimes())
        for places in right.values():
            play(later, places, curve, seed + 1000)
        for text, places in right.items():
            first = play(AutoPolicy(RoundTimes()), places, curve, seed)
            later = AutoPolicy(later.times, later.fit)
            spent["auto, later"].append(play(later, places, curve, seed).seconds / best[text])
            spent["auto, first"].append(first.seconds / best[text])
    return {arm: round(1 / statistics.mean(values), 4) for arm, values in spent.items()} | {
        "rounds of 0, 1, .. drafts take plain ones": [round(value / own[0], 3) for value in own]
    }


def median_curve(curves: Sequence[Sequence[float]]) -> CostCurve:
    """What a round takes by its drafts, made to rise; drafter steps are in it."""
    medians = [statistics.median(values) for values in zip(*curves, strict=True)]
    return CostCurve(tuple(monotone(medians, [1.0] * len(medians))), 0.0, None)


def replayed_traces(curves: Sequence[Sequence[float]], *, is_moe: bool) -> dict[str, float]:
    """Later texts of all traces of such a model, recorded and synthetic, on the median curve; and their mean."""
    curve = median_curve(curves)
    found: dict[str, list[float]] = {}
    for path in sorted(TRACES.glob("*.json")):
        for text in (read_text(path, seed) for seed in TRACE_SEEDS):
            if text.name == "wrong" or (text.name != "demo" and is_moe != ("26b-a4b" in text.sizes)):
                continue
            best = min(fixed_seconds(text.right, curve, k) for k in range(len(curve.verify)))
            earlier = AutoPolicy(RoundTimes())
            play(earlier, text.right[: len(text.right) // 3], curve, 1000)
            later = play(AutoPolicy(earlier.times, earlier.fit), text.right, curve, 1)
            found.setdefault(text.name, []).append(best / later.seconds)
    means = {name: round(statistics.mean(speeds), 4) for name, speeds in found.items()}
    return means | {"mean": round(statistics.mean(means.values()), 4)}


def words(found: Mapping[str, Any]) -> str:
    """A few lines a variant."""
    lines = []
    for name, own in found.items():
        lines.append(f"{name}, {own['passes']} passes")
        replay = own["replayed"]
        if replay:
            ratios = ", ".join(
                f"{value:.2f}" for value in replay["rounds of 0, 1, .. drafts take plain ones"]
            )
            lines.append(f"  rounds of 0, 1, .. drafts in plain ones: {ratios}")
        for text, arms in own["ms a token"].items():
            times = "  ".join(f"{arm} {value:.1f}" for arm, value in arms.items())
            lines.append(f"  {text}: {times}  (best: {own['best fixed'][text]})")
        whole = own["replayed"]["all traces, later"]
        lines.append(f"  all traces replayed, later texts: {whole['mean']:.3f} ({GOALS['replayed']} wanted)")
        for arm in own["measured"]:
            for clock in ("measured", "in processor time"):
                one = own[clock][arm]
                met = "met" if one["lower"] >= GOALS["measured"] else "missed"
                lines.append(
                    f"  {arm}, {clock}: {one['speed']:.3f} of the best fixed speed ({one['lower']:.3f} to "
                    f"{one['upper']:.3f}; {GOALS['measured']} {met}), {one['over plain']:.2f} x plain"
                )
            lines.append(f"  {arm}, replayed: {replay[arm]:.3f} ({GOALS['replayed']} wanted)")
    return "\n".join(lines)
