"""How many threadgroups attention launches at one row, against stock MLX; nothing is computed here."""

import math
from typing import Any

import mlx.core as mx
import pytest

from attention_cases import Heads, gemma_shapes, sight
from mlx_mtp.kernels import launch
from mlx_mtp.kernels.operations import AttentionShape
from mlx_mtp.kernels.verify_attention import LEAF, scratch_bytes, verify_attention
from mlx_mtp.state import RING_SLACK, bucket_for

GEMMA = gemma_shapes()
LENGTHS = (
    1,
    16,
    32,
    33,
    100,
    128,
    256,
    257,
    512,
    700,
    1024,
    1025,
    2048,
    4095,
    4096,
    8192,
    8193,
    16_384,
    32_768,
)
LONG = (65_536, 65_537, 131_072)
CHIPS = ("base", "pro or max", "ultra")


class Launches(dict[str, tuple[int, int]]):
    """Threadgroups and threads of each by launch, and the bytes of all outputs but the last launch's."""

    scratch = 0

    def reading(self) -> dict[str, int]:
        """Threadgroups of those that read K or V."""
        return {name: groups for name, (groups, _) in self.items() if not name.endswith("merge")}


def launched(
    monkeypatch: pytest.MonkeyPatch, shape: Heads, length: int, rows: int = 1, batch: int = 1
) -> Launches:
    """What is launched for `rows` rows of which the last is key number `length`; buckets as a round has them."""
    found = Launches()

    def recorder(name: str, **made: Any) -> Any:
        def call(
            *, grid: Any, threadgroup: Any, output_shapes: Any, output_dtypes: Any, **given: Any
        ) -> list[mx.array]:
            found[name] = math.prod(grid) // math.prod(threadgroup), math.prod(threadgroup)
            if not name.endswith("merge"):
                found.scratch += sum(
                    math.prod(s) * d.size for s, d in zip(output_shapes, output_dtypes, strict=True)
                )
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return call

    monkeypatch.setattr(mx.fast, "metal_kernel", recorder)
    bucket = bucket_for(length)
    held = bucket if shape.window is None else shape.window + RING_SLACK
    queries = mx.zeros((batch, shape.heads, rows, shape.dim), mx.bfloat16)
    keys = mx.zeros((batch, shape.kv_heads, held, shape.dim), mx.bfloat16)
    verify_attention(queries, keys, keys, sight(shape, [length - rows] * batch, bucket))
    launch._made.cache_clear()
    return found


def products_at_one_row(shape: Heads, length: int) -> int:
    """head_dim 512 in MLX 0.32.4: products for each query head, of which the one with fewer threadgroups.

    Of keys (gemv): 16 a threadgroup, 32 from 4,096 on, 4 where they are few; of values (gemv_t): 64 columns.
    """
    keys = 4 if shape.dim >= 16 * length else 32 if length >= 4096 else 16
    return shape.heads * min(math.ceil(length / keys), shape.dim // 64)


def fused_at_one_row(shape: Heads, length: int, chip: str) -> int:
    """sdpa_vector: a threadgroup a query head; in two passes, so many blocks a K/V head.

    A later MLX (its main branch) also has it for head_dim 512 with 8 query heads a K/V head, from 1,024 keys on.
    """
    if length < (4096 if chip == "base" else 1024):
        return shape.heads
    blocks = {"base": 64 if shape.group >= 4 else 32, "pro or max": 64, "ultra": 128}[chip]
    steps = (
        ((16_384, 65_536), (512, 1024))
        if chip == "ultra"
        else ((1025, 8193, 32_769, 65_537), (128, 256, 512, 1024))
    )
    if chip != "base" and shape.group > 5:
        blocks = max([blocks, *(many for low, many in zip(*steps, strict=True) if length >= low)])
    return shape.kv_heads * blocks


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", [name for name in GEMMA if GEMMA[name].window is None])
def test_full_layers_have_as_many_threadgroups_as_stock(
    monkeypatch: pytest.MonkeyPatch, name: str, chip: str
) -> None:
    """At every length; the launch with the fewest of those that read K or V, against stock's with the fewest."""
    shape = GEMMA[name]
    for length in (*LENGTHS, *LONG):
        ours = launched(monkeypatch, shape, length).reading()
        stock = products_at_one_row(shape, length)
        if shape.group == 8 and length >= 1024:
            stock = max(stock, fused_at_one_row(shape, length, chip))
        assert len(ours) == 2 and min(ours.values()) >= stock, (length, ours, stock)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", [name for name in GEMMA if GEMMA[name].window is not None])
def test_windows_have_as_many_threadgroups_as_stock(
    monkeypatch: pytest.MonkeyPatch, name: str, chip: str
) -> None:
    """All chips but Ultra with a window of 1,024, where there are as many threads in half as many threadgroups."""
    shape = GEMMA[name]
    assert shape.window is not None
    groups, threads = launched(monkeypatch, shape, 5000)["verify_attention_leaf"]
    # A window that begins with a leaf has one leaf fewer than there are threadgroups for.
    assert groups == shape.kv_heads * (shape.window // LEAF + 1)
    ours = groups - shape.kv_heads
    stock = fused_at_one_row(shape, shape.window + RING_SLACK, chip)
    if chip != "ultra" or shape.window < 1024:
        assert ours >= stock
        return
    # docs/kernels-attention.md says why these are enough: everything is asked for at once.
    assert ours * 2 == stock
    assert ours * threads == stock * 32 * shape.group
    asked_for = ours * LEAF * 2 * shape.dim * 2  # of K and V, before the first is waited for
    assert asked_for == shape.window * shape.kv_heads * shape.dim * 2 * 2 >= 8 * 10**6


def test_launches_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in (1, 8, 9):
        for shape in GEMMA.values():
            for length in (200, 5000):
                expected = 3 if shape.window is None else 2
                assert len(launched(monkeypatch, shape, length, rows)) == expected


@pytest.mark.parametrize("name", GEMMA)
def test_scratch_is_what_is_allocated(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What the estimate of memory counts, to the byte."""
    shape = GEMMA[name]
    of = AttentionShape(shape.heads, shape.kv_heads, shape.dim, shape.window, mx.bfloat16)
    for length, rows, batch in ((200, 1, 1), (200, 9, 2), (3000, 4, 1), (3000, 1, 3), (40_000, 9, 1)):
        made = launched(monkeypatch, shape, length, rows, batch)
        assert scratch_bytes(of, batch, rows, bucket_for(length)) == made.scratch, (length, rows, batch)
