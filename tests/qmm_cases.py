"""Random rows and matrices for the skinny products, what float64 makes of them, and how near a kernel must come."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.config_parse import parse_drafter_config, parse_target_config
from mlx_mtp.kernels.skinny import Body
from mlx_mtp.kernels.verify_gemm import verify_gemm
from mlx_mtp.kernels.verify_qmm import verify_qmm
from mlx_mtp.published_configs import SIZES, published_drafter, published_target
from mlx_mtp.weights import DenseWeight, QuantizedWeight, Weight

BODIES: tuple[Body, ...] = ("scalar", "matrix")
ROUNDING = {mx.float32: 2.0**-24, mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11}  # largest relative error of one
BLOCK_FLOATS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


def random_rows(rows: int, depth: int, *, seed: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal((rows, depth), key=mx.random.key(seed)).astype(dtype)


def quantised(
    columns: int,
    depth: int,
    *,
    seed: int,
    bits: int = 4,
    group: int = 64,
    mode: str = "affine",
    dtype: mx.Dtype = mx.bfloat16,
) -> QuantizedWeight:
    if mode != "affine":
        bits, group = BLOCK_FLOATS[mode]
    table = random_rows(columns, depth, seed=seed, dtype=dtype)
    words, scales, *biases = mx.quantize(table, group_size=group, bits=bits, mode=mode)
    return QuantizedWeight(words, scales, biases[0] if biases else None, group, bits, mode, dtype)


def table_of(weight: Weight) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[N, K] in float64; what a format stores is turned into float32 first, where that loses nothing."""
    if isinstance(weight, DenseWeight):
        return np.array(weight.weight.astype(mx.float32)).astype(np.float64)
    if weight.biases is None:
        return np.array(_dequantised(weight, weight.scales, None)).astype(np.float64)
    # scale * integer + bias without a rounding: MLX itself rounds in the scales' type
    ones = mx.ones(weight.scales.shape, mx.float32)
    integers = np.array(_dequantised(weight, ones, mx.zeros(weight.scales.shape, mx.float32))).astype(
        np.float64
    )
    scales, biases = (
        np.repeat(np.array(part.astype(mx.float32)).astype(np.float64), weight.group_size, axis=1)
        for part in (weight.scales, weight.biases)
    )
    return scales * integers + biases


def _dequantised(weight: QuantizedWeight, scales: mx.array, biases: mx.array | None) -> mx.array:
    how: dict[str, Any] = {"group_size": weight.group_size, "bits": weight.bits, "mode": weight.mode}
    return mx.dequantize(weight.weight, scales, biases, dtype=mx.float32, **how)


def multiply(weight: Weight, x: mx.array, *, body: Body = "scalar", tile: int | None = None) -> mx.array:
    """By our kernel, which refuses what it does not compute."""
    if isinstance(weight, DenseWeight):
        return verify_gemm(weight, x, body=body, tile=tile)
    return verify_qmm(weight, x, body=body, tile=tile)


def assert_near(y: mx.array, weight: Weight, x: mx.array) -> None:
    """Every element within its one rounding to y's type plus what float32 sums of this length can lose."""
    table, rows = table_of(weight), np.array(x.astype(mx.float32)).astype(np.float64)
    expected, size = rows @ table.T, np.abs(rows) @ np.abs(table).T
    sums = (x.shape[-1] / 32 + 8) * ROUNDING[mx.float32]
    allowed = ROUNDING[y.dtype] * np.abs(expected) + 1.01 * sums * size
    off = np.abs(np.array(y.astype(mx.float32)).astype(np.float64) - expected)
    assert off.shape == allowed.shape
    assert (off <= allowed).all(), f"off by up to {np.nanmax(off / allowed)} times what is allowed"


def same_bits(a: mx.array, b: mx.array) -> bool:
    """NaN equals NaN; 0 does not equal -0."""
    unsigned = {2: mx.uint16, 4: mx.uint32}[a.dtype.size]
    return a.dtype == b.dtype and bool(mx.array_equal(a.view(unsigned), b.view(unsigned)))


def gemma_shapes() -> Iterator[tuple[int, int]]:
    """(K, N) of every product in the published targets and drafters; one expert's among them."""
    shapes: set[tuple[int, int]] = set()
    for size in SIZES:
        target = parse_target_config(published_target(size), size)
        drafter = parse_drafter_config(published_drafter(size), size)
        hidden = target.text.hidden_size
        shapes |= {(2 * hidden, drafter.text.hidden_size), (drafter.text.hidden_size, hidden)}
        for text in (target.text, drafter.text):
            shapes |= set(_of_layers(text)) | {(text.hidden_size, text.vocab_size)}
        if drafter.num_centroids:
            shapes.add((drafter.text.hidden_size, drafter.num_centroids))
    return iter(sorted(shapes))


def _of_layers(text: Any) -> Iterator[tuple[int, int]]:
    hidden = text.hidden_size
    for index, kind in enumerate(text.layer_types):
        heads, kv = (n * text.head_dim_of(kind) for n in (text.num_heads, text.kv_heads_of(kind)))
        width = text.mlp_size_of(index)
        yield from ((hidden, heads), (heads, hidden), (hidden, kv), (hidden, width), (width, hidden))
    if text.num_experts:
        yield (hidden, text.num_experts)
        yield from ((hidden, text.moe_intermediate_size), (text.moe_intermediate_size, hidden))
    if text.per_layer_input_dim:
        yield from ((hidden, text.per_layer_input_dim), (text.per_layer_input_dim, hidden))
        yield (hidden, text.per_layer_input_dim * len(text.layer_types))
