"""One prefill and five rounds at published sizes with made-up 4-bit weights: that they run, in what memory and time.

    python bench/real_shapes.py e2b 26b-a4b --json bench/results/real_shapes.json

Random weights give random text: drafts are wrong and tokens a round mean nothing here. Slow on a CPU by design.
Also makes all five published pairs without memory for their weights and prints their parameter counts.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from report import machine, record, rounded, save, spread
from synthetic import configs_of, instantiated_parameters, quantised_tensors

from mlx_mtp.decode import RowLimits, decode
from mlx_mtp.drafter import Drafter, make_drafter
from mlx_mtp.policy import FixedPolicy
from mlx_mtp.prefill import first_token
from mlx_mtp.published_configs import SIZES
from mlx_mtp.round import Rounds
from mlx_mtp.sampling import Sampling, sampler_class, sampling_arrays
from mlx_mtp.state import State, StateCell, no_drafts
from mlx_mtp.target import Target, make_target
from mlx_mtp.turns import History

DTYPES = {"bfloat16": mx.bfloat16, "float32": mx.float32}
GIB = 2**30


def prefilled(target: Target, ids: list[int], room: int) -> tuple[State, float]:
    """A cold greedy state after `ids` whose first token is chosen, and the seconds it took."""
    started = time.perf_counter()
    kv, hidden, _ = History(target).extend(ids, room=room)
    sampling = Sampling(temperature=0.0)
    state = State(
        kv=kv,
        length=mx.array([len(ids)], mx.int32),
        last=mx.zeros((1,), mx.uint32),
        hidden=hidden,
        drafts=no_drafts(1),
        seed=mx.array([0], mx.uint32),
        sampling=sampling_arrays(sampling, target.text.vocab_size),
        counts=None,
        active=mx.array([True]),
    )
    token, valid = first_token(target, state, sampler_class([sampling]))
    state = state._replace(last=token, active=valid)
    mx.eval(state)
    return state, time.perf_counter() - started


def play(
    target: Target, drafter: Drafter | None, ids: list[int], *, drafts: int, rounds: int
) -> tuple[list[int], list[float], float]:
    """A prefill and `rounds` rounds -> tokens, seconds of each (the first ones compile), seconds of the prefill."""
    room = (drafts + 1) * (rounds + 1)
    state, prefill_seconds = prefilled(target, ids, room)
    cell = StateCell(state)
    del state
    limits = [RowLimits(room, frozenset())]
    greedy = sampler_class([Sampling(temperature=0.0)])
    steps = decode(Rounds(target, drafter), cell, limits, FixedPolicy(drafts), greedy)
    tokens, seconds = list(next(steps).tokens[0]), []
    for _ in range(rounds):
        started = time.perf_counter()
        tokens += next(steps).tokens[0]
        mx.synchronize()
        seconds.append(time.perf_counter() - started)
    steps.close()
    return tokens, seconds, prefill_seconds


def run_size(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """Weights, prefill, rounds with drafts and without; refused unless the tokens agree."""
    mx.reset_peak_memory()
    target_config, drafter_config = configs_of(size)
    dtype = DTYPES[args.dtype]
    started = time.perf_counter()
    target = make_target(target_config, quantised_tensors(target_config, dtype, seed=1))
    drafter = make_drafter(drafter_config, quantised_tensors(drafter_config, dtype, seed=2))
    made = time.perf_counter() - started
    weights = mx.get_active_memory()
    vocab_size = target_config.text.vocab_size
    ids = mx.random.randint(3, vocab_size, (args.prompt,), key=mx.random.key(3)).tolist()
    mx.reset_peak_memory()
    tokens, seconds, prefill_seconds = play(target, drafter, ids, drafts=args.drafts, rounds=args.rounds)
    peak = mx.get_peak_memory()
    plain, plain_seconds, _ = play(target, None, ids, drafts=0, rounds=args.rounds)
    compared = min(len(tokens), len(plain))
    if tokens[:compared] != plain[:compared]:
        sys.exit(f"{size}: text with {args.drafts} drafts differs from plain text: nothing is reported")
    return {
        "seconds to make the weights": rounded(made),
        "weights GiB": rounded(weights / GIB),
        "peak GiB beyond the weights": rounded((peak - weights) / GIB),
        "peak GiB": rounded(peak / GIB),
        "prefill seconds": rounded(prefill_seconds),
        "rounds": spread(seconds),
        "plain rounds": spread(plain_seconds),
        "tokens": len(tokens),
        "tokens compared with plain": compared,
        "finite": len(tokens) > args.rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sizes", nargs="*", choices=[*SIZES, []], help="sizes to run; none: counts alone")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--drafts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of activations and scales")
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    counts = {
        size: dict(zip(("target", "drafter"), map(instantiated_parameters, configs_of(size)), strict=True))
        for size in SIZES
    }
    for size, count in counts.items():
        print(
            f"{size:8} target {count['target'] / 1e9:7.3f} billion, drafter {count['drafter'] / 1e6:7.1f} million"
        )
    runs = {}
    for size in args.sizes:
        runs[size] = run_size(size, args)
        print(f"{size}: {runs[size]}")
    settings = {name: vars(args)[name] for name in ("prompt", "drafts", "rounds", "dtype")}
    results = {"parameters": counts, "load after": machine()["load_average"], "runs": runs}
    save(record("published shapes with made-up 4-bit weights", settings, results), args.json)


if __name__ == "__main__":
    main()
