"""Encode the training text once: code.bin and docs.bin (uint16, each document <bos> ... <eos>), chats.json."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from corpus import docs_files, docstring_chats, read_text, stdlib_files
from model import BOS, EOS


def encode_files(tok: Tokenizer, paths: list[Path]) -> np.ndarray:
    """-> [total] uint16"""
    # Text that happens to spell a control token is rare enough here to drop the file.
    texts = [t for t in map(read_text, paths) if "<|" not in t and "<bos>" not in t and len(t) > 200]
    encoded = tok.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([BOS, *e.ids, EOS], dtype=np.uint16) for e in encoded])


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--stdlib", type=Path, required=True)
    ap.add_argument("--docs", type=Path, required=True)
    ap.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    ap.add_argument("--out", type=Path, required=True)
    args = ap.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tok = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    for name, paths in (("code", stdlib_files(args.stdlib)), ("docs", docs_files(args.docs))):
        ids = encode_files(tok, paths)
        ids.tofile(args.out / f"{name}.bin")
        print(f"{name}: {len(paths)} files, {len(ids) / 1e6:.2f}M tokens, {ids.max()}")
    held = np.concatenate([encode_files(tok, [p]) for p in stdlib_files(args.stdlib, held_out=True)])
    held.tofile(args.out / "held_out_code.bin")
    chats = [c for p in stdlib_files(args.stdlib) for c in docstring_chats(args.stdlib, p)]
    (args.out / "chats.json").write_text(json.dumps(chats))
    print(f"held-out code: {len(held) / 1e6:.2f}M tokens; {len(chats)} docstring chats")


if __name__ == "__main__":
    main()
