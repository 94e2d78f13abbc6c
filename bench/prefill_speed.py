"""Prefill of the demo pair against mlx-lm's, and the peak memory of a long prompt against its bound.

    python bench/prefill_speed.py demo --json bench/results/prefill.json
    python bench/prefill_speed.py demo --chunks 256 512 1024 2048 --memory-tokens 4000 32000

Time is to the first token, from a cold cache, alternated; mlx-lm's generate_step has its own default step of 2048.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from demo_models import load_mlx_lm, load_ours, long_prompt
from preload import MARK, check_preloaded, rerun_with
from report import Run, alternate, machine, record, rounded, save, spread

from mlx_mtp import Sampling
from mlx_mtp.attention import KEY_TILE, SCORES_PER_TILE
from mlx_mtp.conversation import Conversation
from mlx_mtp.pair import Pair
from mlx_mtp.prefill import CHUNK
from mlx_mtp.state import capacity_for, kv_shapes

MIB = 2**20
ARRAYS_OF_SCORES = 4  # scores, masked scores, weights and one being made
ARRAYS_OF_ROWS = 8  # rows of a chunk as wide as its widest projection that are alive at once


def time_ours(pair: Pair, ids: list[int], chunk: int) -> Run:
    """Seconds to the first token, as the library's own statistics give them."""
    conversation = Conversation(pair, chunk=chunk)
    reply = conversation.generate(ids, max_tokens=1, sampling=Sampling(temperature=0.0), num_draft_tokens=0)
    mx.synchronize()
    return Run(reply.tokens, reply.stats.ttft_s, {})


def time_mlx_lm(model: Any, ids: list[int]) -> Run:
    """Seconds until generate_step reports that the prompt is done, which is when its first token is there."""
    from mlx_lm.generate import generate_step

    done: list[float] = []

    def on_progress(processed: int, total: int) -> None:
        if processed == total:
            done.append(time.perf_counter())

    started = time.perf_counter()
    steps = generate_step(mx.array(ids), model, max_tokens=1, prompt_progress_callback=on_progress)
    tokens = [token for token, _ in steps]
    mx.synchronize()
    return Run(tokens, done[-1] - started, {})


def compare_speed(pair: Pair, args: argparse.Namespace) -> dict[str, Any]:
    """Ours with every chunk size asked for, and mlx-lm's."""
    ids = long_prompt(args.target, args.tokens)
    arms: dict[str, Callable[[], Run]] = {
        f"ours, chunks of {chunk}": partial(time_ours, pair, ids, chunk) for chunk in args.chunks
    }
    arms["mlx-lm"] = partial(time_mlx_lm, load_mlx_lm(args.target), ids)
    runs = alternate(arms, repeats=args.repeats, warm_ups=1)
    times: dict[str, Any] = {name: spread([run.seconds for run in own]) for name, own in runs.items()}
    for own in times.values():
        own["this / mlx-lm"] = rounded(own["median"] / times["mlx-lm"]["median"])
    return times


def bytes_bound(pair: Pair, tokens: int, chunk: int) -> dict[str, float]:
    """MiB that a prefill may take beyond the weights: K/V (exact), a tile's scores, a chunk's rows (by budget)."""
    text = pair.target.text
    item = pair.target.dtype.size
    shapes = kv_shapes(text, 1, capacity_for(tokens + 1))
    kv = sum(2 * item * b * heads * rows * dim for b, heads, rows, dim in shapes)
    scores = min(SCORES_PER_TILE, text.num_heads * chunk * KEY_TILE) * 4
    widest = max(
        max(text.mlp_size_of(i) for i in range(text.num_layers)),
        text.num_layers * text.per_layer_input_dim,
        text.num_heads * max(text.head_dim, text.global_head_dim),
    )
    scratch = ARRAYS_OF_SCORES * scores + ARRAYS_OF_ROWS * chunk * widest * 4
    return {"K/V": kv / MIB, "scratch": scratch / MIB, "all": (kv + scratch) / MIB}


def measure_memory(pair: Pair, args: argparse.Namespace, tokens: int, chunk: int) -> dict[str, Any]:
    """Peak MiB beyond what was allocated before, beside its bound."""
    ids = long_prompt(args.target, tokens)
    mx.clear_cache()
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run = time_ours(pair, ids, chunk)
    peak = (mx.get_peak_memory() - before) / MIB
    bound = bytes_bound(pair, tokens, chunk)
    return {
        "peak MiB beyond the weights": rounded(peak),
        "of it scratch MiB": rounded(peak - bound["K/V"]),
        "bound MiB": {name: rounded(value) for name, value in bound.items()},
        "within": peak <= bound["all"],
        "seconds": rounded(run.seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", default="demo", help='"demo" or the target folder of a pair')
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--chunks", type=int, nargs="+", default=[CHUNK])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-tokens", type=int, nargs="*", default=[4000, 32_000])
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
    settings |= {"tokens": args.tokens, "key tile": KEY_TILE, "scores per tile": SCORES_PER_TILE}
    load = machine()["load_average"]
    pair = load_ours(args.target)
    memory = {
        f"{tokens} tokens, chunks of {chunk}": measure_memory(pair, args, tokens, chunk)
        for tokens in args.memory_tokens
        for chunk in args.chunks
    }
    times = compare_speed(pair, args)
    results = {"load before": load, "seconds to the first token": times, "memory": memory}
    result = record(f"prefill of {args.tokens} tokens, demo pair, float32", settings, results)
    print(f"{result['what']}: {result['label']}")
    for name, own in times.items():
        print(
            f"{name:22} {own['median']:7.3f} s ({own['min']} to {own['max']})  {own['this / mlx-lm']} x mlx-lm"
        )
    for name, own in memory.items():
        print(f"{name}: {own}")
    save(result, args.json)


if __name__ == "__main__":
    sys.exit(main())
