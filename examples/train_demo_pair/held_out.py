"""Write the evaluation prompts: held-out functions, held-out docstring questions and held-out paraphrases."""

from __future__ import annotations

import argparse
import ast
import json
import random
from pathlib import Path

from tokenizers import Tokenizer

from batches import FACTS
from corpus import docstring_chats, module_name, read_text, stdlib_files

PROMPT_TOKENS = 200


def code_prompts(stdlib: Path, tok: Tokenizer, count: int) -> list[dict]:
    """The first tokens of long functions and classes of held-out modules, taken from each module in turn."""
    per_module: list[list[dict]] = []
    for path in stdlib_files(stdlib, held_out=True):
        source, found = read_text(path), []
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.col_offset == 0:
                ids = tok.encode(
                    "<bos>" + (ast.get_source_segment(source, node) or ""), add_special_tokens=False
                ).ids
                if len(ids) > PROMPT_TOKENS + 40:
                    ids = ids[:PROMPT_TOKENS]
                    found.append(
                        {
                            "name": f"{module_name(stdlib, path)}.{node.name}",
                            "ids": ids,
                            "text": tok.decode(ids[1:], skip_special_tokens=False),
                        }
                    )
        per_module.append(found)
    ordered = [found[i] for i in range(max(map(len, per_module))) for found in per_module if i < len(found)]
    return ordered[:count]


def chat_prompts(stdlib: Path, count: int) -> list[dict]:
    """Every held-out paraphrase with its key fact, then questions about held-out modules (no key fact)."""
    facts = json.loads(FACTS.read_text())["facts"]
    chats = [{"question": q, "fact": fact["fact"]} for fact in facts for q in fact["held_out"]]
    rng = random.Random(0)
    pool = [c for p in stdlib_files(stdlib, held_out=True) for c in docstring_chats(stdlib, p)]
    chats += [
        {"question": templates[0].format(**fields), "fact": None}
        for templates, fields, _ in rng.sample(pool, count)
    ]
    return chats


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--stdlib", type=Path, required=True)
    ap.add_argument("--tokenizer", type=Path, required=True)
    ap.add_argument("--out", type=Path, required=True)
    args = ap.parse_args()
    tok = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    prompts = {"code": code_prompts(args.stdlib, tok, 32), "chat": chat_prompts(args.stdlib, 24)}
    args.out.write_text(json.dumps(prompts, ensure_ascii=False, indent=1) + "\n")
    print({k: len(v) for k, v in prompts.items()}, f"{args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
