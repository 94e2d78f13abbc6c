"""head_choose: the token of `sampling.choose` from the head's product, without a row of logits in memory."""

import mlx.core as mx
import numpy as np
import pytest

from head_cases import GEMMA, GREEDY, NARROW, choice_of, head_with, rows_of
from mlx_mtp.errors import KernelError
from mlx_mtp.kernels import launch
from mlx_mtp.kernels.head_choose import NEIGHBOURS, best_of_groups, head_choose, reference, unsupported
from mlx_mtp.kernels.verify_gemm import verify_gemm
from mlx_mtp.kernels.verify_qmm import verify_qmm
from mlx_mtp.published_configs import SIZES, published_drafter, published_target
from mlx_mtp.sampling import Sampling, choose, sampler_class
from mlx_mtp.weights import DenseWeight, QuantizedWeight, Weight
from qmm_cases import quantised

CAP = 30.0
BATCHES = {"greedy": [GREEDY], "gemma": [GEMMA], "mixed": [NARROW, GREEDY, GEMMA]}
REAL_DEPTHS = (256, 1024, 1536, 2560, 2816, 3840, 5376)  # drafters' and targets' widths


def matrix(columns: int, depth: int, bits: int, *, seed: int, dtype: mx.Dtype = mx.bfloat16) -> Weight:
    if bits == 16:
        return DenseWeight(mx.random.normal((columns, depth), key=mx.random.key(seed)).astype(dtype))
    return quantised(columns, depth, seed=seed, bits=bits, dtype=dtype)


def items(weight: Weight, cap: float | None, x: mx.array, choice, tile: int | None = None) -> np.ndarray:
    """What the first launch leaves of every row: [B * M, groups, 2], items and second best orders."""
    best, seconds = best_of_groups(weight, cap, x, choice.sampling, tile)
    return np.stack([np.array(best), np.array(seconds).astype(np.uint64)], axis=-1)


def logit_of(order: np.ndarray) -> np.ndarray:
    order = order.astype(np.uint32)
    return np.where(order >> 31, order ^ np.uint32(1 << 31), ~order).view(np.float32)


def decoded(lists: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items -> the logits they rank by, token ids, and the second best logits."""
    best, seconds = lists[..., 0], lists[..., 1]
    return logit_of(best >> np.uint64(32)), ~best.astype(np.uint32), logit_of(seconds)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("bits, dtype", [(4, mx.bfloat16), (8, mx.float16), (16, mx.bfloat16)])
def test_tokens_are_those_of_the_reference(metal, batch, bits, dtype):
    """A ragged vocabulary, several rows a member, and members that choose differently."""
    metal.settings(check=True)
    samplings = BATCHES[batch]
    weight = matrix(1300, 128, bits, seed=1, dtype=dtype)
    x = rows_of(len(samplings), 3, 128, seed=2, dtype=dtype)
    choice = choice_of(samplings, 3, seed=3, vocab_size=1300)
    tokens, valid = head_choose(weight, CAP, x, *choice)
    expected, all_valid = reference(weight, CAP, x, *choice)
    assert tokens.tolist() == expected.tolist()
    assert valid.tolist() == all_valid.tolist() == [[True] * 3] * len(samplings)
    assert len(metal.launches) == 2
    assert [metal.lint(launch.kernel) for launch in metal.launches] == [[], []]


@pytest.mark.parametrize("bits, cap", [(4, None), (16, None), (4, 2.5)])
def test_logits_have_the_bits_of_the_product(metal, bits, cap):
    """What groups rank by, against verify_qmm and verify_gemm on the same rows: the best token and the second logit.

    A low cap bends all logits, and rounds after each of its three operations as stock MLX does.
    """
    weight = matrix(1124, 192, bits, seed=4)  # the last group has four tokens
    x = rows_of(1, 5, 192, seed=5, dtype=mx.bfloat16)
    choice = choice_of([Sampling(1.0, top_k=64)], 5, seed=6, vocab_size=weight.shape[0])
    logits, ids, seconds = decoded(items(weight, cap, x, choice))
    product = verify_qmm(weight, x) if isinstance(weight, QuantizedWeight) else verify_gemm(weight, x)
    if cap is not None:
        product = mx.tanh(product / cap) * cap
    full = np.array(product.astype(mx.float32))[0]
    padded = np.pad(full, ((0, 0), (0, -len(full[0]) % NEIGHBOURS)), constant_values=-np.inf)
    groups = padded.reshape(5, -1, NEIGHBOURS)
    assert (
        ids == groups.argmax(-1) + NEIGHBOURS * np.arange(groups.shape[1])
    ).all()  # the lower id of equal ones
    ranked = np.sort(groups, axis=-1)
    assert (logits == ranked[..., -1]).all() and (seconds == ranked[..., -2]).all()


@pytest.mark.parametrize("sampling", [GREEDY, NARROW])
def test_a_row_does_not_depend_on_its_company(metal, sampling):
    """Every number of rows up to 9, every tile, every batch: the same items, bit for bit."""
    weight = quantised(700, 96, seed=7, group=32)
    x = rows_of(2, 9, 96, seed=8, dtype=mx.bfloat16)
    choice = choice_of([sampling] * 2, 9, seed=9, vocab_size=700)
    whole = items(weight, CAP, x, choice).reshape(2, 9, -1)
    tokens, _ = head_choose(weight, CAP, x, *choice)
    for tile in (1, 2, 7, 12):
        assert np.array_equal(items(weight, CAP, x, choice, tile).reshape(2, 9, -1), whole)
    for member, row in ((0, 0), (0, 8), (1, 3)):
        part = choice.part(member, row)
        own = x[member : member + 1, row : row + 1]
        assert np.array_equal(items(weight, CAP, own, part).ravel(), whole[member, row])
        assert head_choose(weight, CAP, own, *part)[0].item() == tokens[member, row].item()
    for rows in range(2, 9):
        assert np.array_equal(
            items(weight, CAP, x[:1, :rows], choice)[:, :].reshape(rows, -1), whole[0, :rows]
        )


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_no_order_of_threads_changes_a_token(metal, order):
    weight = matrix(1100, 64, 4, seed=10)
    x = rows_of(1, 2, 64, seed=11, dtype=mx.bfloat16)
    choice = choice_of([GEMMA], 2, seed=12, vocab_size=1100)
    tokens, _ = head_choose(weight, CAP, x, *choice)
    for seed in range(3):
        with metal.run(order=order, seed=seed):
            assert head_choose(weight, CAP, x, *choice)[0].tolist() == tokens.tolist()


def test_draws_are_those_of_choose_at_many_positions(metal):
    """The same noise and the same filters: 600 positions over the same logits, four settings."""
    rng = np.random.default_rng(13)
    weight, row = head_with(rng.normal(0, 1, 1024).astype(np.float32))
    x = mx.broadcast_to(row, (4, 150, 32))
    samplings = [
        Sampling(1.3, top_k=64),
        Sampling(0.9, top_k=40, top_p=0.8),
        Sampling(2.0, top_k=9, min_p=0.1),
        Sampling(1.5, top_k=4),
    ]
    choice = choice_of(samplings, 150, seed=14, vocab_size=1024)
    tokens, _ = head_choose(weight, None, x, *choice)
    expected, _ = choose(verify_gemm(weight, x), *choice)
    assert tokens.tolist() == expected.tolist()
    assert min(len(set(own)) for own in tokens.tolist()) > 3


def test_equal_logits_go_to_the_lower_id(metal):
    """In a group, between groups, at the edge of the best 64, and for the greedy choice; 0 equals -0."""
    logits = np.full(1536, -1.0, np.float32)
    logits[[5, 7, 700, 1400]] = 2.0
    logits[20:120] = 1.0
    weight, x = head_with(logits)
    greedy = choice_of([GREEDY], 1, seed=15, vocab_size=len(logits))
    assert head_choose(weight, None, x, *greedy)[0].item() == 5
    wide = mx.broadcast_to(x, (1, 400, 32))
    drawn = choice_of([Sampling(5.0, top_k=64)], 400, seed=15, vocab_size=len(logits))
    tokens = set(head_choose(weight, None, wide, *drawn)[0][0].tolist())
    assert tokens <= {5, 7, 700, 1400, *range(20, 80)} and len(tokens) > 50
    # In float16 these products round to 0 and -0.
    weight, x = head_with(np.where(np.arange(600) == 300, 1e-4, -1e-4).astype(np.float32))
    weight, x = DenseWeight(weight.weight.astype(mx.float16)), (1e-4 * x).astype(mx.float16)
    assert head_choose(weight, None, x, *choice_of([GREEDY], 1, seed=16, vocab_size=600))[0].item() == 0


@pytest.mark.parametrize("spread", [1, 2, 7, 8, 64, 512])
def test_the_best_64_are_found_wherever_they_lie(metal, spread):
    """All in eight groups, or one in each: groups that are not looked into must not matter."""
    logits = np.random.default_rng(17).normal(0, 1e-3, 63 * spread + 515).astype(np.float32)
    best = np.arange(64) * spread
    logits[best] = 25 + 0.01 * np.random.default_rng(18).permutation(64)
    weight, x = head_with(logits)
    x = mx.broadcast_to(x, (1, 12, 32))
    choice = choice_of([Sampling(1.0, top_k=64)], 12, seed=19, vocab_size=len(logits))
    tokens, _ = head_choose(weight, None, x, *choice)
    expected, _ = choose(verify_gemm(weight, x), *choice)
    assert tokens.tolist() == expected.tolist()
    assert set(tokens[0].tolist()) <= set(best.tolist()) and len(set(tokens[0].tolist())) > 5


@pytest.mark.parametrize("sampling", [GREEDY, GEMMA])
@pytest.mark.parametrize("logit, others", [(np.nan, 0.0), (np.inf, 0.0), (-np.inf, -np.inf)])
def test_a_row_with_nothing_sound_to_choose_is_not_valid(metal, sampling, logit, others):
    logits = np.full(600, others, np.float32)
    logits[599] = logit
    weight, x = head_with(logits)
    # 0 * inf would be NaN in every product: the row has a single value.
    weight = DenseWeight(mx.array(np.repeat(logits[:, None], 32, axis=1)))
    x = mx.full((1, 1, 32), 1.0)
    choice = choice_of([sampling], 1, seed=20, vocab_size=600)
    assert head_choose(weight, None, x, *choice)[1].tolist() == [[False]]
    logits = np.zeros(600, np.float32)
    logits[7] = -np.inf
    weight = DenseWeight(mx.array(np.repeat(logits[:, None], 32, axis=1)))
    assert head_choose(weight, None, x, *choice)[1].tolist() == [[True]]


def test_weights_are_read_once_and_logits_are_not_written(metal):
    """Eight rows read what one reads; 12 bytes a group are written. As many threadgroups as stock's qmv has."""
    weight = quantised(2048, 256, seed=21)
    choice = choice_of([GEMMA], 8, seed=22, vocab_size=2048)
    x = rows_of(1, 8, 256, seed=23, dtype=mx.bfloat16)
    read = []
    for rows in (1, 8):
        metal.reset()
        with metal.run(count=True):
            head_choose(weight, CAP, x[:, :rows], choice.positions[:, :rows], *choice[1:])
        counts = metal.counts["head_qmm"]
        read.append(sum(counts.read[name].by_threadgroup for name in ("words", "scales", "biases")))
        assert counts.read["words"].distinct == counts.read["words"].requested == weight.weight.nbytes
        assert counts.written["items"].distinct + counts.written["seconds"].distinct == rows * 2048 // 8 * 12
        assert counts.threadgroups == 2048 // 8
    assert read[1] <= 1.02 * read[0]
    for kernel in ("head_qmm", "choose_qmm"):
        assert metal.accumulators(kernel) <= 24
        assert max(done.threadgroup_bytes for done in metal.launches if done.kernel == kernel) <= 16_384


@pytest.mark.parametrize("spread", [1, 8, 9])
def test_a_draw_reads_few_weights_again(metal, spread):
    """Only of groups whose second best logit may be among the best 64, and never of more than 64 groups."""
    logits = np.zeros(8192, np.float32)
    logits[np.arange(64) * spread] = 10 + np.arange(64)
    weight, x = head_with(logits)
    choice = choice_of([GEMMA], 1, seed=36, vocab_size=8192)
    with metal.run(count=True):
        head_choose(weight, None, x, *choice)
    read = metal.counts["choose_gemm"].read["table"]
    assert read.distinct == {1: 64, 8: 0, 9: 0}[spread] * 8 * 32 * 4


@pytest.mark.parametrize("size", SIZES)
def test_as_many_threadgroups_as_stock_for_every_size(monkeypatch, size):
    """Stock's qmv and gemv: 8 columns a threadgroup, and of the head's launch as many simdgroups."""
    launched = []

    def recorder(name, **made):
        def call(*, grid, threadgroup, output_shapes, output_dtypes, **given):
            launched.append((name, grid[0] * grid[1] // threadgroup[0], threadgroup[0]))
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return call

    monkeypatch.setattr(mx.fast, "metal_kernel", recorder)
    configs = [published_target(size)["text_config"], published_drafter(size)["text_config"]]
    for config in configs:
        depth, tokens = config["hidden_size"], config["vocab_size"]
        for bits in (4, 8):
            words = mx.zeros((tokens, depth * bits // 32), mx.uint32)
            scales = mx.zeros((tokens, depth // 64), mx.bfloat16)
            weight = QuantizedWeight(words, scales, scales, 64, bits, "affine", mx.bfloat16)
            for sampling in (GREEDY, GEMMA):
                launched.clear()
                choice = choice_of([sampling], 1, seed=37, vocab_size=8)
                head_choose(weight, CAP, mx.zeros((1, 1, depth), mx.bfloat16), *choice)
                (_, groups, threads), (_, merges, _) = launched
                assert groups >= tokens // 8 == 32_768 and threads == 64 and merges == 1
    launch._made.cache_clear()


def test_what_it_does_not_compute_is_said_and_refused(metal):
    weight = quantised(256, 64, seed=24)
    plain, x = sampler_class([GREEDY]), rows_of(1, 1, 64, seed=25, dtype=mx.bfloat16)
    assert unsupported(weight, mx.bfloat16, plain) is None
    penalties = sampler_class([Sampling(0.0, repetition_penalty=1.1)])
    assert "penalties" in str(unsupported(weight, mx.bfloat16, penalties))
    assert "bias" in str(
        unsupported(weight, mx.bfloat16, sampler_class([Sampling(0.0, logit_bias={1: 2.0})]))
    )
    assert "64 candidates" in str(unsupported(weight, mx.bfloat16, sampler_class([Sampling(1.0)])))
    assert "32" in str(unsupported(quantised(32, 64, seed=26), mx.bfloat16, plain))
    assert "no kernel" in str(unsupported(quantised(256, 64, seed=27, bits=2), mx.bfloat16, plain))
    choice = choice_of([Sampling(1.0)], 1, seed=28, vocab_size=256)
    with pytest.raises(KernelError, match="64 candidates"):
        head_choose(weight, None, x, *choice)
    greedy = choice_of([GREEDY], 1, seed=28, vocab_size=256)
    with pytest.raises(KernelError, match="64 values"):
        head_choose(weight, None, x[..., :32], *greedy)
    with pytest.raises(KernelError, match="tile"):
        head_choose(weight, None, x, *greedy, tile=13)
    assert metal.launches == []


@pytest.mark.slow
@pytest.mark.parametrize("depth", REAL_DEPTHS)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_real_depths_for_every_number_of_rows(metal, depth, bits):
    """Cut vocabularies, ragged; 1 to 72 rows, each with the bits it has alone."""
    weight = matrix(589, depth, bits, seed=29)
    counts = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 20, 40, 72)
    x = rows_of(1, 72, depth, seed=30, dtype=mx.bfloat16)
    for sampling in (GREEDY, GEMMA):
        choice = choice_of([sampling], 72, seed=31, vocab_size=weight.shape[0])
        expected, _ = reference(weight, CAP, x, *choice)
        alone = [items(weight, CAP, x[:, row : row + 1], choice)[0] for row in (0, 1, 8, 15, 16, 39, 71)]
        for rows in counts:
            lists = items(weight, CAP, x[:, :rows], choice)
            for row, own in zip((0, 1, 8, 15, 16, 39, 71), alone, strict=True):
                if row < rows:
                    assert np.array_equal(lists[row], own)
        tokens, _ = head_choose(weight, CAP, x, *choice)
        # The reference adds in another order: a token may differ where two logits are a rounding apart.
        assert (tokens == expected).sum().item() >= 70


@pytest.mark.slow
def test_the_real_vocabulary(metal):
    """As many groups as the second launch takes. Weight bytes of eight rows over those of one, both launches."""
    weight = quantised(262_144, 256, seed=32)
    x = rows_of(1, 8, 256, seed=33, dtype=mx.bfloat16)
    for sampling in (GREEDY, GEMMA):
        choice = choice_of([sampling], 8, seed=34, vocab_size=262_144)
        read = []
        for rows in (1, 8):
            metal.reset()
            with metal.run(count=True):
                tokens, _ = head_choose(weight, CAP, x[:, :rows], choice.positions[:, :rows], *choice[1:])
            counts = [done.counts.read for done in metal.launches]
            arrays = ("words", "scales", "biases")
            read.append(sum(own[name].distinct for own in counts for name in arrays if name in own))
            assert metal.launches[0].threadgroups == 262_144 // 8
        assert read[1] <= 1.02 * read[0]
        assert tokens.tolist() == reference(weight, CAP, x, *choice)[0].tolist()
