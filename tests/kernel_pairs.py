"""Tiny 4-bit pairs with Gemma's own head sizes, on our kernels or on their references."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp.config import FULL, SLIDING
from mlx_mtp.config_parse import parse_drafter_config, parse_target_config
from mlx_mtp.drafter import make_drafter
from mlx_mtp.kernels import chooser
from mlx_mtp.kernels.chooser import Choice, Verdict, choose_kernels
from mlx_mtp.kernels.operations import operations_of
from mlx_mtp.layers import Tensors
from mlx_mtp.pair import Pair
from mlx_mtp.round import Rounds
from mlx_mtp.sampling import Sampling
from mlx_mtp.target import make_target
from mlx_mtp.weights import QuantizedWeight
from pairs import prompt_format
from tiny_checkpoints import drafter_config, random_tensors, target_config

GROUP = 64
# No width is a multiple of 512, as in 26B-A4B and 31B; heads are Gemma's: 256 in sliding layers, 512 in full ones.
SHAPES: dict[str, dict[str, Any]] = {
    "e2b": {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 8, "num_key_value_heads": 1},
    "31b": {
        "hidden_size": 320,
        "intermediate_size": 448,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "num_hidden_layers": 4,
    },
    "a4b": {
        "hidden_size": 192,
        "intermediate_size": 320,
        "moe_intermediate_size": 192,
        "num_experts": 16,
        "top_k_experts": 8,
    },
}
KINDS = tuple(SHAPES)
COMMON = {
    "head_dim": 256,
    "global_head_dim": 512,
    "final_logit_softcapping": 4.0,
}  # random logits feel such a cap
CLUSTERS = 12  # of 8 tokens each: more than the 64 to draw from
DRAFTER_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
    "num_hidden_layers": 4,
    "final_logit_softcapping": None,
}


def quantised_pair(kind: str, *, dtype: mx.Dtype = mx.float32, seed: int = 7) -> Pair:
    """Random weights, every matrix 4-bit in groups of 64, activations in `dtype`; eager rounds, stock operations.

    The weights are the same numbers in every type.
    """
    config, small = target_config(kind), drafter_config(kind, num_centroids=32 if kind == "e2b" else 0)
    config["text_config"] |= COMMON | SHAPES[kind]
    small["text_config"] |= COMMON | SHAPES[kind] | DRAFTER_SHAPE
    small["backbone_hidden_size"] = SHAPES[kind]["hidden_size"]
    small["centroid_intermediate_top_k"] = CLUSTERS
    target = make_target(
        parse_target_config(config, kind), quantised(random_tensors(config, seed=seed), dtype)
    )
    drafter = make_drafter(
        parse_drafter_config(small, kind), quantised(random_tensors(small, seed=seed + 1), dtype)
    )
    return Pair(
        name=kind,
        target=target,
        drafter=drafter,
        prompt_format=prompt_format(),
        sampling=Sampling(temperature=0.0),
        max_context=512,
        rounds=Rounds(target, drafter, compiled=False),
    )


def quantised(tensors: dict[str, mx.array], dtype: mx.Dtype) -> Tensors:
    """Canonical tensors with every matrix packed; the other floats in `dtype`."""
    packed: dict[str, Any] = {}
    for name, value in tensors.items():
        if value.dtype == mx.int64:
            packed[name] = value
        elif value.ndim == 1:
            packed[name] = value.astype(mx.bfloat16).astype(dtype)
        else:
            weight, *affine = mx.quantize(value.astype(mx.bfloat16), group_size=GROUP, bits=4)
            scales, biases = (part.astype(dtype) for part in affine)
            packed[name] = QuantizedWeight(weight, scales, biases, GROUP, 4, "affine", dtype)
    return packed


def chosen(pair: Pair) -> Choice:
    """Kernels wherever one computes the operation, as on a chip on which all of them passed and won."""
    verdicts = {
        operation: Verdict(True, "in a test") for operation in operations_of(pair.target, pair.drafter)
    }
    choice = choose_kernels(pair.target, pair.drafter, has_metal=True, verdicts=verdicts)
    return choice if pair.target.dtype == mx.float32 else everywhere(choice)


def on_kernels(pair: Pair) -> Pair:
    return pair.with_kernels(chosen(pair))


def everywhere(choice: Choice) -> Choice:
    """In prefill too: MLX multiplies 16-bit rows on a CPU coarsely, and by experts not at all."""
    tiled = choice.prefill_kernels.attend_tiled
    return replace(choice, prefill_kernels=replace(choice.kernels, attend_tiled=tiled))


def on_references(pair: Pair, patch: pytest.MonkeyPatch) -> Pair:
    """The same choice with every kernel's reference in plain MLX in its place."""
    references = {key: family._replace(kernel=family.reference) for key, family in chooser.FAMILIES.items()}
    with patch.context() as patched:
        patched.setattr(chooser, "FAMILIES", references)
        return pair.with_kernels(chosen(pair))
