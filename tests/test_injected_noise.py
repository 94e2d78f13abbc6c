"""The equality suites can fail: noise that depends on how a row is computed, and not on what it holds, must be caught.

| noise keyed on | caught by the same-text check that compares         | `rows_are_invariant` |
|----------------|-----------------------------------------------------|----------------------|
| rows in a pass | k = 4 with plain decoding, perfect drafter          | False                |
| batch row      | the second row of a batch with the same prompt alone | False                |
| bucket         | k = 15 with plain decoding before the edge at 256   | False                |
| chunk          | prefill in chunks of 20 with chunks of 512           | True (says nothing of prefill) |

The same checks pass without the noise, and with noise that is keyed on nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import pytest

import mlx_mtp.round
from mlx_mtp import Sampling, generate, generate_batch
from mlx_mtp.attention import Sight, attend, attend_tiled
from mlx_mtp.conversation import Conversation
from mlx_mtp.exactness import rows_are_invariant
from mlx_mtp.kernels.table import Kernels
from mlx_mtp.pair import Pair
from mlx_mtp.round import Rounds
from mlx_mtp.weights import Weight
from pairs import golden_pair
from scripted_drafts import ScriptedDrafts

# Of the values disturbed. Rounding would be 1e-7 and would need thousands of tokens to show; the bucket's noise reaches
# the attention of a single layer only, for the tokens shortly before the edge.
SIZES = {"rows": 0.02, "batch_row": 0.02, "bucket": 0.2, "chunk": 0.02}
TOKENS = 24
SETTING = Sampling(temperature=1.0, top_k=64, top_p=0.95, seed=9)
PROMPT = [(i * 37 + 3) % 256 for i in range(45)]
LONG_PROMPT = [(i * 37 + 3) % 256 for i in range(228)]


@dataclass(frozen=True, slots=True)
class Keys:
    """What the noise depends on, besides the column."""

    rows: bool = False  # how many rows a pass verifies
    batch_row: bool = False
    bucket: bool = False  # how many rows of a full layer attention walks
    chunk: bool = False  # how many rows a pass prefills


def with_noise(pair: Pair, keys: Keys, size: float) -> Pair:
    """The pair with the outputs of its target's projections and attention multiplied by 1 + noise."""

    def project(weight: Weight, x: mx.array) -> mx.array:
        out = weight.project(x)
        return out * factors(out.shape[-1:], x.shape[-2] * keys.rows, size)

    def attend_in_round(queries: mx.array, k: mx.array, v: mx.array, sight: Sight) -> mx.array:
        out = attend(queries, k, v, sight)
        batch, _, rows, _ = queries.shape
        shape = (batch if keys.batch_row else 1, 1, out.shape[-1])
        walked = k.shape[2] if sight.window else sight.bucket
        noise = factors(shape, rows * keys.rows + 1000 * walked * keys.bucket, size)
        return (out.reshape(batch, rows, -1) * noise).reshape(out.shape)

    def project_chunk(weight: Weight, x: mx.array) -> mx.array:
        out = weight.project(x)
        return out * factors(out.shape[-1:], x.shape[-2] * keys.chunk, size)

    def attend_in_prefill(queries: mx.array, *others: Any) -> mx.array:
        out = attend_tiled(queries, *others)
        return out * factors(out.shape[-1:], queries.shape[2] * keys.chunk, size)

    target = replace(
        pair.target,
        kernels=Kernels(project=project, attend=attend_in_round),
        prefill_kernels=Kernels(project=project_chunk, attend_tiled=attend_in_prefill),
    )
    return replace(pair, target=target, rounds=Rounds(target, pair.drafter, compiled=False))


def factors(shape: tuple[int, ...], seed: int, size: float) -> mx.array:
    return 1 + size * mx.random.normal(shape, key=mx.random.key(seed))


def with_drafts(pair: Pair, prompt: list[int], k: int, patch: pytest.MonkeyPatch) -> bool:
    """Whether k drafts a round, all of them what plain decoding says, give plain decoding's text."""
    plain = generate(pair, prompt, max_tokens=TOKENS, sampling=SETTING, num_draft_tokens=0).tokens
    with patch.context() as patched:
        patched.setattr(mlx_mtp.round, "draft", ScriptedDrafts([prompt + plain], right=1.0))
        drafted = generate(pair, prompt, max_tokens=TOKENS, sampling=SETTING, num_draft_tokens=k)
    return drafted.tokens == plain


def in_another_row(pair: Pair, patch: pytest.MonkeyPatch) -> bool:
    alone = generate(pair, PROMPT, max_tokens=TOKENS, sampling=SETTING, num_draft_tokens=0)
    both = generate_batch(pair, [PROMPT] * 2, max_tokens=TOKENS, sampling=SETTING, num_draft_tokens=0)
    return all(reply.tokens == alone.tokens for reply in both)


def in_chunks(pair: Pair, patch: pytest.MonkeyPatch) -> bool:
    texts = [
        Conversation(pair, chunk=chunk).generate(
            PROMPT, max_tokens=TOKENS, sampling=SETTING, num_draft_tokens=0
        )
        for chunk in (512, 20)
    ]
    return texts[0].tokens == texts[1].tokens


Check = Callable[[Pair, pytest.MonkeyPatch], bool]
CHECKS: dict[str, Check] = {
    "rows": lambda pair, patch: with_drafts(pair, PROMPT, 4, patch),
    "batch_row": in_another_row,
    "bucket": lambda pair, patch: with_drafts(pair, LONG_PROMPT, 15, patch),
    "chunk": in_chunks,
}


@pytest.mark.parametrize("key", CHECKS)
def test_noise_makes_the_check_of_its_key_fail(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = golden_pair("e2b")
    assert CHECKS[key](pair, monkeypatch)
    noisy = with_noise(pair, Keys(**{key: True}), SIZES[key])
    assert not CHECKS[key](noisy, monkeypatch)
    assert rows_are_invariant(noisy.target) == (key == "chunk")


def test_noise_that_depends_on_nothing_is_part_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = golden_pair("e2b")
    noisy = with_noise(pair, Keys(), 0.2)
    before, after = (
        generate(one, PROMPT, max_tokens=TOKENS, sampling=SETTING, num_draft_tokens=0).tokens
        for one in (pair, noisy)
    )
    assert after != before
    assert all(check(noisy, monkeypatch) for check in CHECKS.values())
    assert rows_are_invariant(noisy.target)
