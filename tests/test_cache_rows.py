"""After every round the K/V rows below `length` are those of a fresh prefill of the committed tokens."""

import mlx.core as mx
import numpy as np
import pytest

from kv_rows import TOLERANCE, largest_gap
from mlx_mtp.conversation import make_request, start_row
from mlx_mtp.pair import Pair
from mlx_mtp.sampling import Sampling, sampler_class
from mlx_mtp.state import RING_SLACK, State, bucket_for, join_rows, ring_rows
from mlx_mtp.turns import History
from pairs import VARIANTS, golden_pair, random_drafter
from talks import golden_rows, golden_text

GREEDY = Sampling(temperature=0.0)
SAMPLER = sampler_class([GREEDY])
NEW_TOKENS = 49  # three windows and one


def started(pair: Pair, ids: list[int]) -> State:
    request = make_request(pair, ids, max_tokens=NEW_TOKENS + RING_SLACK, sampling=GREEDY)
    kv, hidden, _ = History(pair.target).extend(ids, room=request.max_tokens)
    return start_row(pair, request, kv, hidden, with_bias=False, with_counts=False)


def check_every_round(pair: Pair, variant: str, prompts: list[str], k: int) -> list[int]:
    """Play rounds of `k` drafts until every row passed its golden text; -> drafts accepted per row and round."""
    texts = [golden_text(variant, prompt) for prompt in prompts]
    expected = [golden_rows(variant, prompt) for prompt in prompts]
    state = join_rows(pair.target.text, [started(pair, ids) for ids, _ in texts])
    emitted = [[token] for token in state.last.tolist()]
    accepted = []
    while min(len(tokens) for tokens in emitted) < NEW_TOKENS:
        before, pending = state.length.tolist(), state.drafts.shape[1]
        bucket = bucket_for(max(before) + pending + 1)
        state, tokens, n = pair.rounds(state, k=k, bucket=bucket, sampler=SAMPLER)
        mx.eval(state, tokens, n)
        for row, kept in enumerate(n.tolist()):
            emitted[row] += tokens[row, : kept + 1].tolist()
            accepted.append(kept)
            ids, text = texts[row]
            whole = min(state.length[row].item(), len(ids) + len(text))
            gap = largest_gap(
                pair.target, state.kv, expected[row], whole, written=before[row] + pending + 1, row=row
            )
            assert gap < TOLERANCE, (variant, prompts[row], k, whole, gap)
    for row, (ids, text) in enumerate(texts):
        assert emitted[row][: len(text)] == text[: len(emitted[row])]
        assert state.length[row].item() == len(ids) + len(emitted[row]) - 1
        assert state.length[row].item() > 3 * pair.target.text.sliding_window
    return accepted


@pytest.mark.parametrize("k", [0, 3, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_equal_a_fresh_prefill(variant, k):
    accepted = check_every_round(golden_pair(variant), variant, ["long"], k)
    if k:  # partial rounds leave rejected rows behind, which is what could go wrong
        assert len(set(accepted)) > 1, accepted


@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_rejected_rows_never_count(variant):
    pair = golden_pair(variant, drafter=random_drafter(variant))
    accepted = check_every_round(pair, variant, ["long"], 8)
    assert np.mean(accepted) < 0.5


@pytest.mark.parametrize("variant", ["e4b", "12b"])
def test_rows_of_a_ragged_batch(variant):
    check_every_round(golden_pair(variant), variant, ["short", "long"], 4)


def test_the_ring_wraps_in_these_texts():
    """Otherwise the tests above would not see a slot that is used twice."""
    for variant in VARIANTS:
        text = golden_pair(variant).target.text
        assert (
            len(golden_text(variant, "long")[0])
            < ring_rows(text)
            < len(golden_text(variant, "long")[0]) + NEW_TOKENS
        )
