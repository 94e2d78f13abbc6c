"""Greedy text equals transformers' for every number of drafts and every prefill chunk size, past three windows."""

import pytest

from goldens import PROMPTS, WINDOW, golden, loaded
from mlx_mtp.conversation import Conversation
from mlx_mtp.pair import Pair
from mlx_mtp.sampling import Sampling
from pairs import VARIANTS, golden_pair, random_drafter

DRAFT_TOKENS = range(9)
FEW_CHUNKS = (1, 3, WINDOW - 1, WINDOW, WINDOW + 1, 44, 45, 46)

each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_prompt = pytest.mark.parametrize("prompt", PROMPTS)


def reply(pair: Pair, prompt: list[int], new_tokens: int, *, k: int | str, chunk: int = 512) -> list[int]:
    """The tokens of a cold reply."""
    conversation = Conversation(pair, chunk=chunk)
    return conversation.generate(prompt, max_tokens=new_tokens, num_draft_tokens=k).tokens


@each_variant
@each_prompt
@pytest.mark.parametrize("k", DRAFT_TOKENS)
def test_every_number_of_drafts_gives_the_golden_text(variant: str, prompt: str, k: int) -> None:
    expected = golden(variant, prompt)
    assert len(expected.text) > 3 * WINDOW
    assert reply(loaded(variant), expected.prompt, len(expected.new_tokens), k=k) == expected.new_tokens


@each_variant
@pytest.mark.parametrize("chunk", FEW_CHUNKS)
def test_chunk_sizes_around_the_window_and_the_prompt_give_the_golden_text(variant: str, chunk: int) -> None:
    expected = golden(variant, "long")
    tokens = reply(loaded(variant), expected.prompt, WINDOW, k=4, chunk=chunk)
    assert tokens == expected.new_tokens[:WINDOW]


@pytest.mark.parametrize("k", [0, 3, "auto"])
def test_compiled_rounds_give_the_golden_text(k: int | str) -> None:
    expected = golden("e2b", "long")
    pair = golden_pair("e2b", compiled=True)
    assert reply(pair, expected.prompt, len(expected.new_tokens), k=k) == expected.new_tokens


@pytest.mark.parametrize(("variant", "k"), [*(("a4b", k) for k in DRAFT_TOKENS), ("e2b", 4), ("31b", 4)])
def test_text_under_a_repetition_penalty_is_the_golden_one(variant: str, k: int) -> None:
    expected = golden(variant, "long")
    want = expected.penalised.tolist()[len(expected.prompt) :]
    assert len(set(want)) == len(want)
    sampling = Sampling(temperature=0.0, repetition_penalty=2.0)
    conversation = Conversation(loaded(variant))
    out = conversation.generate(expected.prompt, max_tokens=48, num_draft_tokens=k, sampling=sampling)
    assert out.tokens == want


@each_variant
def test_a_drafter_with_noise_for_weights_gives_the_golden_text(variant: str) -> None:
    expected = golden(variant, "short")
    pair = golden_pair(variant, drafter=random_drafter(variant))
    out = Conversation(pair).generate(expected.prompt, max_tokens=48, num_draft_tokens=4)
    assert out.tokens == expected.new_tokens
    assert out.stats.accepted < out.stats.drafted


def sweep(variant: str, prompt: str, *, compiled: bool) -> list[tuple[int, int]]:
    """(k, chunk) of every combination whose text is not the golden one; k runs over 0..8."""
    expected = golden(variant, prompt)
    pair = golden_pair(variant, compiled=compiled)
    return [
        (k, chunk)
        for chunk in range(1, len(expected.prompt) + 3)
        for k in DRAFT_TOKENS
        if reply(pair, expected.prompt, len(expected.new_tokens), k=k, chunk=chunk) != expected.new_tokens
    ]


@pytest.mark.slow
@each_variant
@each_prompt
def test_every_number_of_drafts_with_every_chunk_size(variant: str, prompt: str) -> None:
    assert sweep(variant, prompt, compiled=False) == []


@pytest.mark.slow
@each_variant
@each_prompt
def test_every_number_of_drafts_with_every_chunk_size_compiled(variant: str, prompt: str) -> None:
    assert sweep(variant, prompt, compiled=True) == []
