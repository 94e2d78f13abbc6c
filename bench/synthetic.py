"""Models of the published shapes with made-up weights: 4-bit to run, or of no size at all to count."""

from typing import Any

import mlx.core as mx
import numpy as np
from metal_graph import leaf

from mlx_mtp.config import DrafterConfig, TargetConfig
from mlx_mtp.config_parse import parse_drafter_config, parse_target_config
from mlx_mtp.drafter import make_drafter
from mlx_mtp.layers import Tensors
from mlx_mtp.published_configs import published_drafter, published_target
from mlx_mtp.target import make_target
from mlx_mtp.tensor_names import expected_tensors
from mlx_mtp.weights import DenseWeight, QuantizedWeight

GROUP, BITS = 64, 4
ORDERING = "masked_embedding.token_ordering"


def configs_of(size: str) -> tuple[TargetConfig, DrafterConfig]:
    """The published configurations of a target and of its drafter."""
    return parse_target_config(published_target(size), size), parse_drafter_config(
        published_drafter(size), size
    )


def quantised_tensors(config: TargetConfig | DrafterConfig, dtype: mx.Dtype, seed: int) -> Tensors:
    """Random packed matrices, made one at a time and never dense; norms near one, token ordering 0 .. V-1."""
    tensors: Tensors = {}
    for number, (name, shape) in enumerate(expected_tensors(config).items()):
        key = mx.random.split(mx.random.key(seed), number + 1)[number]
        if name == ORDERING:
            tensors[name] = mx.arange(shape[0], dtype=mx.uint32)
        elif len(shape) == 1:
            tensors[name] = mx.random.uniform(0.8, 1.2, shape, key=key).astype(dtype)
            mx.eval(tensors[name])
        else:
            tensors[name] = quantised_matrix(shape, dtype, np.random.default_rng((seed, number)))
    return tensors


def quantised_matrix(
    shape: tuple[int, ...], dtype: mx.Dtype, rng: np.random.Generator, bits: int = BITS
) -> QuantizedWeight:
    """[..., N, K] of packed values spread evenly about zero, so that products keep the size of their input."""
    *outer, width = shape
    packed = mx.array(rng.integers(0, 2**32, (*outer, width * bits // 32), dtype=np.uint32))
    levels = 2**bits
    step = width**-0.5 / ((levels**2 - 1) / 12) ** 0.5  # the standard deviation of 0 .. levels - 1
    scales = mx.full((*outer, width // GROUP), step, dtype)
    biases = mx.full(scales.shape, -(levels - 1) / 2 * step, dtype)
    mx.eval(packed, scales, biases)
    return QuantizedWeight(packed, scales, biases, GROUP, bits, "affine", dtype)


def instantiated_parameters(config: TargetConfig | DrafterConfig) -> int:
    """Make the model with matrices that occupy no memory -> the numbers it holds, the token ordering not counted."""
    zero = mx.zeros((), mx.bfloat16)
    tensors: dict[str, Any] = {}
    for name, shape in expected_tensors(config).items():
        like = mx.broadcast_to(zero, shape)
        tensors[name] = like if len(shape) == 1 else DenseWeight(like)
    if ORDERING in tensors:
        tensors[ORDERING] = mx.arange(tensors[ORDERING].size, dtype=mx.uint32)
    if isinstance(config, DrafterConfig):
        make_drafter(config, tensors)
    else:
        make_target(config, tensors)
    arrays = [value.weight if isinstance(value, DenseWeight) else value for value in tensors.values()]
    return sum(array.size for array in arrays) - (tensors[ORDERING].size if ORDERING in tensors else 0)


def weightless_tensors(config: TargetConfig | DrafterConfig, dtype: mx.Dtype) -> Tensors:
    """4-bit matrices and norms of the right shapes that occupy no memory: to build graphs, not to run them."""
    tensors: Tensors = {}
    for name, shape in expected_tensors(config).items():
        if name == ORDERING:
            tensors[name] = leaf(shape, mx.uint32)
        elif len(shape) == 1:
            tensors[name] = leaf(shape, dtype)
        else:
            *outer, width = shape
            parts = leaf((*outer, width // GROUP), dtype)
            packed = leaf((*outer, width * BITS // 32), mx.uint32)
            tensors[name] = QuantizedWeight(packed, parts, parts, GROUP, BITS, "affine", dtype)
    return tensors
