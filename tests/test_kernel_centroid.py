"""centroid_head: clusters scored, their tokens' logits, and the choice, in two launches."""

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from head_cases import GEMMA, GREEDY, NARROW, Choice, choice_of, rows_of
from mlx_mtp.errors import KernelError
from mlx_mtp.kernels.centroid_head import centroid_head, reference, unsupported
from mlx_mtp.sampling import Sampling, sampler_class
from mlx_mtp.weights import DenseWeight, Weight
from qmm_cases import quantised

BATCHES = {"greedy": [GREEDY], "gemma": [GEMMA], "mixed": [NARROW, GREEDY, GEMMA]}


class Head(NamedTuple):
    """What centroid_head takes before the row."""

    centroids: Weight
    members: mx.array
    top_k: int
    table: Weight


def matrix(columns: int, depth: int, bits: int, *, seed: int, dtype: mx.Dtype) -> Weight:
    if bits == 16:
        return DenseWeight(mx.random.normal((columns, depth), key=mx.random.key(seed)).astype(dtype))
    return quantised(columns, depth, seed=seed, bits=bits, group=32, dtype=dtype)


def head_of(
    *,
    clusters: int,
    size: int,
    top_k: int,
    depth: int,
    bits: tuple[int, int],
    seed: int,
    dtype: mx.Dtype = mx.bfloat16,
) -> Head:
    """Random matrices; a cluster's tokens are scattered over the vocabulary, as token_ordering has them."""
    tokens = clusters * size
    ordering = np.random.default_rng(seed).permutation(tokens).astype(np.uint32)
    return Head(
        matrix(clusters, depth, bits[0], seed=seed, dtype=dtype),
        mx.array(ordering).reshape(clusters, size),
        top_k,
        matrix(tokens, depth, bits[1], seed=seed + 1, dtype=dtype),
    )


def choice(samplings: list[Sampling], head: Head, *, seed: int) -> Choice:
    return choice_of(samplings, 1, seed=seed, vocab_size=head.table.shape[0])


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("bits", [(4, 4), (16, 4), (8, 8), (16, 16)])
def test_drafts_are_those_of_the_reference(metal, batch, bits):
    metal.settings(check=True)
    samplings = BATCHES[batch]
    head = head_of(clusters=40, size=24, top_k=6, depth=64, bits=bits, seed=1)
    row = rows_of(len(samplings), 1, 64, seed=2, dtype=mx.bfloat16)
    how = choice(samplings, head, seed=3)
    tokens, valid = centroid_head(*head, row, *how)
    expected, all_valid = reference(*head, row, *how)
    assert tokens.tolist() == expected.tolist()
    assert valid.tolist() == all_valid.tolist() == [[True]] * len(samplings)
    assert len(metal.launches) == 2 and metal.launches[0].threadgroups == 6 * len(samplings)
    assert [metal.lint(launch.kernel) for launch in metal.launches] == [[], []]


@pytest.mark.parametrize("sampling", [GREEDY, GEMMA])
def test_the_published_sizes(metal, sampling):
    """2048 clusters of 128 tokens, the best 32 of them, rows of 256."""
    head = head_of(clusters=2048, size=128, top_k=32, depth=256, bits=(4, 4), seed=4)
    row = rows_of(1, 1, 256, seed=5, dtype=mx.bfloat16)
    how = choice([sampling], head, seed=6)
    assert centroid_head(*head, row, *how)[0].tolist() == reference(*head, row, *how)[0].tolist()
    # Fewer than stock's 256 and 512 threadgroups of 64 threads: docs/kernels-products.md says why.
    first = metal.launches[0]
    assert (first.threadgroups, first.threads) == (32, 32 * 512)


def test_the_same_draft_in_a_batch_and_in_any_order_of_threads(metal):
    head = head_of(clusters=64, size=16, top_k=8, depth=64, bits=(16, 4), seed=7)
    row = rows_of(3, 1, 64, seed=8, dtype=mx.bfloat16)
    how = choice([GEMMA, NARROW, GEMMA], head, seed=9)
    tokens, _ = centroid_head(*head, row, *how)
    for member in range(3):
        alone, _ = centroid_head(*head, row[member : member + 1], *how.part(member, 0))
        assert alone.item() == tokens[member, 0].item()
    for seed in range(3):
        with metal.run(order="random", seed=seed):
            assert centroid_head(*head, row, *how)[0].tolist() == tokens.tolist()


def exact_head(
    scores: list[float], logits: list[float], ordering: list[int], *, top_k: int
) -> tuple[Head, mx.array]:
    """Clusters of these scores over tokens of these logits, exactly, in float32."""
    tables = []
    for values in (scores, logits):
        table = np.zeros((len(values), 32), np.float32)
        table[:, 0] = values
        tables.append(DenseWeight(mx.array(table)))
    members = mx.array(np.array(ordering, np.uint32)).reshape(len(scores), -1)
    row = np.zeros((1, 1, 32), np.float32)
    row[..., 0] = 1
    return Head(tables[0], members, top_k, tables[1]), mx.array(row)


def test_equal_scores_go_to_the_lower_cluster_and_token(metal):
    """Three clusters are level for two places; in those, equal logits go to the lower token id."""
    logits = [0.0] * 16
    logits[9] = logits[2] = 4.0  # of cluster 1, listed in this order
    logits[15] = 9.0  # of cluster 3, which just misses
    ordering = [0, 1, 3, 4, 9, 2, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15]
    head, row = exact_head([1.0, 5.0, 5.0, 5.0], logits, ordering, top_k=2)
    assert centroid_head(*head, row, *choice([GREEDY], head, seed=10))[0].item() == 2
    head, row = exact_head([1.0, 5.0, 5.0, 5.0], logits, ordering, top_k=3)
    assert centroid_head(*head, row, *choice([GREEDY], head, seed=10))[0].item() == 15
    head, row = exact_head([-0.0, 0.0, -1.0, -1.0], logits, ordering, top_k=1)
    assert centroid_head(*head, row, *choice([GREEDY], head, seed=10))[0].item() in (0, 1, 3, 4)


def test_draws_are_those_of_the_reference_at_many_positions(metal):
    rng = np.random.default_rng(11)
    head, row = exact_head(
        rng.normal(0, 1, 16).tolist(), rng.normal(0, 1, 256).tolist(), rng.permutation(256).tolist(), top_k=8
    )
    rows = mx.broadcast_to(row, (150, 1, 32))
    how = choice([Sampling(1.2, top_k=50, top_p=0.9)] * 150, head, seed=12)
    tokens, _ = centroid_head(*head, rows, *how)
    assert tokens.tolist() == reference(*head, rows, *how)[0].tolist()
    assert len(set(tokens.squeeze(-1).tolist())) > 20


def test_a_poisoned_cluster_that_is_not_chosen_does_no_harm(metal):
    """NaN rows in the table are read only where their cluster is among the best."""
    logits = [0.0] * 12 + [np.nan] * 4
    head, row = exact_head([3.0, 2.0, 1.0, 0.0], logits, list(range(16)), top_k=3)
    table = np.zeros((16, 32), np.float32)
    table[12:] = np.nan
    head = head._replace(table=DenseWeight(mx.array(table)))
    how = choice([GREEDY], head, seed=13)
    assert centroid_head(*head, row, *how)[1].item() is True
    assert centroid_head(*head._replace(top_k=4), row, *how)[1].item() is False


def test_what_it_does_not_compute_is_said_and_refused(metal):
    head = head_of(clusters=16, size=8, top_k=4, depth=64, bits=(4, 4), seed=14)
    greedy, gemma = sampler_class([GREEDY]), sampler_class([GEMMA])

    def why(head: Head, sampler: Any) -> str | None:
        return unsupported(head.centroids, head.members, head.top_k, head.table, mx.bfloat16, sampler)

    assert why(head, greedy) is None
    assert "32" in str(why(head, gemma))  # 4 clusters of 8 tokens
    assert why(head._replace(top_k=8), gemma) is None
    assert "17 of 16" in str(why(head._replace(top_k=17), greedy))
    assert "penalties" in str(why(head, sampler_class([Sampling(0.0, presence_penalty=1.0)])))
    assert "no kernel" in str(why(head._replace(table=quantised(128, 64, seed=15, bits=2)), greedy))
    row = rows_of(1, 2, 64, seed=16, dtype=mx.bfloat16)
    with pytest.raises(KernelError, match="one row"):
        centroid_head(*head, row, *choice([GREEDY], head, seed=17))
    with pytest.raises(KernelError, match="64 candidates"):
        centroid_head(*head, row[:, :1], *choice([GEMMA], head, seed=17))
    assert metal.launches == []
