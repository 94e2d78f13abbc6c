"""k chained drafter steps from a committed state: the proposals of the next round."""

from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.drafter import (
    Drafter,
    DrafterView,
    draft_hidden,
    draft_logits,
    next_hidden,
    view_for_drafter,
)
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
    choice = Choice(state.seed, state.sampling, state.counts, sampler)
    for step in range(1, k + 1):
        positions = state.length[:, None] + step
        token, hidden = draft_one(target, drafter, token, hidden, positions, view, choice)
        drafts.append(token)
    return mx.concatenate(drafts, axis=1)


class Choice(NamedTuple):
    """How every token of a chain is chosen; `counts` [B, 2, V] as of its beginning."""

    seed: mx.array
    sampling: dict[str, mx.array]
    counts: mx.array | None
    sampler: SamplerClass


def draft_one(
    target: Target,
    drafter: Drafter,
    token: mx.array,
    hidden: mx.array,
    positions: mx.array,
    view: DrafterView,
    choice: Choice,
) -> tuple[mx.array, mx.array]:
    """The last token [B, 1] and hidden row [B, 1, H] -> the token proposed for `positions` [B, 1], and the next row."""
    row = draft_hidden(drafter, embed(target, token), hidden, view)
    return _choose(drafter, row, positions, choice), next_hidden(drafter, row)


def _choose(drafter: Drafter, row: mx.array, positions: mx.array, choice: Choice) -> mx.array:
    """The drafter's row [B, 1, H] -> its token [B, 1]."""
    kernels, head, sampler = drafter.kernels, drafter.centroid_head, choice.sampler
    how = (positions, choice.seed, choice.sampling, sampler)
    if sampler.decided_by_best and head is None and kernels.head_choose is not None:
        return kernels.head_choose(drafter.embedding, None, row, *how)[0]
    if sampler.decided_by_best and head is not None and kernels.centroid_choose is not None:
        return kernels.centroid_choose(
            head.centroids, head.members, head.top_k, drafter.embedding, row, *how
        )[0]
    logits, ids = draft_logits(drafter, row)
    counts = None if choice.counts is None else choice.counts[:, None]
    return choose(logits, *how, ids=ids, counts=counts)[0]
