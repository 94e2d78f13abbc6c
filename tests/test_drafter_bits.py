"""A drafter quantised while it is loaded: it still drafts, and the text is what it is without it."""

import mlx.core as mx
import pytest

from goldens import golden
from mlx_mtp import Sampling, generate, load
from mlx_mtp.checkpoint import read_drafter
from mlx_mtp.drafter import make_drafter
from mlx_mtp.pair import Pair
from mlx_mtp.quantize import quantize_tensors
from mlx_mtp.weights import DenseWeight, QuantizedWeight
from pairs import GOLDEN, golden_pair

SAMPLINGS = (Sampling(temperature=0.0), Sampling(temperature=1.0, top_k=64, top_p=0.95, seed=3))


def quantised_pair(variant: str, bits: int) -> Pair:
    small = read_drafter(GOLDEN / variant / "drafter")
    tensors = quantize_tensors(small.tensors, bits, 32)
    assert {type(value) for value in tensors.values()} <= {QuantizedWeight, DenseWeight, mx.array}
    dense = [path for path, value in tensors.items() if isinstance(value, DenseWeight)]
    assert dense == (["masked_embedding.centroids"] if small.config.num_centroids else [])  # 32 wide, not 64
    return golden_pair(variant, drafter=make_drafter(small.config, tensors))


@pytest.mark.parametrize(("variant", "bits"), [("e2b", 4), ("31b", 8), ("a4b", 4)])
def test_text_is_the_plain_text_and_drafts_are_still_accepted(variant: str, bits: int) -> None:
    """The golden drafters get about three quarters of their drafts right after these prompts, noise almost none."""
    pair, prompt = quantised_pair(variant, bits), golden(variant, "long").prompt
    for sampling in SAMPLINGS:
        plain, drafted = (
            generate(pair, prompt, max_tokens=24, sampling=sampling, num_draft_tokens=k) for k in (0, 3)
        )
        assert drafted.tokens == plain.tokens and drafted.stats.drafted > 0
        if sampling.temperature == 0.0:
            assert drafted.stats.draft_acceptance_rate > 0.25


def test_the_demo_pair_with_a_four_bit_drafter() -> None:
    pair = load("demo", drafter_bits=4)
    assert pair.drafter is not None
    for weight in (pair.drafter.embedding, pair.drafter.layers[0].up_proj, pair.drafter.pre_projection):
        assert isinstance(weight, QuantizedWeight) and weight.bits == 4
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    for sampling in SAMPLINGS:
        plain, drafted = (
            generate(pair, prompt, max_tokens=32, sampling=sampling, num_draft_tokens=k) for k in (0, 4)
        )
        assert drafted.text == plain.text and drafted.stats.accepted > 0
