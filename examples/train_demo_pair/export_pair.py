"""Write the trained pair in the layout of the published checkpoints: target/ with the tokenizer, and drafter/."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from model import DRAFTER, TARGET, export, load_weights, new_drafter, new_target

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--target", type=Path, required=True, help="checkpoint of train_target.py")
    ap.add_argument("--drafter", type=Path, help="checkpoint of distil_drafter.py (default: untrained)")
    ap.add_argument("--tokenizer", type=Path, required=True)
    ap.add_argument("--out", type=Path, required=True)
    args = ap.parse_args()
    target, drafter = new_target(), new_drafter()
    load_weights(target, args.target)
    if args.drafter:
        load_weights(drafter, args.drafter)
    generation = json.loads((args.tokenizer / "generation_config.json").read_text())
    export(target, TARGET, args.out / "target", generation)
    export(
        drafter,
        DRAFTER,
        args.out / "drafter",
        {**generation, "num_assistant_tokens": 4, "num_assistant_tokens_schedule": "constant"},
    )
    for name in TOKENIZER_FILES:
        shutil.copy(args.tokenizer / name, args.out / "target" / name)
    size = sum(
        p.stat().st_size for p in args.out.rglob("*") if p.suffix in (".safetensors", ".json", ".jinja")
    )
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
