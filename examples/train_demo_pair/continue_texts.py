"""Let the target write text for the drafter: half greedy, half sampled, from prompts of the training mix."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import DynamicCache

from batches import Mixture
from distil_drafter import WEIGHTS
from model import BOS, load_weights, new_target

PROMPT = 64


@torch.no_grad()
def continuations(target: torch.nn.Module, prompts: torch.Tensor, length: int) -> torch.Tensor:
    """prompts [B, PROMPT] -> [B, length]; even rows greedy, odd rows at temperature 1 from the 64 best tokens."""
    cache, ids, rows = DynamicCache(config=target.config), prompts, [prompts]
    sampled = torch.arange(len(prompts))[:, None] % 2 == 1
    for _ in range(length - prompts.shape[1]):
        logits = (
            target(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            .logits[:, -1]
            .float()
        )
        best, tokens = logits.topk(64)
        drawn = tokens.gather(1, torch.multinomial(best.softmax(-1), 1))
        ids = torch.where(sampled, drawn, tokens[:, :1])
        rows.append(ids)
    return torch.cat(rows, 1)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--target", type=Path, required=True, help="checkpoint of train_target.py")
    ap.add_argument("--data", type=Path, required=True)
    ap.add_argument("--tokenizer", type=Path, required=True)
    ap.add_argument("--out", type=Path, required=True, help="file for the [N, L] int16 tensor")
    ap.add_argument("--rows", type=int, default=256)
    ap.add_argument("--length", type=int, default=512)
    ap.add_argument("--batch", type=int, default=64)
    ap.add_argument("--threads", type=int, default=2)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    target = new_target().eval().requires_grad_(False)
    load_weights(target, args.target)
    mixture, texts = Mixture(args.data, args.tokenizer, seed=77), []
    while sum(map(len, texts)) < args.rows:
        prompts = mixture.batch(WEIGHTS, args.batch, PROMPT)[:, :-1].clone()
        prompts[::4, 0] = BOS
        texts.append(continuations(target, prompts, args.length).short())
        torch.save(torch.cat(texts), args.out)
        print(f"{sum(map(len, texts))} rows", flush=True)


if __name__ == "__main__":
    main()
