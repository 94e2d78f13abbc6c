"""Conversations on a golden pair, compared after every request with a cold run and a fresh prefill."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kv_rows import TOLERANCE, Rows, largest_gap, prefilled_rows
from mlx_mtp.conversation import Conversation
from mlx_mtp.pair import Pair
from pairs import GOLDEN, golden_pair

# "<|turn>model\n" in the tests' tokenizer, whose control tokens are followed by the 256 bytes.
MODEL_TURN = [4, *(19 + byte for byte in b"model\n")]


@functools.cache
def golden_text(variant: str, prompt: str) -> tuple[list[int], list[int]]:
    """A golden prompt and the 48 tokens of its greedy continuation."""
    golden = np.load(GOLDEN / variant / "golden.npz")
    ids = golden[f"{prompt}.ids"].tolist()
    return ids, golden[f"{prompt}.greedy"].tolist()[len(ids) :]


def with_eos(pair: Pair, *eos: int) -> Pair:
    """The same pair, ending at these tokens."""
    return replace(pair, prompt_format=replace(pair.prompt_format, eos_ids=frozenset(eos)))


class OneCharacterEach:
    """A tokenizer in which token i is the character 256 + i, so that a stop string can end at any token."""

    special_ids: frozenset[int] = frozenset()

    def token_id(self, text: str) -> None:
        return None

    def token_bytes(self, index: int) -> bytes:
        return chr(256 + index).encode()

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(256 + index) for index in ids)


def with_characters(pair: Pair) -> Pair:
    return replace(pair, prompt_format=replace(pair.prompt_format, tokenizer=OneCharacterEach()))


def take(conversation: Conversation, ids: list[int], *, chunks: int, **options) -> list[int]:
    """The tokens of the first `chunks` chunks; then the iterator is closed."""
    stream = conversation.stream(ids, **options)
    tokens: list[int] = []
    for _, chunk in zip(range(chunks), stream, strict=False):
        tokens += chunk.tokens
    stream.close()
    return tokens


def check_rows(conversation: Conversation, expected: Rows | None = None) -> None:
    """What the conversation keeps are the rows of a fresh prefill (`expected`) of the tokens it says they belong to."""
    history = conversation.history
    if not history.rows:
        return
    target = conversation.pair.target
    if expected is None:
        expected = prefilled_rows(target, history.tokens)
    gap = largest_gap(target, history._kv, expected, history.rows, written=history._written)
    assert gap < TOLERANCE, gap


@functools.cache
def golden_rows(variant: str, prompt: str) -> Rows:
    """The rows of a golden prompt and its continuation."""
    ids, text = golden_text(variant, prompt)
    return prefilled_rows(golden_pair(variant).target, ids + text)
