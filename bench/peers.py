"""Milliseconds a token, rounds and host work of our decoding and of peers', on the same pair and prompts.

    python bench/make_peer_env.py PEERS
    python bench/peers.py PEERS 31b e2b --json bench/results/peers_tiny.json         # golden pairs: host and dispatch
    python bench/enlarge.py PAIR && python bench/peers.py PEERS PAIR --tokens 64     # memory-bound
    python bench/peers.py PEERS PAIR --openblas /usr/lib/x86_64-linux-gnu/libopenblas.so.0

A pair is the name of a folder of tests/golden, or a folder that holds target/, drafter/ and held_out.json. All arms are
greedy, in float32 unless --as-stored, one prompt at a time; processes of the arms alternate; the time of prefill and of
a warm-up does not count. Ours includes finding the text and the statistics, the peers' only the tokens. Host work is
watched in one further run of each process, which is not timed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from make_peer_env import python_of
from peer_arm import Job, write_job
from preload import MARK, check_preloaded, rerun_with
from report import machine, record, rounded, save, spread

BENCH = Path(__file__).resolve().parent
GOLDEN = BENCH.parent / "tests" / "golden"


@dataclass(frozen=True, slots=True)
class Arm:
    """A script, whose environment runs it (None: this one), whether it drafts, and how many (None: as asked for)."""

    script: str
    peer: str | None
    drafts: bool
    k: int | None = None


ARMS = {
    "ours plain": Arm("peer_ours.py", None, False),
    "ours MTP": Arm("peer_ours.py", None, True),
    "mlx-lm plain": Arm("peer_mlx_lm.py", "mlx-lm", False),
    "mlx-lm speculative": Arm("peer_mlx_lm.py", "mlx-lm", True),
    "mlx-vlm MTP": Arm("peer_mlx_vlm.py", "mlx-vlm", True),
    "transformers plain": Arm("peer_transformers.py", "transformers", False),
    "transformers assisted": Arm("peer_transformers.py", "transformers", True),
}
OURS = "ours"
REFERENCE = f"{OURS} plain"  # whose text the others' is compared with
UNSTABLE = "differs from run to run"
RATIOS = (
    ("ours MTP", "mlx-vlm MTP"),
    ("ours plain", "mlx-lm plain"),
    ("ours MTP", "ours plain"),
    ("ours MTP", "mlx-lm plain"),
    ("ours MTP", "transformers assisted"),
)


@dataclass(frozen=True, slots=True)
class Pair:
    """Folders of target and drafter, and the token ids of the prompts."""

    name: str
    target: Path
    drafter: Path
    prompts: list[list[int]]


def find_pair(name: str, prompts: int) -> Pair:
    """A golden pair with its short prompt, or a folder with held-out code prompts beside the pair."""
    folder = GOLDEN / name
    golden = folder / "golden.npz"
    if golden.is_file():
        ids = [np.load(golden)["short.ids"].tolist()]
    else:
        folder = Path(name)
        held_out = folder / "held_out.json"
        if not held_out.is_file():
            sys.exit(
                f"{held_out}: not found; give a folder of tests/golden, or one that bench/enlarge.py wrote"
            )
        ids = [list(prompt["ids"]) for prompt in json.loads(held_out.read_text())["code"][:prompts]]
    return Pair(folder.name, folder / "target", folder / "drafter", ids)


def run_process(arm: Arm, pair: Pair, args: argparse.Namespace) -> dict[str, Any]:
    """One process of one arm -> what it printed."""
    job = Job(
        target=str(pair.target),
        drafter=str(pair.drafter),
        prompts=pair.prompts,
        tokens=args.tokens,
        drafts=(args.drafts if arm.k is None else arm.k) if arm.drafts else 0,
        warm_ups=args.warm_ups,
        runs=args.runs,
        float32=not args.as_stored,
        watch=True,
    )
    # Not resolved: the link in an environment's folder is what makes Python find that environment.
    python = sys.executable if arm.peer is None else str(python_of(args.peers, arm.peer).absolute())
    with tempfile.TemporaryDirectory() as folder:
        command = [python, str(BENCH / arm.script), str(write_job(job, Path(folder) / "job.json"))]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    if done.returncode:
        sys.exit(f"{arm.script} {pair.name}: ended with {done.returncode}: {done.stderr[-2000:]}")
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


def compare(pair: Pair, arms: Mapping[str, Arm], args: argparse.Namespace) -> dict[str, Any]:
    """A B A B .. on one pair -> what each arm took and did, by its name."""
    printed: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for turn in range(args.repeats):
        for name, arm in arms.items():
            print(f"{pair.name}, pass {turn + 1} of {args.repeats}: {name}", file=sys.stderr, flush=True)
            printed[name].append(run_process(arm, pair, args))
    reference = printed[REFERENCE][0]["runs"][0]["tokens"]
    timed = len(pair.prompts) * (args.tokens - 1)
    return {name: figures_of(name, own, reference, timed) for name, own in printed.items()}


def ratios_of(figures: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """Milliseconds a token of one arm over another's, where both wrote the same text."""
    return {
        f"{a} / {b}, ms a token": rounded(
            figures[a]["ms a token"]["median"] / figures[b]["ms a token"]["median"]
        )
        for a, b in RATIOS
        if a in figures and b in figures and "equal" == figures[a]["text"] == figures[b]["text"]
    }


def figures_of(
    name: str, printed: list[dict[str, Any]], reference: list[list[int]], timed: int
) -> dict[str, Any]:
    """All processes of one arm -> its figures; ends with exit code 1 where our own runs disagree.

    A peer whose runs disagree keeps its times, says so, and is in no ratio.
    """
    runs = [run for process in printed for run in process["runs"]]
    last = runs[-1]
    is_stable = all(run["tokens"] == last["tokens"] for run in runs)
    if not is_stable and name.startswith(OURS):
        sys.exit(f"{name} gives different tokens from run to run: nothing is reported")
    times = spread([1e3 * run["seconds"] / timed for run in runs])
    watched = [process["host"] for process in printed if process["host"] is not None]
    host = {what: rounded(median(own[what] for own in watched)) for what in watched[0]} if watched else None
    return {
        "text": text_verdict(last["tokens"], reference) if is_stable else UNSTABLE,
        "ms a token": times,
        "tokens a second": rounded(1e3 / times["median"]),
        "ms a round": rounded(times["median"] * timed / last["rounds"]),
        "rounds": last["rounds"],
        "tokens a round": rounded(timed / last["rounds"]),
        "accepted": last["accepted"],
        "host, a round": host,
        "versions": printed[-1]["versions"],
    }


def text_verdict(tokens: list[list[int]], reference: list[list[int]]) -> str:
    """ "equal", or in how many replies it is not and where the first of them leaves the reference."""
    differing = [
        (prompt, next(i for i, (a, b) in enumerate(zip(own, other, strict=True)) if a != b))
        for prompt, (own, other) in enumerate(zip(tokens, reference, strict=True))
        if own != other
    ]
    if not differing:
        return "equal"
    prompt, at = differing[0]
    return f"differs in {len(differing)} of {len(tokens)}, first in reply {prompt + 1} from token {at + 1} on"


def show(arms: Mapping[str, dict[str, Any]]) -> None:
    """Print a pair's figures, a line an arm."""
    print(f"{'':22} ms/token  (from    to)  ms/round  tokens/round  host ms  dispatch    wait  syncs  text")
    for arm, own in arms.items():
        times, host = own["ms a token"], own["host, a round"]
        watched = (
            f"{host['host ms']:7.2f}  {host['dispatch ms']:8.2f} {host['wait ms']:7.2f}  {host['syncs']:5.1f}"
            if host
            else f"{'-':>7}  {'-':>8} {'-':>7}  {'-':>5}"
        )
        print(
            f"{arm:22} {times['median']:8.2f} ({times['min']:.2f} to {times['max']:.2f}) {own['ms a round']:8.2f}"
            f"  {own['tokens a round']:12.2f}  {watched}  {own['text']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", type=Path, help="the folder that make_peer_env.py filled")
    parser.add_argument("pairs", nargs="+", metavar="PAIR", help="a folder of tests/golden, or a path")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--drafts", type=int, default=3, help="a round")
    parser.add_argument("--tokens", type=int, default=200, help="a reply")
    parser.add_argument("--prompts", type=int, default=2, help="of the held-out ones")
    parser.add_argument("--warm-ups", type=int, default=1, help="discarded replies in each process")
    parser.add_argument("--runs", type=int, default=2, help="timed runs in each process")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each arm")
    parser.add_argument("--as-stored", action="store_true", help="in the number format of the files")
    parser.add_argument("--openblas", type=Path, help="run again with this library preloaded, one thread")
    parser.add_argument("--json", type=Path, help="also write the record here")
    parser.add_argument(MARK, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.openblas and not args.preloaded:
        rerun_with(args.openblas)
    arms = {name: ARMS[name] for name in dict.fromkeys([REFERENCE, *args.arms])}
    for peer in {arm.peer for arm in arms.values() if arm.peer}:
        if not python_of(args.peers, peer).exists():
            parser.error(f"{args.peers / peer}: not there; run bench/make_peer_env.py {args.peers} {peer}")
    blas = {"blas": "the wheel's own"}
    if args.preloaded:
        blas = {"blas": str(args.openblas), "four rows cost one row times": str(rounded(check_preloaded()))}
    load = machine()["load_average"]
    pairs = [find_pair(name, args.prompts) for name in args.pairs]
    results: dict[str, Any] = {"load before": load, "pairs": {}}
    for pair in pairs:
        figures = compare(pair, arms, args)
        results["pairs"][pair.name] = {
            "prompts": len(pair.prompts),
            "arms": figures,
            "ratios": ratios_of(figures),
        }
    settings = {"drafts": args.drafts, "tokens": args.tokens, "timed runs": args.runs * args.repeats, **blas}
    result = record("our decoding and peers' on the same pairs", settings, results)
    print(f"{result['what']}: {result['label']}")
    for name, found in results["pairs"].items():
        print(f"{name}: {found['prompts']} prompts")
        show(found["arms"])
        for what, ratio in found["ratios"].items():
            print(f"  {what}: {ratio}")
    save(result, args.json)


if __name__ == "__main__":
    main()
