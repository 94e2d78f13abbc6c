"""Logits of the five golden targets, through the real loader, equal transformers' within 1e-3 in float32."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from goldens import PROMPTS, WINDOW, golden, largest_gap, loaded, prefilled
from mlx_mtp.checkpoint import read_target
from mlx_mtp.state import bucket_for
from mlx_mtp.target import logits_of, make_target
from mlx_mtp.verify import verify
from pairs import GOLDEN, VARIANTS

TOLERANCE = 1e-3
PASS_SIZES = (1, 5, 16)

each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_prompt = pytest.mark.parametrize("prompt", PROMPTS)


@each_variant
@each_prompt
def test_prefill_of_prefixes_gives_the_golden_logits(variant: str, prompt: str) -> None:
    target, expected = loaded(variant).target, golden(variant, prompt)
    last_rows = range(0, len(expected.prompt), 1 if prompt == "short" else 4)
    rows = [prefilled(target, expected.prompt[: row + 1])[1] for row in last_rows]
    logits = logits_of(target, mx.concatenate(rows, axis=1))[0]
    assert largest_gap(logits, expected.logits[last_rows]) < TOLERANCE


@each_variant
@each_prompt
@pytest.mark.parametrize("rows", PASS_SIZES)
def test_verify_passes_give_the_golden_logits_past_three_windows(
    variant: str, prompt: str, rows: int
) -> None:
    target, expected = loaded(variant).target, golden(variant, prompt)
    text, length = expected.text, len(expected.prompt)
    assert len(text) > 3 * WINDOW
    kv, hidden = prefilled(target, expected.prompt)
    logits = [logits_of(target, hidden)[0]]
    for done in range(length, len(text) - 1, rows):
        tokens = mx.array([text[done : min(done + rows, len(text) - 1)]], mx.uint32)
        at = mx.array([done], mx.int32)
        hidden, kv = verify(target, tokens, kv, at, bucket=bucket_for(len(text)))
        logits.append(logits_of(target, hidden)[0])
    assert largest_gap(mx.concatenate(logits), expected.greedy_logits) < TOLERANCE


@each_variant
@each_prompt
def test_prefill_gives_the_hidden_rows_that_drafting_starts_from(variant: str, prompt: str) -> None:
    target, expected = loaded(variant).target, golden(variant, prompt)
    rows = [prefilled(target, expected.text[:position])[1] for position in expected.position.tolist()]
    assert largest_gap(mx.concatenate(rows, axis=1)[0], expected.hidden_in) < TOLERANCE


@pytest.mark.parametrize("variant", ["a4b", "12b"])
def test_both_published_forms_of_a_target_give_the_same_logits(tmp_path: Path, variant: str) -> None:
    stored = GOLDEN / variant / "target"
    was_multimodal = "text_config" in json.loads((stored / "config.json").read_text())
    other = "config_text.json" if was_multimodal else "config_multimodal.json"
    prefixes = ("model.language_model.", "model.")
    old, new = prefixes if was_multimodal else prefixes[::-1]
    tensors = mx.load(str(stored / "model.safetensors"))
    renamed = {new + name.removeprefix(old): value for name, value in tensors.items()}
    (tmp_path / "config.json").write_bytes((GOLDEN / variant / other).read_bytes())
    mx.save_safetensors(str(tmp_path / "model.safetensors"), renamed)

    checkpoint = read_target(tmp_path)
    assert checkpoint.warnings == () and checkpoint.config.multimodal is not was_multimodal
    target, expected = make_target(checkpoint.config, checkpoint.tensors), golden(variant, "long")
    logits = logits_of(target, prefilled(target, expected.prompt)[1])[0]
    assert largest_gap(logits, expected.logits[-1:]) < TOLERANCE


def test_the_goldens_would_show_a_missing_factor() -> None:
    """Golden logits differ by far more than the tolerance when one layer's scalar is taken for 1."""
    checkpoint = read_target(GOLDEN / "31b" / "target")
    expected = golden("31b", "long")
    tensors = checkpoint.tensors | {"layers.0.layer_scalar": mx.ones((1,))}
    target = make_target(checkpoint.config, tensors)
    logits = logits_of(target, prefilled(target, expected.prompt)[1])[0]
    assert largest_gap(logits, expected.logits[-1:]) > 100 * TOLERANCE
    assert np.abs(expected.logits).max() < 30
