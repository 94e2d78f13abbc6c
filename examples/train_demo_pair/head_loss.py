"""Cross-entropy of the tied, softcapped head, computed a few rows at a time so that logits stay in the CPU's cache."""

from __future__ import annotations

import torch

ROWS = 128


class _CappedHeadLoss(torch.autograd.Function):
    """Gradients are computed along with the loss: keeping [N, V] float32 logits costs more than the products."""

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, cap: float
    ) -> torch.Tensor:
        table, total = weight.bfloat16(), torch.zeros(())
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        count = (labels >= 0).sum()
        for rows in torch.arange(len(labels)).split(ROWS):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            h, label = hidden[part], labels[part, None]
            valid, label = (label >= 0).float(), label.clamp(min=0)
            t = (h @ table.T).float().div_(cap).tanh_()  # [rows, V]
            logits = t * cap
            chosen = logits.gather(1, label)
            norm = logits.logsumexp(1, keepdim=True)
            total += ((norm - chosen) * valid).sum()
            d = logits.sub_(norm).exp_()  # softmax, then d loss / d logits
            d.scatter_add_(1, label, torch.full_like(chosen, -1.0))
            d = d.mul_(t.square_().neg_().add_(1)).mul_(valid / count).bfloat16()
            d_hidden[part] = d @ table
            d_weight += (d.T @ h).float()
        ctx.save_for_backward(d_hidden, d_weight)
        return total / count

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * upstream, d_weight * upstream, None, None


def capped_head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, cap: float
) -> torch.Tensor:
    """hidden [..., H], weight [V, H], labels [...] (negative: ignored) -> mean loss."""
    return _CappedHeadLoss.apply(
        hidden.reshape(-1, hidden.shape[-1]).bfloat16(), weight, labels.reshape(-1), cap
    )
