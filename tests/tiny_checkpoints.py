"""Tiny random Gemma 4 checkpoints on disk, in every form in which they are published.

Widths are multiples of 64, so that every matrix can be quantised in every MLX format.
"""

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp.checkpoint import read_target
from mlx_mtp.config import FULL, SLIDING
from mlx_mtp.config_parse import parse_drafter_config, parse_target_config
from mlx_mtp.errors import CheckpointError
from mlx_mtp.tensor_names import expected_tensors

KINDS = ("e2b", "31b", "a4b", "12b")  # per-layer inputs and shared K/V; K = V; experts; the unified naming
VOCAB = 256
PARTS = ("weight", "scales", "biases")
PLAIN_NAMES = (".layer_scalar", ".router.scale", ".router.per_expert_scale", ".token_ordering")
BASE: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 16,
    "layer_types": [SLIDING, SLIDING, FULL],
    "num_hidden_layers": 3,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0,
    "use_double_wide_mlp": False,
    "enable_moe_block": False,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
    },
}
CHANGES: dict[str, dict[str, Any]] = {
    "31b": {},
    "12b": {"model_type": "gemma4_unified_text"},
    "a4b": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
    },
    "e2b": {
        "attention_k_eq_v": False,
        "num_global_key_value_heads": None,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": VOCAB,
    },
}


def target_config(kind: str, *, nested: bool = True) -> dict[str, Any]:
    """config.json of a tiny target: multimodal as published, or the text model alone."""
    text = deepcopy({**BASE, **CHANGES[kind]})
    if not nested:
        return text
    model_type = text["model_type"].removesuffix("_text")
    return {"model_type": model_type, "text_config": text, "eos_token_id": [1, 106], "vocab_size": VOCAB}


def drafter_config(kind: str, *, num_centroids: int = 32) -> dict[str, Any]:
    """config.json of the drafter for that target; `num_centroids` 0 gives the dense head."""
    text = deepcopy({**BASE, **CHANGES[kind]})
    text |= {
        "hidden_size": 32 if kind == "e2b" else 64,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 4,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
        "final_logit_softcapping": None,
    }
    return {
        "model_type": "gemma4_unified_assistant" if kind == "12b" else "gemma4_assistant",
        "text_config": text,
        "backbone_hidden_size": 64,
        "use_ordered_embeddings": num_centroids > 0,
        "num_centroids": num_centroids or 2048,
        "centroid_intermediate_top_k": 4,
    }


def random_tensors(
    config: dict[str, Any], *, seed: int = 7, dtype: mx.Dtype = mx.float32
) -> dict[str, mx.array]:
    """Canonical name -> random array; the token ordering is a permutation."""
    is_drafter = "backbone_hidden_size" in config
    parsed = (parse_drafter_config if is_drafter else parse_target_config)(config, "tiny")
    key = mx.random.key(seed)
    tensors = {}
    for name, shape in expected_tensors(parsed).items():
        key, own = mx.random.split(key)
        if name.endswith("token_ordering"):
            tensors[name] = mx.random.permutation(shape[0], key=own).astype(mx.int64)
        elif len(shape) == 1:
            tensors[name] = mx.random.uniform(0.5, 1.5, shape, key=own).astype(dtype)
        else:
            tensors[name] = (mx.random.normal(shape, key=own) / math.sqrt(shape[-1])).astype(dtype)
    return tensors


def published_names(tensors: dict[str, mx.array], prefix: str) -> dict[str, mx.array]:
    """Names as transformers writes them: gate and up experts in one tensor, `.weight` on modules."""
    stored = {}
    for name, value in tensors.items():
        bare = name.startswith(("pre_projection", "post_projection", "masked_embedding"))
        full = name if bare else prefix + name
        if name.endswith("experts.gate_proj"):
            up = tensors[name.replace("gate_proj", "up_proj")]
            stored[full.replace("gate_proj", "gate_up_proj")] = mx.concatenate([value, up], axis=1)
        elif name.endswith("experts.down_proj"):
            stored[full] = value
        elif not name.endswith("experts.up_proj"):
            stored[full if name.endswith(PLAIN_NAMES) else full + ".weight"] = value
    return stored


def mlx_names(
    tensors: dict[str, mx.array], prefix: str, quantize: dict[str, Any] | None
) -> dict[str, mx.array]:
    """Names as mlx-lm and mlx-vlm write them, matrices quantised by `quantize` (mx.quantize's arguments)."""
    stored = {}
    for name, value in tensors.items():
        bare = name.startswith(("pre_projection", "post_projection", "masked_embedding"))
        full = name if bare else prefix + name
        full = full.replace(".experts.", ".experts.switch_glu.")
        if value.ndim == 1:
            stored[full if name.endswith(PLAIN_NAMES) else full + ".weight"] = value
        elif quantize is None:
            stored[full + ".weight"] = value
        else:
            parts = mx.quantize(value, **quantize)
            stored |= {f"{full}.{part}": array for part, array in zip(PARTS, parts, strict=False)}
    return stored


def write_checkpoint(
    folder: Path, config: dict[str, Any], stored: dict[str, mx.array], *, shards: int = 1
) -> Path:
    """config.json and the tensors, in one file or in `shards` with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), stored)
        return folder
    names = sorted(stored)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: stored[name] for name in names[shard::shards]}
        mx.save_safetensors(str(folder / file), part)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_target(folder: Path, kind: str, *, nested: bool = True, shards: int = 1, seed: int = 7) -> Path:
    """A tiny target as transformers publishes it, float32."""
    config = target_config(kind, nested=nested)
    prefix = "model.language_model." if nested else "model."
    return write_checkpoint(
        folder, config, published_names(random_tensors(config, seed=seed), prefix), shards=shards
    )


def write_drafter(folder: Path, kind: str, *, num_centroids: int = 32, seed: int = 11) -> Path:
    """The drafter for that target as transformers publishes it, float32."""
    config = drafter_config(kind, num_centroids=num_centroids)
    return write_checkpoint(folder, config, published_names(random_tensors(config, seed=seed), "model."))


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file; a name with double underscores reaches into nested objects."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *sections, last = name.split("__")
        place = content
        for section in sections:
            place = place[section]
        place[last] = value
    path.write_text(json.dumps(content))


def edit_tensors(file: Path, changes: dict[str, mx.array | None]) -> None:
    """Replace, add or (None) remove tensors of one weight file."""
    stored = dict(mx.load(str(file)))
    mx.eval(stored)
    for name, value in changes.items():
        if value is None:
            del stored[name]
        else:
            stored[name] = value
    mx.save_safetensors(str(file), stored)


def refusal(folder: Path, reader: Any = read_target) -> str:
    """The message with which `folder` is refused: one line, ending in a remedy."""
    with pytest.raises(CheckpointError) as caught:
        reader(folder)
    message = str(caught.value)
    assert "\n" not in message and "; " in message and str(folder) in message
    assert caught.value.code == "checkpoint" and caught.value.exit_code == 3
    return message
