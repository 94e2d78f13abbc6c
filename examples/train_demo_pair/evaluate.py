"""Measure an exported pair on held_out.json: tokens per round at several k, facts known, loss on held-out modules.

Greedy text is written by the target alone, with a cache.  The draft rounds over that text are then found in one
parallel pass per draft step, which gives the same rounds as playing them one by one (`--check` does so as well).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import DynamicCache

from attention import masks
from corpus import render_chat
from distil_drafter import ALL_ROWS, Lesson, lesson
from model import BOS, EOS, FULL, PAD, SLIDING, WINDOW, load_weights, new_drafter, new_target

KS = (2, 3, 4, 6)


@torch.no_grad()
def greedy(target: torch.nn.Module, prompts: torch.Tensor, new: int, stops: set[int]) -> list[list[int]]:
    """prompts [B, L] of one length -> prompt and continuation, each cut after its first stop token."""
    cache, ids, rows = DynamicCache(config=target.config), prompts, prompts.tolist()
    for _ in range(new):
        logits = target(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        ids = logits.argmax(-1, keepdim=True)
        for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
            if row[-1] not in stops or len(row) == prompts.shape[1]:
                row.append(token)
        if all(row[-1] in stops for row in rows):
            break
    return rows


@torch.no_grad()
def drafts_everywhere(
    target: torch.nn.Module, drafter: torch.nn.Module, text: list[int], k: int
) -> torch.Tensor:
    """-> [L, k]: what the drafter proposes for P + 1 .. P + k in a round at P; rows P = 1 .. L - 1 are meaningful."""
    length = -(-len(text) // WINDOW) * WINDOW
    ids = torch.tensor([text + [PAD] * (length - len(text))])
    taught: Lesson = lesson(target, ids, autocast=False)
    visible = masks(ids, strict=True)
    hidden, token, out = F.pad(taught.hidden, (0, 0, 1, 0))[:, :-1], ids, []
    for _ in range(k):
        x = drafter.pre_projection(torch.cat([target.model.embed_tokens(token), hidden], -1))
        u = drafter.model(
            inputs_embeds=x,
            attention_mask=visible,
            shared_kv_states=taught.kv,
            logits_to_keep=ALL_ROWS,
            use_cache=False,
        ).last_hidden_state
        token, hidden = drafter.lm_head(u).argmax(-1), drafter.post_projection(u)
        out.append(token[0, : len(text)])
    return torch.stack(out, 1)


def play(text: list[int], start: int, drafts: torch.Tensor, k: int) -> tuple[int, int, list[int]]:
    """Rounds over text[start + 1:] -> (rounds, tokens emitted, drafts accepted by position).

    text[start] is the token that prefill gave; a round at P emits the accepted drafts and the target's next token.
    """
    at, rounds, accepted = start, 0, [0] * k
    while at < len(text) - 1:
        n = 0
        while n < k and at + 1 + n < len(text) and int(drafts[at, n]) == text[at + 1 + n]:
            accepted[n] += 1
            n += 1
        at += n + 1
        rounds += 1
    return rounds, min(at, len(text) - 1) - start, accepted


@torch.no_grad()
def check_rounds(
    target: torch.nn.Module, reference: torch.nn.Module, text: list[int], drafts: torch.Tensor
) -> int:
    """Draft some rounds with transformers' own Gemma4AssistantForCausalLM.forward -> rounds that differ."""
    taught = lesson(target, torch.tensor([text[: len(text) // WINDOW * WINDOW]]), autocast=False)
    differ = 0
    for at in range(2, len(text) // WINDOW * WINDOW, 17):
        low = {FULL: 0, SLIDING: max(0, at - WINDOW)}
        kv = {kind: (k[:, :, low[kind] : at], v[:, :, low[kind] : at]) for kind, (k, v) in taught.kv.items()}
        token, hidden, found = torch.tensor([[text[at]]]), taught.hidden[:, at - 1 : at], []
        for _ in range(drafts.shape[1]):
            out = reference(
                inputs_embeds=torch.cat([target.model.embed_tokens(token), hidden], -1),
                position_ids=torch.tensor([[at]]),
                attention_mask=None,
                shared_kv_states=kv,
            )
            token, hidden = out.logits.argmax(-1), out.last_hidden_state
            found.append(int(token))
        differ += found != drafts[at].tolist()
    return differ


class Tally:
    """Rounds, tokens and acceptance of one kind of prompt at each k."""

    def __init__(self) -> None:
        self.counts = {k: [0, 0, 0] for k in KS}  # rounds, tokens, accepted

    def add(self, text: list[int], start: int, drafts: torch.Tensor) -> None:
        for k in KS:
            rounds, tokens, accepted = play(text, start, drafts, k)
            for i, value in enumerate((rounds, tokens, sum(accepted))):
                self.counts[k][i] += value

    def report(self) -> dict[str, Any]:
        return {
            f"k={k}": {
                "tokens_per_round": round(tokens / max(1, rounds), 2),
                "draft_acceptance_rate": round(accepted / max(1, rounds * k), 3),
                "rounds": rounds,
                "tokens": tokens,
            }
            for k, (rounds, tokens, accepted) in self.counts.items()
        }


@torch.no_grad()
def stream_loss(target: torch.nn.Module, path: Path, rows: int = 48) -> float:
    """Mean next-token loss over `rows` rows of 512 tokens spread over a token file."""
    stream = np.fromfile(path, dtype=np.uint16).astype(np.int64)
    starts = np.linspace(0, len(stream) - 513, rows).astype(int)
    batch = torch.from_numpy(np.stack([stream[s : s + 513] for s in starts]))
    total = 0.0
    for ids in batch.split(8):
        logits = lesson(target, ids[:, :-1], autocast=False).logits
        labels = ids[:, 1:].masked_fill(ids[:, 1:] == BOS, -100)
        total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)) * len(ids)
    return total / rows


class Evaluation:
    """An exported pair, loaded twice: plain attention for generation, packed attention for parallel rounds."""

    def __init__(self, pair: Path) -> None:
        self.target, self.packed = new_target(), new_target(attention="packed")
        self.drafter, self.reference = new_drafter(attention="packed"), new_drafter()
        for model, part in (
            (self.target, "target"),
            (self.packed, "target"),
            (self.drafter, "drafter"),
            (self.reference, "drafter"),
        ):
            load_weights(model, pair / part / "model.safetensors")
            model.eval().requires_grad_(False)
        self.tok = Tokenizer.from_file(str(pair / "target" / "tokenizer.json"))
        self.stops = {EOS, self.tok.token_to_id("<turn|>"), self.tok.token_to_id("<|tool_response>")}

    def code(self, prompts: list[dict], new: int, check: bool) -> dict[str, Any]:
        tally, differ = Tally(), []
        texts = greedy(self.target, torch.tensor([p["ids"] for p in prompts]), new, {EOS})
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            drafts = drafts_everywhere(self.packed, self.drafter, text, max(KS))
            tally.add(text, len(prompt["ids"]), drafts)
            if check and i < 3:
                differ.append(check_rounds(self.packed, self.reference, text, drafts))
        sample = self.tok.decode(texts[0][len(prompts[0]["ids"]) :])
        return {
            **tally.report(),
            **({"rounds_unlike_transformers": differ} if check else {}),
            "sample": sample,
        }

    def chat(self, prompts: list[dict], new: int) -> dict[str, Any]:
        paraphrases, docstrings, answers = Tally(), Tally(), []
        for prompt in prompts:
            asked = render_chat([{"role": "user", "content": prompt["question"]}]) + "<|turn>model\n"
            ids = self.tok.encode(asked, add_special_tokens=False).ids
            text = greedy(self.target, torch.tensor([ids]), new, self.stops)[0]
            drafts = drafts_everywhere(self.packed, self.drafter, text, max(KS))
            (paraphrases if prompt["fact"] else docstrings).add(text, len(ids), drafts)
            answers.append((prompt["fact"], prompt["question"], self.tok.decode(text[len(ids) :]).strip()))
        known = [fact.lower() in answer.lower() for fact, _, answer in answers if fact]
        return {
            "held-out questions": paraphrases.report(),
            "held-out modules": docstrings.report(),
            "facts": f"{sum(known)} of {len(known)}",
            "answers": answers,
        }


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--pair", type=Path, required=True, help="folder with target/ and drafter/")
    ap.add_argument("--held-out", type=Path, required=True, help="held_out.json")
    ap.add_argument("--data", type=Path, help="folder with held_out_code.bin, for the loss")
    ap.add_argument("--new", type=int, default=128)
    ap.add_argument("--limit", type=int, default=1000)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument(
        "--check", action="store_true", help="compare some rounds with transformers' own assistant"
    )
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    run, prompts = Evaluation(args.pair), json.loads(args.held_out.read_text())
    result = {
        "code": run.code(prompts["code"][: args.limit], args.new, args.check),
        "chat": run.chat(prompts["chat"][: args.limit], args.new),
    }
    if args.data:
        result["loss on held-out code"] = round(stream_loss(run.packed, args.data / "held_out_code.bin"), 3)
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
