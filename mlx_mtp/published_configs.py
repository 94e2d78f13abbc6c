"""The ten published Gemma 4 models' config.json, as far as it shapes the text model.

Sizes: transformers' own `convert_gemma4_weights.py` for E2B, E4B, 26B-A4B and 31B, and metadata of GGUF
conversions for the 12B. Made to instantiate every shape without a download.
"""

from typing import Any

from mlx_mtp.config import FULL, SLIDING

SIZES = ("e2b", "e4b", "12b", "26b-a4b", "31b")
VOCAB_SIZE = 262_144
ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "head_dim": 256,
    "global_head_dim": 512,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "rope_parameters": ROPE,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
# What distinguishes the targets' text_config, and after it the drafters' from their target's.
TARGETS: dict[str, dict[str, Any]] = {
    "e2b": {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "layer_types": ([SLIDING] * 4 + [FULL]) * 7,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "sliding_window": 512,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "max_position_embeddings": 131_072,
    },
    "e4b": {
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "layer_types": ([SLIDING] * 5 + [FULL]) * 7,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "sliding_window": 512,
        "num_kv_shared_layers": 18,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "max_position_embeddings": 131_072,
    },
    "12b": {
        "hidden_size": 3840,
        "intermediate_size": 15_360,
        "layer_types": ([SLIDING] * 5 + [FULL]) * 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 1,
        "sliding_window": 1024,
        "max_position_embeddings": 262_144,
    },
    "26b-a4b": {
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "layer_types": ([SLIDING] * 5 + [FULL]) * 5,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "sliding_window": 1024,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "hidden_size_per_layer_input": 0,
        "max_position_embeddings": 262_144,
    },
    "31b": {
        "hidden_size": 5376,
        "intermediate_size": 21_504,
        "layer_types": ([SLIDING] * 5 + [FULL]) * 10,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "sliding_window": 1024,
        "hidden_size_per_layer_input": 0,
        "max_position_embeddings": 262_144,
    },
}
DRAFTERS: dict[str, dict[str, Any]] = {
    "e2b": {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4},
    "e4b": {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4},
    "12b": {"hidden_size": 1024, "intermediate_size": 8192, "num_attention_heads": 16},
    "26b-a4b": {"hidden_size": 1024, "intermediate_size": 8192, "num_attention_heads": 16},
    "31b": {"hidden_size": 1024, "intermediate_size": 8192, "num_attention_heads": 32},
}


def published_target(size: str) -> dict[str, Any]:
    """The config.json of one of `SIZES`, nested as published."""
    own, unified = TARGETS[size], size == "12b"
    text = {
        **COMMON,
        **own,
        "model_type": "gemma4_unified_text" if unified else "gemma4_text",
        "num_hidden_layers": len(own["layer_types"]),
        "attention_k_eq_v": "num_global_key_value_heads" in own,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": None if size in ("e2b", "e4b") else "vision",
    }
    kind = "gemma4_unified" if unified else "gemma4"
    return {"model_type": kind, "text_config": text, "eos_token_id": [1, 106], "tie_word_embeddings": True}


def published_drafter(size: str) -> dict[str, Any]:
    """The config.json of the drafter for one of `SIZES`."""
    target, unified, ordered = published_target(size), size == "12b", size in ("e2b", "e4b")
    text = {
        **target["text_config"],
        **DRAFTERS[size],
        "layer_types": [SLIDING] * 3 + [FULL],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 4,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
        "final_logit_softcapping": None,
    }
    return {
        "model_type": "gemma4_unified_assistant" if unified else "gemma4_assistant",
        "text_config": text,
        "backbone_hidden_size": TARGETS[size]["hidden_size"],
        "use_ordered_embeddings": ordered,
        "num_centroids": 2048,
        "centroid_intermediate_top_k": 32,
        "tie_word_embeddings": True,
    }
