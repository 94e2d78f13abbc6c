"""Drafts accepted by bits of the target and of the drafter: the demo pair on a CPU, greedy and sampled.

    python bench/drafter_bits.py --json bench/results/drafter_bits.json

Counts, not times, so the machine does not matter; but a demo pair is not Gemma, and how much a published drafter
loses by fewer bits is measured only with a published one. Ends without a result where MTP changed a text.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from demo_models import folder_of, held_out_chat, held_out_code
from report import record, rounded, save

import mlx_mtp
from mlx_mtp import Sampling
from mlx_mtp.pair import Pair
from mlx_mtp.quantize import quantize_checkpoint

BITS = (16, 8, 4)
SAMPLINGS = {
    "greedy": Sampling(temperature=0.0),
    "sampled": Sampling(temperature=1.0, top_k=64, top_p=0.95, seed=7),
}


def load_pair(target: Path, drafter: Path, bits: int) -> Pair:
    pair = mlx_mtp.load(target, drafter=drafter, drafter_bits=None if bits == 16 else bits, dtype=mx.float32)
    return replace(pair, prompt_format=replace(pair.prompt_format, eos_ids=frozenset()))


def texts(
    pair: Pair, prompts: list[list[int]], sampling: Sampling, tokens: int, drafts: int
) -> tuple[Any, ...]:
    """-> the tokens of every prompt, drafted, accepted, rounds."""
    written, drafted, accepted, rounds = [], 0, 0, 0
    for prompt in prompts:
        out = mlx_mtp.generate(pair, prompt, max_tokens=tokens, sampling=sampling, num_draft_tokens=drafts)
        written.append(out.tokens)
        drafted += out.stats.drafted
        accepted += out.stats.accepted
        rounds += out.stats.rounds
    return written, drafted, accepted, rounds


def measure(args: argparse.Namespace) -> dict[str, Any]:
    home = folder_of("demo")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="drafter_bits_") as place:
        for target_bits in BITS:
            target = home
            if target_bits != 16:
                target = quantize_checkpoint(home, Path(place) / str(target_bits), bits=target_bits)
            plain: dict[str, Any] = {}
            for bits in BITS:
                pair = load_pair(target, home.parent / "drafter", bits)
                prompts = held_out_code("demo", args.prompts) + held_out_chat(pair, "demo", args.prompts)
                for name, sampling in SAMPLINGS.items():
                    if name not in plain:
                        plain[name] = texts(pair, prompts, sampling, args.tokens, 0)[0]
                    got, drafted, accepted, rounds = texts(pair, prompts, sampling, args.tokens, args.drafts)
                    if got != plain[name]:
                        sys.exit(
                            f"target {target_bits}, drafter {bits}: MTP changed the text: nothing is reported"
                        )
                    row = {
                        "drafted": drafted,
                        "accepted": accepted,
                        "acceptance": rounded(accepted / drafted),
                        "tokens a round": rounded(len(prompts) * (args.tokens - 1) / rounds),
                    }
                    results[f"target {target_bits}, drafter {bits}, {name}"] = row
                    print(f"target {target_bits:2}  drafter {bits:2}  {name:8} {row}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=6, help="of code, and as many of chat")
    parser.add_argument("--tokens", type=int, default=128, help="a prompt")
    parser.add_argument("--drafts", type=int, default=4, help="a round")
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    results = measure(args)
    settings = {"prompts": 2 * args.prompts, "tokens": args.tokens, "drafts": args.drafts}
    result = record(
        "drafts accepted by bits, demo pair (not Gemma), same text as plain in every run", settings, results
    )
    result["label"] = "counts on the demo pair; says nothing about published drafters"
    save(result, args.json)
    print(json.dumps(settings))


if __name__ == "__main__":
    main()
