"""Milliseconds a token of the demo pair: MTP with 1 to 6 drafts and "auto", plain, and mlx-lm's plain decoding.

    python bench/decode_speed.py demo --json bench/results/decode_stock.json
    python bench/decode_speed.py demo --openblas /usr/lib/x86_64-linux-gnu/libopenblas.so.0

Greedy, float32, the same held-out code prompts in every arm, arms alternated, prefill not counted.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from demo_models import held_out_chat, held_out_code, load_mlx_lm, load_ours
from preload import MARK, check_preloaded, rerun_with
from report import Run, alternate, machine, milliseconds_a_token, record, rounded, save

from mlx_mtp import Sampling
from mlx_mtp.conversation import Conversation


def play_ours(conversation: Conversation, prompts: list[list[int]], tokens: int, drafts: int | str) -> Run:
    """All prompts, each from a cold cache; what the policy has learned stays, as it does in a chat."""
    text: list[int] = []
    seconds, rounds, accepted, reused = 0.0, 0, 0, 0
    for ids in prompts:
        conversation.clear()
        chunks = conversation.stream(
            ids, max_tokens=tokens, sampling=Sampling(temperature=0.0), num_draft_tokens=drafts
        )
        started = time.perf_counter()
        *_, last = (text.extend(chunk.tokens) or chunk for chunk in chunks)
        mx.synchronize()
        seconds += time.perf_counter() - started - last.stats.ttft_s
        rounds += last.stats.rounds
        accepted += last.stats.accepted
        reused += last.stats.reused_tokens
    assert reused == 0
    return Run(text, seconds, {"rounds": rounds, "accepted": accepted})


def play_mlx_lm(model: Any, prompts: list[list[int]], tokens: int) -> Run:
    """mlx-lm's generate_step; the clock starts at the first token, when the second is under way already."""
    from mlx_lm.generate import generate_step

    text: list[int] = []
    seconds = 0.0
    for ids in prompts:
        steps = generate_step(mx.array(ids), model, max_tokens=tokens)
        text.append(next(steps)[0])
        started = time.perf_counter()
        text.extend(token for token, _ in steps)
        mx.synchronize()
        seconds += time.perf_counter() - started
    return Run(text, seconds, {})


def measure(args: argparse.Namespace) -> dict[str, Any]:
    pair = load_ours(args.target)
    chat = args.kind == "chat"
    prompts = (
        held_out_chat(pair, args.target, args.prompts) if chat else held_out_code(args.target, args.prompts)
    )
    arms: dict[str, Callable[[], Run]] = {
        name: partial(play_ours, Conversation(pair), prompts, args.tokens, drafts)
        for name, drafts in [("plain", 0), *((f"k={k}", k) for k in range(1, 7)), ("auto", "auto")]
    }
    arms["mlx-lm plain"] = partial(play_mlx_lm, load_mlx_lm(args.target), prompts, args.tokens)
    before = machine()
    runs = alternate(arms, repeats=args.repeats, warm_ups=args.warm_ups)
    timed = args.prompts * (args.tokens - 1)
    times = {name: milliseconds_a_token(own, timed) for name, own in runs.items()}
    plain, peer = times["plain"]["median"], times["mlx-lm plain"]["median"]
    for name, own in runs.items():
        median = times[name]["median"]
        times[name] |= {
            "plain / this": rounded(plain / median),
            "mlx-lm plain / this": rounded(peer / median),
        }
        if own[0].notes:
            times[name]["tokens a round"] = rounded(timed / own[-1].notes["rounds"])
    return {"load before": before["load_average"], "tokens a run": timed, "ms a token": times}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", default="demo", help='"demo" or the target folder of a pair')
    parser.add_argument("--kind", choices=("code", "chat"), default="code", help="of held-out prompts")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=200, help="a prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-ups", type=int, default=2, help="discarded passes over all arms")
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
    result = record("decoding the demo pair, greedy, float32", settings, results)
    print(f"{result['what']}: {result['label']}")
    for name, row in results["ms a token"].items():
        print(
            f"{name:14} {row['median']:7.3f} ms a token ({row['min']:.3f} to {row['max']:.3f})"
            f"  {row['plain / this']:.2f} x plain  {row['mlx-lm plain / this']:.2f} x mlx-lm"
            f"  {row.get('tokens a round', '')}"
        )
    save(result, args.json)


if __name__ == "__main__":
    sys.exit(main())
