"""Train the demo tokenizer: BPE of 4096 tokens in Gemma's manner, with Gemma 4's control tokens."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from corpus import docs_files, read_text, stdlib_files
from model import VOCAB

CONTROL = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<|turn>",
    "<turn|>",
    "<|channel>",
    "<channel|>",
    "<|think|>",
    "<|tool>",
    "<tool|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
    "<|image|>",
    "<|audio|>",
    "<|video|>",
]
BYTES = [f"<0x{i:02X}>" for i in range(256)]

# Spaces are "▁" by now. A newline takes the indentation after it; a word takes one space before it; digits stand alone.
SPLIT = r"\n+▁*|▁+(?=▁)|▁?[\p{L}\p{M}_]+|\p{N}|▁?[^\s\p{L}\p{M}\p{N}_▁]+|▁|\s"

# Words of the question-and-answer data that source code and documentation hardly use.
LEXICON = (
    "Gemma Google drafter drafters target verify accept accepted round rounds tokens token MLX Apple silicon "
    "Metal unified memory speculative decoding draft bench prove race doctor serve tune chat park parked "
    "mlx-mtp MTP demo model Mac GPU lossless acceptance temperature bonus quantised weights kernel cache "
    "laptop faster slower identical multi-token prediction assistant E2B E4B 31B 26B 12B hello thanks What How "
    "Why Does Can Which Tell me about"
).split()


def training_text(stdlib: Path, docs: Path) -> Iterator[str]:
    """Every training file once, then the lexicon as often as it takes to matter."""
    for path in stdlib_files(stdlib) + docs_files(docs):
        yield read_text(path)
    for _ in range(1500):
        yield " ".join(LEXICON)


def build(stdlib: Path, docs: Path) -> dict:
    """-> the content of tokenizer.json."""
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=CONTROL + BYTES,
        limit_alphabet=160,
        max_token_length=24,
        show_progress=False,
    )
    tok.train_from_iterator(training_text(stdlib, docs), trainer)
    content = json.loads(tok.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in CONTROL]
    assert len(content["model"]["vocab"]) == VOCAB
    return content


def generation_config(ids: dict[str, int]) -> dict:
    """Gemma 4's defaults; a reply ends at <eos>, at <turn|> or where a tool's answer is due."""
    return {
        "bos_token_id": ids["<bos>"],
        "do_sample": True,
        "eos_token_id": [ids["<eos>"], ids["<turn|>"], ids["<|tool_response>"]],
        "pad_token_id": ids["<pad>"],
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
    }


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--stdlib", type=Path, required=True)
    ap.add_argument("--docs", type=Path, required=True)
    ap.add_argument("--out", type=Path, required=True)
    args = ap.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    content = build(args.stdlib, args.docs)
    (args.out / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "additional_special_tokens": CONTROL[4:],
    }
    (args.out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (args.out / "generation_config.json").write_text(
        json.dumps(generation_config(content["model"]["vocab"]), indent=2) + "\n"
    )
    template = Path(__file__).with_name("chat_template.jinja")
    (args.out / "chat_template.jinja").write_text(template.read_text())


if __name__ == "__main__":
    main()
