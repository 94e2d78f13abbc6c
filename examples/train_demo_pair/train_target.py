"""Train the demo target on a CPU for a given time. Stop and resume at will: progress is kept by elapsed time."""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from pathlib import Path

import torch

from attention import masks
from batches import Mixture
from head_loss import capped_head_loss
from model import BOS, new_target

STEADY = {"code": 0.60, "docs": 0.18, "docstrings": 0.11, "facts": 0.11}
DECAY = {"code": 0.64, "docs": 0.06, "docstrings": 0.14, "facts": 0.16}
WARMUP, DECAY_FROM = 0.02, 0.68  # shares of the time budget


def learning_rate_scale(progress: float) -> float:
    """Warmup, constant, linear to zero; progress is elapsed time / budget."""
    return min(1.0, progress / WARMUP, max(0.0, (1 - progress) / (1 - DECAY_FROM)))


def optimizers(model: torch.nn.Module, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers (if muon_lr), AdamW for embeddings, gains and scalars."""
    matrices, tables, vectors = [], [], []
    for name, p in model.named_parameters():
        inner = p.ndim == 2 and ".layers." in name and muon_lr > 0
        (matrices if inner else tables if p.ndim == 2 else vectors).append(p)
    adam = torch.optim.AdamW(
        [{"params": tables}, {"params": vectors, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        fused=True,
    )
    opts: list[torch.optim.Optimizer] = [adam]
    if matrices:
        opts.append(torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
    for opt in opts:
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return opts


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of batch [B, L + 1]; the <bos> of the next document is nobody's prediction."""
    ids, labels = batch[:, :-1], batch[:, 1:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(
            input_ids=ids, attention_mask=masks(ids), use_cache=False
        ).last_hidden_state  # [B, L, H]
    labels = labels.masked_fill(labels == BOS, -100)
    return capped_head_loss(hidden, model.lm_head.weight, labels, model.config.final_logit_softcapping)


def save(path: Path, model: torch.nn.Module, opts: list[torch.optim.Optimizer], progress: dict) -> None:
    part = path.with_suffix(".part")
    torch.save(
        {"model": model.state_dict(), "opts": [o.state_dict() for o in opts], "progress": progress}, part
    )
    part.replace(path)


def set_rates(opts: list[torch.optim.Optimizer], scale: float) -> None:
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = group["base_lr"] * scale


class Run:
    """One session of training; `state` survives in the checkpoint."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.path, self.stopping = args, args.out / "target.pt", False
        self.model = new_target(attention="packed").train()
        self.opts = optimizers(self.model, args.lr, args.muon_lr)
        self.state = {"elapsed": 0.0, "steps": 0, "tokens": 0, "loss": math.nan}
        if self.path.exists():
            saved = torch.load(self.path, map_location="cpu", weights_only=False)
            self.model.load_state_dict(saved["model"])
            for opt, state in zip(self.opts, saved["opts"], strict=True):
                opt.load_state_dict(state)
            self.state = saved["progress"]
        self.mixture = Mixture(args.data, args.tokenizer, seed=self.state["steps"])

    def step(self, progress: float) -> float:
        weights = DECAY if progress > DECAY_FROM else STEADY
        rows, length = self.args.rows, 512
        if self.state["steps"] % 6 == 5:  # some context beyond 512
            rows, length = rows // 4, 2048
        set_rates(self.opts, learning_rate_scale(progress))
        loss = loss_of(self.model, self.mixture.batch(weights, rows, length))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for opt in self.opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        self.state["steps"] += 1
        self.state["tokens"] += rows * length
        return float(loss.detach())

    def train(self) -> None:
        budget, last = self.args.minutes * 60, time.monotonic()
        saved_at, logged_at, done = last, last, self.state["tokens"]
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopping", True))
        while self.state["elapsed"] < budget and not self.stopping:
            loss = self.step(self.state["elapsed"] / budget)
            old = self.state["loss"]
            self.state["loss"] = loss if math.isnan(old) else 0.97 * old + 0.03 * loss
            now = time.monotonic()
            self.state["elapsed"] += now - last
            last = now
            if now - logged_at > self.args.log_every:
                rate = (self.state["tokens"] - done) / (now - logged_at)
                logged_at, done = now, self.state["tokens"]
                print(json.dumps({**self.state, "last": loss, "tokens_per_s": round(rate)}), flush=True)
            if now - saved_at > 180:
                saved_at = now
                save(self.path, self.model, self.opts, self.state)
        save(self.path, self.model, self.opts, self.state)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--data", type=Path, required=True)
    ap.add_argument("--tokenizer", type=Path, required=True)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--minutes", type=float, default=75, help="total, over all sessions")
    ap.add_argument("--rows", type=int, default=16, help="rows of 512 tokens per step")
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--muon-lr", type=float, default=2e-3, help="0: AdamW for everything")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--log-every", type=float, default=30)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    Run(args).train()


if __name__ == "__main__":
    main()
