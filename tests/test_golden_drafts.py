"""In every round that transformers played, our drafter proposes what its drafter proposes from committed rows."""

import mlx.core as mx
import pytest

from goldens import GREEDY, PROMPTS, golden, largest_gap, loaded, state_after
from mlx_mtp.draft import draft
from mlx_mtp.drafter import draft_hidden, draft_logits, view_for_drafter
from mlx_mtp.pair import Pair
from mlx_mtp.state import State, bucket_for
from mlx_mtp.target import embed
from pairs import VARIANTS

TOLERANCE = 1e-3

each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_prompt = pytest.mark.parametrize("prompt", PROMPTS)


def first_logits(pair: Pair, state: State, bucket: int) -> tuple[mx.array, mx.array]:
    """Logits [N] of the round's first draft and the token ids [N] they belong to."""
    assert pair.drafter is not None
    text = pair.target.text
    view = view_for_drafter(text, pair.drafter, state.kv, state.length, bucket=bucket)
    row = draft_hidden(pair.drafter, embed(pair.target, state.last[:, None]), state.hidden, view)
    logits, ids = draft_logits(pair.drafter, row)
    return logits[0, 0], mx.arange(text.vocab_size) if ids is None else ids[0, 0]


@each_variant
@each_prompt
def test_every_golden_round_gives_the_strict_drafts(variant: str, prompt: str) -> None:
    pair, expected = loaded(variant), golden(variant, prompt)
    assert pair.drafter is not None
    for played, position in enumerate(expected.position.tolist()):
        state, bucket = state_after(pair.target, expected.text[: position + 1]), bucket_for(position)
        assert state.last.item() == expected.last_token[played]
        want = [token for token in expected.strict_tokens[played].tolist() if token >= 0]
        drafts = draft(pair.target, pair.drafter, state, GREEDY, k=len(want), bucket=bucket)
        assert drafts[0].tolist() == want, f"round {played} at position {position}"

        logits, ids = first_logits(pair, state, bucket)
        want_logits = expected.strict_logits[played]
        assert largest_gap(logits, want_logits[ids.tolist()]) < TOLERANCE, f"round {played}"
        # transformers gives the tokens that a centroid head does not score the smallest scored logit - 1
        assert (want_logits > want_logits.min()).sum() <= ids.size


@each_variant
def test_drafts_do_not_depend_on_the_bucket_or_on_rows_past_the_committed_ones(variant: str) -> None:
    pair, expected = loaded(variant), golden(variant, "long")
    assert pair.drafter is not None
    position = expected.position.tolist()[3]
    clean = state_after(pair.target, expected.text[: position + 1])
    dirty = clean._replace(kv=noise_after(pair, clean.kv, position))
    drafts = [
        draft(pair.target, pair.drafter, state, GREEDY, k=4, bucket=bucket).tolist()
        for state in (clean, dirty)
        for bucket in (position, 128, 256)
    ]
    assert drafts == [expected.strict_tokens[3:4].tolist()] * 6


def noise_after(pair: Pair, kv: tuple, position: int) -> tuple:
    """`kv` with large numbers in every row that holds no committed position up to `position` - 1."""
    noisy = []
    for layer, (keys, values) in enumerate(kv):
        rows = keys.shape[2]
        sliding = pair.target.text.layer_types[layer] == "sliding_attention"
        committed = mx.arange(rows) < position
        if sliding:
            newest = position - 1
            held = newest - (newest - mx.arange(rows)) % rows
            committed = held > newest - pair.target.text.sliding_window
        noisy.append(tuple(mx.where(committed[:, None], x, 50.0) for x in (keys, values)))
    return tuple(noisy)
