"""Distil the drafter from the frozen target: every position of a text is the start of a chained draft round.

A round at position P (strict view): keys and values of rows j < P (sliding layers: j >= P - W), query at constant
position P, inputs [scaled target embedding of the token at P + s ; hidden], where hidden is the target's post-norm row
P - 1 for step s = 0 and the drafter's own projected output afterwards.  Step s is taught the target's distribution at
row P + s.  All rounds of a row run in parallel, because their masks differ but their keys are the same.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from attention import masks
from batches import Mixture
from model import BOS, load_weights, new_drafter, new_target
from train_target import learning_rate_scale, optimizers, save, set_rates

WEIGHTS = {"code": 0.60, "docs": 0.06, "docstrings": 0.17, "facts": 0.17}
CROSS_ENTROPY = 0.2
EARLY_STEPS, ALL_STEPS_FROM = 4, 0.5  # fewer chained steps in the first half of the time
# An int, even 0, makes transformers 5.23 cut per-layer inputs, which a drafter does not have.
ALL_ROWS = torch.tensor(0)


class Lesson(NamedTuple):
    """What the target has to say about ids [B, L]."""

    embeds: torch.Tensor  # [B, L, H] scaled embeddings
    hidden: torch.Tensor  # [B, L, H] post-norm
    logits: torch.Tensor  # [B, L, V] softcapped
    kv: dict[str, tuple[torch.Tensor, torch.Tensor]]  # per layer type, of the last own layer: [B, 1, L, D]


@torch.no_grad()
def lesson(target: torch.nn.Module, ids: torch.Tensor, autocast: bool = True) -> Lesson:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = target.model(
            input_ids=ids, attention_mask=masks(ids), use_cache=False, return_shared_kv_states=True
        )
        logits = target.lm_head(out.last_hidden_state)
    cap = target.config.final_logit_softcapping
    logits = cap * torch.tanh(logits.float() / cap)
    return Lesson(target.model.embed_tokens(ids), out.last_hidden_state, logits, dict(out.shared_kv_states))


def draft_steps(
    drafter: torch.nn.Module, taught: Lesson, ids: torch.Tensor, steps: int
) -> list[torch.Tensor]:
    """-> per step s, the drafter's features [B, L - steps, H_d] of the rounds at P = 1 .. L - steps."""
    rounds = ids.shape[1] - steps
    visible = masks(ids, strict=True)
    hidden, features = F.pad(taught.hidden, (0, 0, 1, 0))[:, :-1], []
    for s in range(steps):
        shifted = F.pad(taught.embeds[:, s:], (0, 0, 0, s))
        x = drafter.pre_projection(torch.cat([shifted, hidden], -1))
        u = drafter.model(
            inputs_embeds=x,
            attention_mask=visible,
            shared_kv_states=taught.kv,
            logits_to_keep=ALL_ROWS,
            use_cache=False,
        ).last_hidden_state
        hidden = drafter.post_projection(u)
        features.append(u[:, 1 : rounds + 1])
    return features


def usable(ids: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """Per step s, [B, L - steps] bool: rows P - 1, P and P + s belong to one document, for P = 1 .. L - steps."""
    document, rounds = (ids == BOS).cumsum(1), ids.shape[1] - steps
    before = document[:, :rounds]
    start = document[:, 1 : rounds + 1] == before
    return [start & (document[:, s + 1 : s + 1 + rounds] == before) for s in range(steps)]


def loss_of(
    drafter: torch.nn.Module, taught: Lesson, ids: torch.Tensor, steps: int, share: float
) -> tuple[torch.Tensor, list[float]]:
    """-> (mean over steps of KL + a little cross-entropy on the target's argmax, agreement with argmax per step)."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = draft_steps(drafter, taught, ids, steps)
    rounds, total, agreed = ids.shape[1] - steps, torch.zeros(()), []
    sampled = torch.rand(ids.shape[0], rounds) < share
    for s, (u, ok) in enumerate(zip(features, usable(ids, steps), strict=True)):
        pick = ok & sampled
        teacher = taught.logits[:, s + 1 : s + 1 + rounds][pick]  # [N, V]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            student = drafter.lm_head(u[pick])
        log_q, p = F.log_softmax(student.float(), -1), F.softmax(teacher, -1)
        best = teacher.argmax(-1)
        kl = -(p * log_q).sum(-1).mean()  # minus the teacher's entropy, which is constant
        total = total + kl + CROSS_ENTROPY * F.nll_loss(log_q, best)
        agreed.append(float((log_q.argmax(-1) == best).float().mean()))
    return total / steps, agreed


@torch.no_grad()
def begin_from_target(drafter: torch.nn.Module, target: torch.nn.Module) -> None:
    """Start in the H_d directions that span most of the target's embedding, instead of random ones."""
    table = target.model.embed_tokens.weight  # [V, H]
    _, basis = torch.linalg.eigh(table.T @ table)
    basis = basis[:, -drafter.hidden_size :]  # [H, H_d]
    drafter.model.embed_tokens.weight.copy_(table @ basis)
    drafter.post_projection.weight.copy_(basis)
    drafter.pre_projection.weight.copy_(torch.cat([basis, basis]).T)
    gain = target.model.norm.weight.square().mean().sqrt()
    drafter.model.norm.weight.fill_(float(gain))


class Run:
    """One session; the checkpoint keeps progress by elapsed time, as in train_target.py."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.path, self.stopping, self.seen = args, args.out / "drafter.pt", False, 0.0
        self.target = new_target(attention="packed").eval().requires_grad_(False)
        self.follow()
        self.drafter = new_drafter(attention="packed").train()
        begin_from_target(self.drafter, self.target)
        self.opts = optimizers(self.drafter, args.lr, args.muon_lr)
        self.state = {"elapsed": 0.0, "steps": 0, "positions": 0, "loss": math.nan}
        if self.path.exists():
            saved = torch.load(self.path, map_location="cpu", weights_only=False)
            self.drafter.load_state_dict(saved["model"])
            for opt, state in zip(self.opts, saved["opts"], strict=True):
                opt.load_state_dict(state)
            self.state = saved["progress"]
            if args.restart_clock:
                self.state["elapsed"] = WARM_START * args.minutes * 60
        self.mixture = Mixture(args.data, args.tokenizer, seed=1000 + self.state["steps"])
        self.texts = torch.load(args.texts) if args.texts else None

    def follow(self) -> None:
        """Take up a newer checkpoint of a target that is still being trained."""
        changed = self.args.target.stat().st_mtime
        if changed != self.seen:
            self.seen = changed
            load_weights(self.target, self.args.target)

    def ids(self) -> torch.Tensor:
        """[B, L]: ground-truth text, or for a share of the batches text that the target wrote itself."""
        if self.texts is not None and self.mixture.rng.random() < self.args.own_share:
            return self.texts[torch.randint(len(self.texts), (self.args.rows,))].long()
        return self.mixture.batch(WEIGHTS, self.args.rows, self.args.length)[:, :-1]

    def step(self, progress: float) -> tuple[float, list[float]]:
        set_rates(self.opts, learning_rate_scale(progress))
        ids = self.ids()
        steps = self.args.steps if progress > ALL_STEPS_FROM else min(EARLY_STEPS, self.args.steps)
        loss, agreed = loss_of(self.drafter, lesson(self.target, ids), ids, steps, self.args.share)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), 1.0)
        for opt in self.opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        self.state["steps"] += 1
        self.state["positions"] += ids.numel()
        return float(loss.detach()), agreed

    def train(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopping", True))
        budget, last = self.args.minutes * 60, time.monotonic()
        logged_at = saved_at = last
        while self.state["elapsed"] < budget and not self.stopping:
            loss, agreed = self.step(self.state["elapsed"] / budget)
            old = self.state["loss"]
            self.state["loss"] = loss if math.isnan(old) else 0.95 * old + 0.05 * loss
            now = time.monotonic()
            self.state["elapsed"] += now - last
            last = now
            if now - logged_at > 20:
                logged_at = now
                print(json.dumps({**self.state, "agreed": [round(a, 3) for a in agreed]}), flush=True)
            if now - saved_at > 120:
                saved_at = now
                self.follow()
                save(self.path, self.drafter, self.opts, self.state)
        save(self.path, self.drafter, self.opts, self.state)


WARM_START = 0.05


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument(
        "--target", type=Path, required=True, help="checkpoint of train_target.py; may still change"
    )
    ap.add_argument("--data", type=Path, required=True)
    ap.add_argument("--tokenizer", type=Path, required=True)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--texts", type=Path, help="[N, L] tensor of the target's own text (continue_texts.py)")
    ap.add_argument("--own-share", type=float, default=0.5)
    ap.add_argument("--minutes", type=float, default=20)
    ap.add_argument("--rows", type=int, default=8)
    ap.add_argument("--length", type=int, default=512)
    ap.add_argument("--steps", type=int, default=6, help="chained draft steps")
    ap.add_argument("--share", type=float, default=0.5, help="share of the rounds whose logits are compared")
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--muon-lr", type=float, default=2e-3)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--fuse", action="store_true", help="compile small operations (fused.py)")
    ap.add_argument(
        "--restart-clock", action="store_true", help="resume the weights with a fresh time budget"
    )
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.fuse:
        from fused import fuse

        fuse()
    Run(args).train()


if __name__ == "__main__":
    main()
