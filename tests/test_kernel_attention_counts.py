"""How many threadgroups attention launches at one row, against stock MLX; nothing is computed here."""

import math
from typing import Any

import mlx.core as mx
import pytest

from attention_cases import Heads, gemma_shapes, sight
from mlx_mtp.kernels import launch
from mlx_mtp.kernels.verify_attention import LEAF, verify_attention
from mlx_mtp.state import RING_SLACK

GEMMA = gemma_shapes()


def launched(monkeypatch: pytest.MonkeyPatch, shape: Heads, length: int, rows: int = 1) -> dict[str, int]:
    """Threadgroups of each launch for `rows` rows behind `length` keys."""
    groups: dict[str, int] = {}

    def recorder(name: str, **made: Any) -> Any:
        def call(
            *, grid: Any, threadgroup: Any, output_shapes: Any, output_dtypes: Any, **given: Any
        ) -> list[mx.array]:
            groups[name] = math.prod(grid) // math.prod(threadgroup)
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return call

    monkeypatch.setattr(mx.fast, "metal_kernel", recorder)
    held = length + rows if shape.window is None else shape.window + RING_SLACK
    queries = mx.zeros((1, shape.heads, rows, shape.dim), mx.bfloat16)
    keys = mx.zeros((1, shape.kv_heads, held, shape.dim), mx.bfloat16)
    verify_attention(queries, keys, keys, sight(shape, [length], length + rows))
    launch._made.cache_clear()
    return groups


def stock_at_one_row(shape: Heads, length: int, chip: str) -> int:
    """The launch with the fewest threadgroups of those that read K or V (MLX 0.32.4).

    head_dim 256: sdpa_vector, a threadgroup a query head; from 1024 keys on in two passes of 64 blocks a K/V head on
    Pro and Max, 128 on Ultra. 512: products a query head, 16 or 32 keys a threadgroup, then 64 columns.
    """
    if shape.window is None:
        return shape.heads * min(-(-length // (32 if length >= 4096 else 16)), shape.dim // 64)
    blocks = {"base": 0, "pro or max": 64, "ultra": 128}[chip]
    if shape.window + RING_SLACK < 1024 or not blocks:
        return shape.heads
    return shape.kv_heads * blocks


@pytest.mark.parametrize("chip", ["base", "pro or max"])
@pytest.mark.parametrize("name", GEMMA)
def test_as_many_threadgroups_as_stock(monkeypatch: pytest.MonkeyPatch, name: str, chip: str) -> None:
    """At any length behind a full window; from 4096 keys on in full layers. docs/kernels-attention.md has the table."""
    shape = GEMMA[name]
    for length in (4096, 8192, 32_768, 131_072):
        groups = launched(monkeypatch, shape, length - 1)
        if shape.window is None:
            ours = min(groups["verify_attention_weights"], groups["verify_attention_values"])
        else:
            # A window that begins with a leaf has one leaf fewer than there are threadgroups for.
            assert groups["verify_attention_leaf"] == shape.kv_heads * (shape.window // LEAF + 1)
            ours = groups["verify_attention_leaf"] - shape.kv_heads
        assert ours >= stock_at_one_row(shape, length, chip), (length, ours)


def test_on_ultra_windows_have_as_many_simdgroups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as many threadgroups as stock's, of four simdgroups instead of one for each query head."""
    for name, shape in GEMMA.items():
        if shape.window is None or shape.window < 1024:
            continue
        ours = launched(monkeypatch, shape, 5000)["verify_attention_leaf"] - shape.kv_heads
        stock = stock_at_one_row(shape, 5000, "ultra")
        assert ours * 2 == stock, name
        assert ours * (shape.dim // 64) == stock * shape.group, name


def test_launches_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in (1, 8, 9):
        for shape in GEMMA.values():
            expected = 3 if shape.window is None else 2
            assert len(launched(monkeypatch, shape, 5000, rows)) == expected
