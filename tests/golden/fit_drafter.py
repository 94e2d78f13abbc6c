"""Fit a tiny random drafter to its target's greedy text on the golden prompts."""

import torch

from tiny_pairs import DRAFTS, prompts, visible_rows


def fit(target: torch.nn.Module, drafter: torch.nn.Module, steps: int) -> float:
    """Overfit with Adam, drafts chained and K/V cut as in a round; returns the last loss a token."""
    examples = [greedy_example(target, ids, new) for _, ids, new in prompts()]
    generator = torch.Generator().manual_seed(3)
    embed = target.get_input_embeddings()
    inner = {}
    hook = drafter.model.norm.register_forward_hook(lambda module, args, out: inner.update(hidden=out))
    optimiser = torch.optim.Adam(drafter.parameters(), lr=2e-3)
    drafter.train()
    for step in range(steps):
        start, sequence, hidden_rows, shared = examples[step % len(examples)]
        last_start = sequence.shape[1] - DRAFTS - 1
        position = int(torch.randint(start, last_start, (1,), generator=generator))
        hidden, loss = hidden_rows[:, position - 1 : position], 0.0
        kv = visible_rows(shared, position)
        for j in range(DRAFTS):
            with torch.no_grad():
                token = embed(sequence[:, position + j : position + j + 1])
            out = drafter(
                inputs_embeds=torch.cat([token, hidden], -1),
                position_ids=torch.tensor([[position]]),
                attention_mask=None,
                shared_kv_states=kv,
                use_cache=False,
            )
            hidden = out.last_hidden_state
            loss = loss + head_loss(drafter, out.logits, inner["hidden"], sequence[:, position + 1 + j])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    hook.remove()
    drafter.eval()
    return float(loss.detach()) / DRAFTS


@torch.no_grad()
def greedy_example(target: torch.nn.Module, ids: torch.Tensor, new_tokens: int) -> tuple:
    sequence = target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    out = target(sequence, output_hidden_states=True, return_shared_kv_states=True, use_cache=False)
    return ids.shape[1], sequence, out.hidden_states[-1], out.shared_kv_states


def head_loss(drafter, logits: torch.Tensor, hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Cross entropy; a centroid head also learns its discrete routing, from the right cluster."""
    cross_entropy = torch.nn.functional.cross_entropy
    head = drafter.masked_embedding
    if head is None:
        return cross_entropy(logits[:, 0], wanted)
    cluster_of = torch.empty(head.token_ordering.numel(), dtype=torch.long)
    cluster_of[head.token_ordering.view(head.num_centroids, -1)] = torch.arange(head.num_centroids)[:, None]
    all_logits = hidden[:, 0] @ drafter.lm_head.weight.T
    return cross_entropy(all_logits, wanted) + cross_entropy(head.centroids(hidden[:, 0]), cluster_of[wanted])
