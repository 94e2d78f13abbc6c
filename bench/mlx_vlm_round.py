"""Milliseconds a token of our MTP and of mlx-vlm's on the same tiny golden pairs: host and dispatch overhead.

    python bench/mlx_vlm_round.py --mlx-vlm-python VENV/bin/python --json bench/results/mlx_vlm.json

mlx-vlm lives in its own environment (pip install 'mlx[cpu]' 'mlx-vlm==0.7.*'). Processes of the two alternate. Both
are greedy with 3 drafts a round (mlx-vlm's block of 4), give the golden text and do not count prefill. Our time
includes finding the text of the tokens and the statistics, mlx-vlm's only the tokens.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from report import Run, machine, milliseconds_a_token, record, refuse_different_text, rounded, save

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
OURS, PEER = "ours", "mlx-vlm"


def time_ours(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Our arm, in this process: warm-ups, then the timed runs."""
    sys.path.insert(0, str(ROOT / "tests"))
    from mlx_mtp import Sampling
    from mlx_mtp.conversation import Conversation
    from pairs import golden_pair

    mx.set_default_device(mx.cpu)
    conversation = Conversation(golden_pair(folder.name, compiled=True))
    ids = np.load(folder / "golden.npz")["short.ids"].tolist()
    runs = []
    for _ in range(args.warm_ups + args.runs):
        conversation.clear()
        chunks = conversation.stream(
            ids, max_tokens=args.tokens, sampling=Sampling(temperature=0.0), num_draft_tokens=args.drafts
        )
        started = time.perf_counter()
        taken = list(chunks)
        mx.synchronize()
        stats = taken[-1].stats
        runs.append(
            {
                "tokens": [token for chunk in taken for token in chunk.tokens],
                "seconds": time.perf_counter() - started - stats.ttft_s,
                "rounds": stats.rounds,
                "accepted": stats.accepted,
            }
        )
    return runs[args.warm_ups :]


def run_process(arm: str, variant: str, args: argparse.Namespace) -> list[Run]:
    """One process of one arm -> its timed runs."""
    flags = {"drafts": args.drafts, "tokens": args.tokens, "warm-ups": args.warm_ups, "runs": args.runs}
    numbers = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    script = [args.mlx_vlm_python, str(ROOT / "bench" / "mlx_vlm_arm.py"), str(GOLDEN / variant)]
    if arm == OURS:
        script = [sys.executable, __file__, "--only-ours", variant]
    done = subprocess.run([*script, *numbers], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    runs = json.loads(done.stdout.splitlines()[-1])
    return [
        Run(run["tokens"], run["seconds"], {name: run[name] for name in ("rounds", "accepted")})
        for run in runs
    ]


def compare(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """A B A B .. on one pair -> milliseconds a token of both and their ratio."""
    runs: dict[str, list[Run]] = {OURS: [], PEER: []}
    for _ in range(args.repeats):
        for arm, own in runs.items():
            own.extend(run_process(arm, variant, args))
    refuse_different_text(runs)
    expected = np.load(GOLDEN / variant / "golden.npz")
    golden = expected["short.greedy"][len(expected["short.ids"]) :].tolist()[: args.tokens]
    if runs[OURS][0].tokens[: len(golden)] != golden:
        sys.exit(f"{variant}: the text is not the golden one: nothing is reported")
    times: dict[str, Any] = {}
    for arm, own in runs.items():
        times[arm] = milliseconds_a_token(own, args.tokens - 1) | own[-1].notes
        per_round = 1e3 * sorted(run.seconds for run in own)[len(own) // 2] / own[-1].notes["rounds"]
        times[arm]["ms a round"] = rounded(per_round)
    for unit, get in (
        ("token", lambda arm: times[arm]["median"]),
        ("round", lambda arm: times[arm]["ms a round"]),
    ):
        times[f"ours / mlx-vlm, a {unit}"] = rounded(get(OURS) / get(PEER))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="*", default=["31b", "e2b"], help="folders of tests/golden")
    parser.add_argument("--mlx-vlm-python", help="the interpreter that has mlx-vlm")
    parser.add_argument("--drafts", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--warm-ups", type=int, default=2, help="discarded runs in each process")
    parser.add_argument("--runs", type=int, default=3, help="timed runs in each process")
    parser.add_argument("--repeats", type=int, default=5, help="processes of each arm")
    parser.add_argument("--json", type=Path, help="also write the record here")
    parser.add_argument("--only-ours", metavar="VARIANT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_ours:
        print(json.dumps(time_ours(GOLDEN / args.only_ours, args)))
        return
    if not args.mlx_vlm_python:
        parser.error("--mlx-vlm-python is needed: the interpreter of an environment with mlx-vlm 0.7")
    peer = subprocess.run(
        [
            args.mlx_vlm_python,
            "-c",
            "from importlib.metadata import version as v; print(v('mlx-vlm'), v('mlx'))",
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.split()
    load = machine()["load_average"]
    results = {"load before": load, "pairs": {name: compare(name, args) for name in args.variants}}
    settings = {
        "drafts": args.drafts,
        "tokens": args.tokens,
        "timed runs": args.runs * args.repeats,
        "peer": {"mlx-vlm": peer[0], "mlx": peer[1]},
    }
    result = record("MTP on tiny pairs against mlx-vlm: host and dispatch overhead", settings, results)
    print(f"{result['what']}: {result['label']}")
    for name, times in results["pairs"].items():
        print(
            f"{name}: ours {times[OURS]['median']} ms a token ({times[OURS]['rounds']} rounds), "
            f"mlx-vlm {times[PEER]['median']} ({times[PEER]['rounds']}); "
            f"{times['ours / mlx-vlm, a token']} a token, {times['ours / mlx-vlm, a round']} a round"
        )
    save(result, args.json)


if __name__ == "__main__":
    main()
