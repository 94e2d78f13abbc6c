"""k chained drafter steps from a committed state: the proposals of the next round."""

import mlx.core as mx

from mlx_mtp.drafter import Drafter, draft_hidden, draft_logits, next_hidden, view_for_drafter
from mlx_mtp.sampling import SamplerClass, choose
from mlx_mtp.state import State, no_drafts
from mlx_mtp.target import Target, embed


def draft(
    target: Target, drafter: Drafter, state: State, sampler: SamplerClass, *, k: int, bucket: int
) -> mx.array:
    """A state without pending drafts -> proposals [B, k] for positions length+1 .. length+k.

    The drafter chooses with the target's own noise at each position, which is what makes its draws agree.
    """
    if k == 0:
        return no_drafts(state.last.shape[0])
    view = view_for_drafter(target.text, drafter, state.kv, state.length, bucket=bucket)
    token, hidden, drafts = state.last[:, None], state.hidden, []
    counts = None if state.counts is None else state.counts[:, None]
    for step in range(1, k + 1):
        row = draft_hidden(drafter, embed(target, token), hidden, view)
        token = _choose(drafter, row, state.length[:, None] + step, state, sampler, counts)
        drafts.append(token)
        hidden = next_hidden(drafter, row)
    return mx.concatenate(drafts, axis=1)


def _choose(
    drafter: Drafter,
    row: mx.array,
    positions: mx.array,
    state: State,
    sampler: SamplerClass,
    counts: mx.array | None,
) -> mx.array:
    """The drafter's row [B, 1, H] -> its token [B, 1]."""
    kernels, head = drafter.kernels, drafter.centroid_head
    how = (positions, state.seed, state.sampling, sampler)
    if sampler.decided_by_best and head is None and kernels.head_choose is not None:
        return kernels.head_choose(drafter.embedding, None, row, *how)[0]
    if sampler.decided_by_best and head is not None and kernels.centroid_choose is not None:
        return kernels.centroid_choose(
            head.centroids, head.members, head.top_k, drafter.embedding, row, *how
        )[0]
    logits, ids = draft_logits(drafter, row)
    return choose(logits, *how, ids=ids, counts=counts)[0]
