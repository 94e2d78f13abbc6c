"""Choosing a token: the hash and its noise, filters and penalties against plain numpy, and what makes a row invalid."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from scipy import stats

from mlx_mtp.sampling import (
    MAX_CANDIDATES,
    SamplerClass,
    Sampling,
    adjusted_logits,
    best_candidates,
    choose,
    gumbel,
    hash_bits,
    keep_sorted,
    keep_unsorted,
    sampler_class,
    sampling_arrays,
)
from sampling_reference import reference_adjusted, reference_gumbel, reference_hash, reference_law

VOCAB = 256
EVERYTHING = SamplerClass(
    greedy=False, candidates=False, top_k=True, top_p=True, min_p=True, penalties=False, bias=False
)


def arrays_of(rows: list[Sampling], vocab: int = VOCAB) -> dict[str, mx.array]:
    with_bias = any(row.logit_bias for row in rows)
    each = [sampling_arrays(row, vocab, with_bias=with_bias) for row in rows]
    return {name: mx.concatenate([one[name] for one in each]) for name in each[0]}


def drawn(logits: np.ndarray, rows: list[Sampling], sampler: SamplerClass | None = None) -> np.ndarray:
    """logits [B, M, V] -> tokens [B, M]; row b has seed 11 + b and sits at positions 100 + b .."""
    batch, count, vocab = logits.shape
    positions = 100 + mx.arange(batch)[:, None] + mx.arange(count)[None]
    seeds = 11 + mx.arange(batch, dtype=mx.uint32)
    sampler = sampler or sampler_class(rows)
    tokens, valid = choose(mx.array(logits), positions, seeds, arrays_of(rows, vocab), sampler)
    assert np.array(valid).all()
    return np.array(tokens)


def some_logits(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Normal logits, or the same rounded to halves, where most values are tied."""
    logits = 3 * np.random.default_rng(seed).normal(size=shape)
    return (np.round(2 * logits) / 2 if kind == "ties" else logits).astype(np.float32)


def some_settings(count: int, *, most_top_k: int = 64, seed: int = 1) -> list[Sampling]:
    rng = np.random.default_rng(seed)
    return [
        Sampling(
            temperature=float(rng.choice([0.5, 0.8, 1.0, 1.5])),
            top_k=int(rng.integers(1, most_top_k + 1)),
            top_p=float(rng.choice([0.11, 0.37, 0.7, 0.9, 0.95, 1.0])),
            min_p=float(rng.choice([0.0, 0.0, 0.03, 0.1, 0.3])),
        )
        for _ in range(count)
    ]


def test_hash_is_pcg3d() -> None:
    rng = np.random.default_rng(3)
    edges = np.array([0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1])
    words = [np.concatenate([edges, rng.permutation(edges), rng.integers(0, 2**32, 5000)]) for _ in range(3)]
    got = hash_bits(*(mx.array(word.astype(np.uint32)) for word in words))
    assert np.array_equal(np.array(got), reference_hash(*words))


def test_noise_depends_on_each_of_seed_position_and_token() -> None:
    seed, position, token = np.array([5, 6]), np.array([[7, 8, 9], [7, 8, 9]]), np.arange(VOCAB)
    noise = np.array(gumbel(mx.array(seed), mx.array(position), mx.array(token)[None, None]))
    expected = reference_gumbel(seed[:, None, None], position[..., None], token)
    assert noise == pytest.approx(expected, abs=2e-5)
    assert len(np.unique(noise)) > 0.999 * noise.size


@pytest.mark.parametrize("along", ["seed", "position", "token"])
def test_noise_is_gumbel_and_neighbours_are_independent(along: str) -> None:
    """Kolmogorov-Smirnov on 2^18 draws of consecutive seeds, positions or tokens; correlation of neighbours."""
    count = 2**18
    run, fixed = np.arange(count), np.zeros(count, np.int64)
    words = [run if name == along else fixed + 3 for name in ("seed", "position", "token")]
    bits = np.array(hash_bits(*(mx.array(word.astype(np.uint32)) for word in words)))
    noise = -np.log(-np.log1p(-(bits.astype(np.float64) + 0.5) * 2.0**-32))
    assert stats.kstest(noise, "gumbel_r").pvalue > 1e-6
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=6 * np.pi / np.sqrt(6 * count))
    assert noise.var() == pytest.approx(np.pi**2 / 6, rel=0.03)
    for lag in (1, 2, 3, 64):
        assert abs(np.corrcoef(noise[:-lag], noise[lag:])[0, 1]) < 6 / np.sqrt(count)
    for shift in (0, 8, 16, 24):
        counts = np.bincount(bits >> shift & 255, minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-6


def test_a_hash_that_rounds_to_one_does_not_lose_the_only_token_left() -> None:
    """Seed 256, position 385, token 218 hash to 2^32 - 76, whose float32 is 1."""
    assert int(hash_bits(mx.array(256), mx.array(385), mx.array(218))) >= 2**32 - 128
    logits = mx.zeros((1, 1, VOCAB)).at[0, 0, 218].add(30.0)
    for setting in (Sampling(top_k=1), Sampling(top_p=0.5), Sampling(min_p=0.5)):
        for sampler in (sampler_class([setting]), EVERYTHING):
            arguments = (mx.array([[385]]), mx.array([256], mx.uint32), arrays_of([setting]), sampler)
            assert choose(logits, *arguments)[0].item() == 218


@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_both_filter_paths_keep_what_a_sort_keeps(kind: str) -> None:
    rows = some_settings(300)
    logits = some_logits(kind, (300, 1, VOCAB))
    arrays = arrays_of(rows)
    scaled = mx.array(logits) / arrays["temperature"][:, None, None]
    order = best_candidates(scaled, MAX_CANDIDATES)
    best = np.isfinite(np.array(keep_sorted(mx.take_along_axis(scaled, order, axis=-1), arrays, EVERYTHING)))
    by_sort = np.zeros(logits.shape, bool)
    np.put_along_axis(by_sort, np.array(order).astype(np.int64), best, axis=-1)
    by_search = np.isfinite(np.array(keep_unsorted(scaled, arrays, EVERYTHING)))
    expected = np.stack([reference_law(one, row) > 0 for one, row in zip(logits, rows, strict=True)])
    assert np.array_equal(by_search, expected)
    assert np.array_equal(by_sort, expected)
    assert 1 < expected.sum(-1).mean() < MAX_CANDIDATES


def test_search_without_a_small_top_k_keeps_what_a_sort_keeps() -> None:
    rows = [replace(row, top_k=0) for row in some_settings(100)] + some_settings(100, most_top_k=VOCAB)
    logits = some_logits("normal", (200, 1, VOCAB), seed=5)
    arrays = arrays_of(rows)
    scaled = mx.array(logits) / arrays["temperature"][:, None, None]
    kept = np.isfinite(np.array(keep_unsorted(scaled, arrays, EVERYTHING)))
    expected = np.stack([reference_law(one, row) > 0 for one, row in zip(logits, rows, strict=True)])
    assert np.array_equal(kept, expected)


def test_of_tied_logits_the_lower_ids_are_kept() -> None:
    logits = np.zeros((1, 1, VOCAB), np.float32)
    logits[0, 0, [200, 17]] = 2.0
    for setting, kept in (
        (Sampling(top_k=1), [17]),
        (Sampling(top_k=4), [0, 1, 17, 200]),
        (Sampling(top_k=2, top_p=0.2), [17]),
    ):
        arrays = arrays_of([setting])
        assert (
            np.flatnonzero(
                np.isfinite(np.array(keep_unsorted(mx.array(logits), arrays, EVERYTHING)))
            ).tolist()
            == kept
        )
        order = best_candidates(mx.array(logits), MAX_CANDIDATES)
        best = keep_sorted(mx.take_along_axis(mx.array(logits), order, axis=-1), arrays, EVERYTHING)
        names = np.array(order)[0, 0][np.isfinite(np.array(best))[0, 0]]
        assert sorted(names.tolist()) == kept
    assert drawn(logits, [Sampling(temperature=0.0)]).item() == 17


@pytest.mark.parametrize("vocab", [96, 4096, 8192, 262144])
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_candidates_from_group_maxima_are_those_of_a_full_sort(vocab: int, kind: str) -> None:
    logits = some_logits(kind, (2, 2, vocab), seed=vocab)
    logits[0, 0, : vocab // 2] = 4.0  # far more ties at the top than candidates
    logits[1, 1] = np.sort(logits[1, 1])  # all candidates in the last groups
    got = np.array(best_candidates(mx.array(logits), MAX_CANDIDATES))
    expected = np.argsort(-logits, axis=-1, kind="stable")[..., :MAX_CANDIDATES]
    assert np.array_equal(got, expected)


def test_tokens_follow_from_reference_noise_and_filters() -> None:
    """argmax of filtered logit plus noise, written with numpy, for rows of every kind in one batch."""
    rows = some_settings(40) + [replace(row, top_k=0) for row in some_settings(40, seed=2)]
    rows += [Sampling(temperature=0.0), Sampling(temperature=0.0, top_k=3, top_p=0.2)]
    logits = some_logits("normal", (len(rows), 3, VOCAB), seed=8)
    tokens = drawn(logits, rows)
    for b, row in enumerate(rows):
        law = reference_law(logits[b], row)
        noise = reference_gumbel(np.array(11 + b), 100 + b + np.arange(3)[:, None], np.arange(VOCAB))
        with np.errstate(divide="ignore"):
            score = np.log(law) + (noise if row.temperature > 0 else 0)
        assert tokens[b].tolist() == score.argmax(-1).tolist()


@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_a_rows_token_does_not_depend_on_the_batch_it_is_in(kind: str) -> None:
    """Alone (candidates class) and beside greedy, unfiltered and penalised rows (general class)."""
    rows = some_settings(60, seed=9)
    logits = some_logits(kind, (60, 4, VOCAB), seed=10)
    alone = drawn(logits, rows)
    assert sampler_class(rows).candidates
    others = [Sampling(), Sampling(temperature=0.0), Sampling(logit_bias={3: 5.0}), Sampling(top_k=100)]
    together = [*rows, *others]
    assert not sampler_class(together).candidates
    padded = np.concatenate([logits, some_logits(kind, (4, 4, VOCAB), seed=12)])
    mixed = drawn(padded, together)
    assert np.array_equal(mixed[:60], alone)
    assert np.array_equal(mixed[61], padded[61].argmax(-1))


def test_top_k_beyond_the_vocabulary_is_the_whole_of_it() -> None:
    logits = some_logits("normal", (20, 5, 12), seed=4)
    free = drawn(logits, [Sampling()] * 20)
    assert np.array_equal(drawn(logits, [Sampling(top_k=13)] * 20), free)
    assert np.array_equal(drawn(logits, [Sampling(top_k=10**9)] * 20), free)


def test_penalties_and_bias_are_those_of_numpy() -> None:
    """Repetition counts prompt and output, presence and frequency the output only; then the bias."""
    rows = [
        Sampling(repetition_penalty=1.3),
        Sampling(presence_penalty=0.7, frequency_penalty=0.4),
        Sampling(repetition_penalty=0.8, presence_penalty=-0.5, logit_bias={0: 2.0, 255: -np.inf, 9: -3}),
        Sampling(temperature=0.0, frequency_penalty=1.5),
        Sampling(),
    ]
    rng = np.random.default_rng(6)
    counts = rng.poisson(0.5, size=(5, 3, 2, VOCAB))
    logits = some_logits("normal", (5, 3, VOCAB), seed=6)
    sampler = sampler_class(rows)
    assert sampler.penalties and sampler.bias
    got = np.array(adjusted_logits(mx.array(logits), arrays_of(rows), sampler, None, mx.array(counts)))
    for b, row in enumerate(rows):
        expected = reference_adjusted(logits[b], row, counts[b, :, 0], counts[b, :, 1])
        assert got[b] == pytest.approx(expected, abs=1e-5)
    assert np.array_equal(got[4], logits[4])
    ids = mx.array(rng.permuted(np.tile(np.arange(VOCAB), (5, 3, 1)), axis=-1)[..., :40].astype(np.uint32))
    some = mx.take_along_axis(mx.array(logits), ids, axis=-1)
    by_id = adjusted_logits(some, arrays_of(rows), sampler, ids, mx.array(counts))
    assert np.array_equal(np.array(by_id), np.take_along_axis(got, np.array(ids).astype(np.int64), axis=-1))


@pytest.mark.parametrize("named", ["all", "part"])
def test_candidates_with_ids_draw_the_same_token_as_the_whole_vocabulary(named: str) -> None:
    """A centroid head gives some tokens only: the same noise for the same id, wherever it stands."""
    logits = some_logits("normal", (8, 1, VOCAB), seed=21)
    rng = np.random.default_rng(22)
    ids = np.stack([rng.permutation(VOCAB) for _ in range(8)])[:, None]
    if named == "part":
        ids = np.concatenate([logits.argsort(-1)[..., -100:], ids[..., :0]], axis=-1)
    rows = [Sampling(top_k=40, top_p=0.9)] * 4 + [Sampling(temperature=0.7, top_k=90)] * 4
    positions, seeds = 100 + mx.arange(8)[:, None], 11 + mx.arange(8, dtype=mx.uint32)
    some = mx.array(np.take_along_axis(logits, ids, axis=-1))
    tokens, _ = choose(
        some, positions, seeds, arrays_of(rows), sampler_class(rows), ids=mx.array(ids.astype(np.uint32))
    )
    assert np.array_equal(np.array(tokens), drawn(logits, rows))


@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf])
@pytest.mark.parametrize("where", ["one", "all"])
@pytest.mark.parametrize(
    "setting",
    [
        Sampling(temperature=0.0),
        Sampling(),
        Sampling(top_k=20, top_p=0.9),
        Sampling(top_k=100, min_p=0.1),
        Sampling(top_p=0.9),
    ],
    ids=str,
)
def test_logits_that_name_no_token_make_only_their_row_invalid(
    bad: float, where: str, setting: Sampling
) -> None:
    logits = some_logits("normal", (1, 4, VOCAB), seed=30)
    logits[0, 3, : VOCAB - 3] = -np.inf  # three tokens are left, which is enough
    logits[0, 1, 37 if where == "one" else slice(None)] = bad
    positions, seeds = mx.arange(4)[None], mx.array([1], mx.uint32)
    tokens, valid = choose(mx.array(logits), positions, seeds, arrays_of([setting]), sampler_class([setting]))
    assert np.array(valid)[0].tolist() == [True, where == "one" and bad == -np.inf, True, True]
    assert tokens[0, 3].item() >= VOCAB - 3
