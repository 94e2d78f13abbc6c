"""Tokens a second of ragged requests through batches of width 1, 2, 4 and 8, plain and with drafts, and of auto.

    python bench/batch_width.py demo --json bench/results/batch_width.json
    python bench/batch_width.py demo --openblas /usr/lib/x86_64-linux-gnu/libopenblas.so.0
    python bench/enlarge.py FOLDER --gigabytes 0.4 && python bench/batch_width.py FOLDER/target --prompts 6

Greedy, float32, the same held-out code prompts in every arm, replies of 16 to 112 tokens, arms alternated, prefill
counted. Every arm's texts must be the same, or nothing is reported. "auto" learns from its own runs only; so does the
arm that chooses its width, too. Arms are compared within each pass, for the machine is faster in some than in others;
a run adds its passes to those in the file, unless the pair, prompts, BLAS or commit are others.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from demo_models import folder_of, held_out_code, load_ours
from preload import MARK, check_preloaded, rerun_with
from report import Run, alternate, commit, machine, record, rounded, save, spread

from mlx_mtp import Sampling
from mlx_mtp.batch import generate_rows
from mlx_mtp.batch_choice import make_chooser
from mlx_mtp.conversation import Request, make_request
from mlx_mtp.fit import Fit
from mlx_mtp.pair import Pair
from mlx_mtp.policy import make_policy
from mlx_mtp.pressure import Guard
from mlx_mtp.round_times import RoundTimes

WIDTHS = (1, 2, 4, 8)


def requests_of(pair: Pair, target: str, count: int) -> list[Request]:
    """Replies of 16, 48, 80 and 112 tokens in turn."""
    return [
        make_request(pair, ids, max_tokens=16 + 32 * (i % 4), sampling=Sampling(temperature=0.0))
        for i, ids in enumerate(held_out_code(target, count))
    ]


def play(
    pair: Pair, requests: list[Request], width: int | None, drafts: int | str, learned: tuple[RoundTimes, Fit]
) -> Run:
    """One run; width None: chosen meanwhile. `learned` is what the arm's earlier runs say."""
    times, fit = learned
    policy = make_policy(drafts, has_drafter=True, fit=fit, times=times)
    started = time.perf_counter()
    outs = generate_rows(pair, requests, policy, Guard(), max_batch=width or make_chooser(times, fit, drafts))
    seconds = time.perf_counter() - started
    drafted = sum(out.stats.drafted for out in outs)
    accepted = sum(out.stats.accepted for out in outs)
    return Run(
        [token for out in outs for token in out.tokens], seconds, {"drafted": drafted, "accepted": accepted}
    )


def what_of(target: str) -> str:
    """The pair in words that name no folder of this machine."""
    if target == "demo":
        return "the demo pair"
    size = (folder_of(target) / "model.safetensors").stat().st_size
    return f"an enlarged demo pair of {size / 1e9:.2f} GB"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    pair = load_ours(args.target)
    requests = requests_of(pair, args.target, args.prompts)
    ways: list[tuple[str, int | str]] = [("plain", 0), ("k=2", 2), ("k=4", 4), ("auto", "auto")]
    arms: dict[str, Callable[[], Run]] = {
        f"width {width} {name}": partial(play, pair, requests, width, drafts, (RoundTimes(), Fit()))
        for width in args.widths
        for name, drafts in ways
    }
    arms["width auto auto"] = partial(play, pair, requests, None, "auto", (RoundTimes(), Fit()))
    load = machine()["load_average"]
    runs = alternate(arms, repeats=args.repeats, warm_ups=args.warm_ups)
    passes = [
        {name: rounded(own[turn].seconds) for name, own in runs.items()} | {"load": load}
        for turn in range(args.repeats)
    ]
    return {
        "tokens a run": sum(request.max_tokens for request in requests),
        "commit": commit(),
        "passes": passes,
    }


def with_earlier(results: dict[str, Any], what: str, settings: dict[str, Any], path: Path | None) -> None:
    """Add the passes of the file, if they are of the same."""
    earlier = json.loads(path.read_text()) if path is not None and path.is_file() else None
    if earlier is None or earlier["what"] != what or earlier["settings"]["blas"] != settings["blas"]:
        return
    own = earlier["results"]
    if all(own.get(name) == results[name] for name in ("tokens a run", "commit")):
        results["passes"] = own["passes"] + results["passes"]


def speeds(passes: Sequence[Mapping[str, Any]], tokens: int) -> dict[str, dict[str, Any]]:
    """By arm: tokens a second; its speed over that of others, of each pass in which both were played."""
    names = list(dict.fromkeys(name for one in passes for name in one if name != "load"))
    found = {}
    for name in names:
        own = [one for one in passes if name in one]
        width = name.rpartition(" ")[0]
        found[name] = spread([tokens / one[name] for one in own])
        for words, other in (("width 1 plain", "width 1 plain"), ("plain of the width", f"{width} plain")):
            ratios = [one[other] / one[name] for one in own if other in one]
            if ratios:
                found[name][f"this / {words}"] = spread(ratios)
        fixed = {
            other: statistics.median(one[other] for one in own if other in one)
            for other in names
            if other.startswith(f"{width} ") and "auto" not in other
        }
        if fixed:
            best = min(fixed, key=fixed.__getitem__)
            found[name]["this / best fixed of the width"] = spread(
                [one[best] / one[name] for one in own if best in one]
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", default="demo", help='"demo" or the target folder of a pair')
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm-ups", type=int, default=1, help="discarded passes over all arms")
    parser.add_argument("--openblas", type=Path, help="run again with this library preloaded, one thread")
    parser.add_argument("--json", type=Path, help="also write the record here")
    parser.add_argument(MARK, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.openblas and not args.preloaded:
        rerun_with(args.openblas)
    mx.set_default_device(mx.cpu)
    settings: dict[str, Any] = {"blas": "the wheel's own"}
    if args.preloaded:
        settings = {"blas": str(args.openblas), "four rows cost one row times": rounded(check_preloaded())}
    results, what = measure(args), f"batches, greedy, float32: {what_of(args.target)}"
    with_earlier(results, what, settings, args.json)
    results["tokens a second"] = speeds(results["passes"], results["tokens a run"])
    result = record(what, settings, results)
    print(f"{what}: {result['label']}")
    for name, row in results["tokens a second"].items():
        ratios = ", ".join(
            f"{own['median']:.2f} ({own['min']:.2f} to {own['max']:.2f}) x {words.removeprefix('this / ')}"
            for words, own in row.items()
            if words.startswith("this / ")
        )
        print(f"{name:16} {row['median']:7.1f} tok/s ({row['min']:.1f} to {row['max']:.1f}); {ratios}")
    save(result, args.json)


if __name__ == "__main__":
    sys.exit(main())
