"""Shapes of the demo pair and the code that builds, loads and exports it with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
)

VOCAB = 4096
WINDOW = 128
SLIDING, FULL = "sliding_attention", "full_attention"
PAD, EOS, BOS = 0, 1, 2

ROPE = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
}
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "head_dim": 64,
    "global_head_dim": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "num_global_key_value_heads": None,
    "attention_k_eq_v": False,
    "sliding_window": WINDOW,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "rope_parameters": ROPE,
}
TARGET: dict[str, Any] = dict(
    COMMON,
    hidden_size=256,
    intermediate_size=448,
    num_hidden_layers=10,
    layer_types=([SLIDING] * 4 + [FULL]) * 2,
    num_kv_shared_layers=5,
    use_double_wide_mlp=True,
    hidden_size_per_layer_input=32,
    vocab_size_per_layer_input=VOCAB,
    final_logit_softcapping=30.0,
)
DRAFTER: dict[str, Any] = dict(
    COMMON,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    layer_types=[SLIDING] * 3 + [FULL],
    num_kv_shared_layers=4,
    use_double_wide_mlp=False,
    hidden_size_per_layer_input=0,
    vocab_size_per_layer_input=0,
    final_logit_softcapping=None,
)


def _restore_kv_sharing_rule() -> None:
    """transformers 5.23.0 cannot build an assistant: `kv_sharing_modes` raises when every layer is shared.

    This is the rule of 5.22: layers from the first shared one on reuse; the last own layer of each type stores.
    """

    def modes(self: Gemma4TextConfig) -> list[str | None]:
        first = self.num_hidden_layers - self.num_kv_shared_layers
        out: list[str | None] = [None if i < first else "reuse" for i in range(self.num_hidden_layers)]
        for kind in set(self.layer_types):
            own = [i for i in range(first) if self.layer_types[i] == kind]
            if own:
                out[own[-1]] = "store"
        return out

    Gemma4TextConfig.kv_sharing_modes = property(modes)


_restore_kv_sharing_rule()


def _trainable_layer_scalars(model: torch.nn.Module) -> None:
    """`layer_scalar` is a buffer in transformers; as a parameter of the same name it is trained and saved alike."""
    for layer in model.model.layers:
        value = layer._buffers.pop("layer_scalar")
        layer.register_parameter("layer_scalar", torch.nn.Parameter(value.float()))


def _scale_qk_norms(model: torch.nn.Module) -> None:
    """Attention has scale 1.0: gains of D^-1/4 on q and k start it where D^-1/2 would."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                p.fill_(p.numel() ** -0.25)


def new_target(attention: str = "sdpa") -> Gemma4ForCausalLM:
    """A fresh float32 target."""
    model = Gemma4ForCausalLM._from_config(Gemma4TextConfig(**TARGET), attn_implementation=attention).float()
    _trainable_layer_scalars(model)
    _scale_qk_norms(model)
    return model


def new_drafter(attention: str = "eager") -> Gemma4AssistantForCausalLM:
    """A fresh float32 drafter with a dense head."""
    config = Gemma4AssistantConfig(
        text_config=Gemma4TextConfig(**DRAFTER),
        backbone_hidden_size=TARGET["hidden_size"],
        use_ordered_embeddings=False,
    )
    model = Gemma4AssistantForCausalLM._from_config(config, attn_implementation=attention).float()
    _trainable_layer_scalars(model)
    _scale_qk_norms(model)
    return model


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Load an exported (bf16) or checkpointed (float32) state dict into `model`."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = {k: v.float() for k, v in load_file(path).items()}
    else:
        state = torch.load(path, map_location="cpu", weights_only=False)["model"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [k for k in missing if k != "lm_head.weight"]
    if missing or unexpected:
        raise SystemExit(f"{path}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()


def export(model: torch.nn.Module, shape: dict[str, Any], folder: Path, generation: dict[str, Any]) -> None:
    """Write config.json, model.safetensors (bf16) and generation_config.json in the published layout."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        k: v.detach().to(torch.bfloat16).contiguous()
        for k, v in model.state_dict().items()
        if k != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = published_config(model, shape)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


UNPUBLISHED = (
    "per_layer_config",
    "_name_or_path",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "id2label",
    "label2id",
    "problem_type",
)


def published_config(model: torch.nn.Module, shape: dict[str, Any]) -> dict[str, Any]:
    """The flat form of the published configs (5.23 would write `per_layer_config` and drop `global_head_dim`)."""
    config = model.config.to_dict()
    for part in (config, config.get("text_config", {})):
        for key in UNPUBLISHED:
            part.pop(key, None)
    text = config.get("text_config", config)
    text["global_head_dim"] = shape["global_head_dim"]
    text["num_global_key_value_heads"] = shape["num_global_key_value_heads"]
    config["architectures"] = [type(model).__name__]
    config["dtype"] = text["dtype"] = "bfloat16"
    return config
