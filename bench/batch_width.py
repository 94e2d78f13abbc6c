"""Tokens a second of ragged requests through batches of width 1, 2, 4 and 8 on the demo pair, plain and with drafts.

    python bench/batch_width.py demo --json bench/results/batch_width.json
    python bench/batch_width.py demo --openblas /usr/lib/x86_64-linux-gnu/libopenblas.so.0

Greedy, float32, the same held-out code prompts in every arm, replies of 16 to 112 tokens, arms alternated, prefill
counted. Every arm's texts must be the same, or nothing is reported.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from demo_models import held_out_code, load_ours
from preload import MARK, check_preloaded, rerun_with
from report import Run, alternate, machine, record, rounded, save, spread

from mlx_mtp import Sampling
from mlx_mtp.batch import generate_rows
from mlx_mtp.conversation import Request, make_request
from mlx_mtp.pair import Pair
from mlx_mtp.policy import make_policy
from mlx_mtp.pressure import Guard

WIDTHS = (1, 2, 4, 8)


def requests_of(pair: Pair, target: str, count: int) -> list[Request]:
    """Replies of 16, 48, 80 and 112 tokens in turn."""
    return [
        make_request(pair, ids, max_tokens=16 + 32 * (i % 4), sampling=Sampling(temperature=0.0))
        for i, ids in enumerate(held_out_code(target, count))
    ]


def play(pair: Pair, requests: list[Request], width: int, drafts: int | str) -> Run:
    policy = make_policy(drafts, has_drafter=True, fit=pair.rounds.fit, times=pair.rounds.times)
    started = time.perf_counter()
    outs = generate_rows(pair, requests, policy, Guard(), max_batch=width)
    seconds = time.perf_counter() - started
    drafted = sum(out.stats.drafted for out in outs)
    accepted = sum(out.stats.accepted for out in outs)
    return Run(
        [token for out in outs for token in out.tokens], seconds, {"drafted": drafted, "accepted": accepted}
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    pair = load_ours(args.target)
    requests = requests_of(pair, args.target, args.prompts)
    ways: list[tuple[str, int | str]] = [("plain", 0), ("k=2", 2), ("auto", "auto")]
    arms: dict[str, Callable[[], Run]] = {
        f"width {width} {name}": partial(play, pair, requests, width, drafts)
        for width in WIDTHS
        for name, drafts in ways
    }
    before = machine()
    runs = alternate(arms, repeats=args.repeats, warm_ups=args.warm_ups)
    tokens = sum(request.max_tokens for request in requests)
    rates = {name: spread([tokens / run.seconds for run in own]) for name, own in runs.items()}
    alone = rates["width 1 plain"]["median"]
    for rate in rates.values():
        rate["this / width 1 plain"] = rounded(rate["median"] / alone)
    return {"load before": before["load_average"], "tokens a run": tokens, "tokens a second": rates}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", default="demo", help='"demo" or the target folder of a pair')
    parser.add_argument("--prompts", type=int, default=12)
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
    results = measure(args)
    result = record("batches of the demo pair, greedy, float32", settings, results)
    print(f"{result['what']}: {result['label']}")
    for name, row in results["tokens a second"].items():
        print(
            f"{name:14} {row['median']:7.1f} tok/s ({row['min']:.1f} to {row['max']:.1f})"
            f"  {row['this / width 1 plain']:.2f} x width 1 plain"
        )
    save(result, args.json)


if __name__ == "__main__":
    sys.exit(main())
