"""Copies quantised by mlx-lm: our loader and target give mlx-lm's own logits, row for row, past three windows."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from goldens import WINDOW, largest_gap, prefilled
from mlx_mtp.checkpoint import read_target
from mlx_mtp.state import bucket_for
from mlx_mtp.target import Target, logits_of, make_target
from mlx_mtp.verify import verify
from tiny_checkpoints import KINDS, VOCAB, write_target

TOLERANCE = 1e-4
ROWS = 4 * WINDOW
FORMATS: dict[str, dict[str, Any]] = {
    "affine-4-64": {"bits": 4, "group_size": 64, "mode": "affine"},
    "affine-8-32": {"bits": 8, "group_size": 32, "mode": "affine"},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}
OTHER_FORMATS: dict[str, dict[str, Any]] = {
    "affine-3-32": {"bits": 3, "group_size": 32, "mode": "affine"},
    "affine-4-32": {"bits": 4, "group_size": 32, "mode": "affine"},
    "affine-8-64": {"bits": 8, "group_size": 64, "mode": "affine"},
    "mxfp8": {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    "nvfp4": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
}

each_kind = pytest.mark.parametrize("kind", KINDS)


class FloatRows(nn.Module):
    """An embedding with float32 rows: mlx-lm's own are bfloat16 in the block formats, whatever the model's type."""

    def __init__(self, table: nn.Module):
        super().__init__()
        self.table = table

    def __call__(self, ids: mx.array) -> mx.array:
        return self.table(ids).astype(mx.float32)

    def as_linear(self, x: mx.array) -> mx.array:
        return self.table.as_linear(x)


def text() -> list[int]:
    return np.random.default_rng(17).integers(0, VOCAB, ROWS).tolist()


def quantised_by_mlx_lm(folder: Path, kind: str, form: dict[str, Any]) -> tuple[Path, np.ndarray]:
    """The folder mlx-lm saves a quantised tiny target in, and the logits [ROWS, V] of mlx-lm's own model from it."""
    model, config = load_model(write_target(folder / "published", kind))
    model, config = quantize_model(model, config, **form)
    quantised = folder / "quantised"
    save_model(quantised, model)
    save_config(config, quantised / "config.json")
    reloaded, _ = load_model(quantised)
    inner = reloaded.language_model.model
    for table in {"embed_tokens", "embed_tokens_per_layer"} & inner.keys():
        inner[table] = FloatRows(inner[table])
    return quantised, np.array(reloaded(mx.array([text()]))[0])


def own_logits(folder: Path, *, rows: int) -> mx.array:
    """Our logits [ROWS, V]: a prefill of one token, then passes of `rows` rows."""
    checkpoint = read_target(folder)
    assert checkpoint.quantized is not None and checkpoint.warnings == ()
    target = make_target(checkpoint.config, checkpoint.tensors)
    kv, hidden = prefilled(target, text()[:1])
    logits = [logits_of(target, hidden)[0]]
    for done in range(1, ROWS, rows):
        tokens = mx.array([text()[done : done + rows]], mx.uint32)
        hidden, kv = verify(target, tokens, kv, mx.array([done], mx.int32), bucket=bucket_for(ROWS))
        logits.append(logits_of(target, hidden)[0])
    return mx.concatenate(logits)


def assert_same(got: mx.array, want: np.ndarray) -> None:
    assert largest_gap(got, want) <= TOLERANCE
    assert np.array(got).argmax(-1).tolist() == want.argmax(-1).tolist()


@each_kind
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_logits_of_quantised_copies_equal_mlx_lms(tmp_path: Path, kind: str, form: dict[str, Any]) -> None:
    folder, want = quantised_by_mlx_lm(tmp_path, kind, form)
    assert_same(own_logits(folder, rows=5), want)


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("form", {**FORMATS, **OTHER_FORMATS}.values(), ids=[*FORMATS, *OTHER_FORMATS])
def test_every_format_and_pass_size_gives_mlx_lms_logits(
    tmp_path: Path, kind: str, form: dict[str, Any], rows: int
) -> None:
    folder, want = quantised_by_mlx_lm(tmp_path, kind, form)
    assert_same(own_logits(folder, rows=rows), want)


@each_kind
def test_prefill_of_a_quantised_copy_ends_in_mlx_lms_logits(tmp_path: Path, kind: str) -> None:
    folder, want = quantised_by_mlx_lm(tmp_path, kind, FORMATS["affine-4-64"])
    checkpoint = read_target(folder)
    target: Target = make_target(checkpoint.config, checkpoint.tensors)
    for chunk in (7, 512):
        hidden = prefilled(target, text(), chunk=chunk)[1]
        assert_same(logits_of(target, hidden)[0], want[-1:])


def test_quantisation_moves_the_logits_by_more_than_the_tolerance(tmp_path: Path) -> None:
    """Otherwise the comparison could not tell a dequantised copy from the original."""
    logits = [quantised_by_mlx_lm(tmp_path / name, "31b", form)[1] for name, form in FORMATS.items()]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(logits[one] - logits[other]).max() > 100 * TOLERANCE
