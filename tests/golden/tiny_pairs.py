"""Tiny random Gemma 4 targets and drafters in every published shape, built with transformers and torch.

Every size is small; every gain, scalar and table is random, so that a port that drops or misorders one cannot
pass. The target stays random; the drafter is fitted for a few hundred steps to the target's own greedy text,
so that the goldens hold full, partial and no acceptance.
"""

from dataclasses import dataclass

import torch
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Gemma4UnifiedAssistantConfig,
    Gemma4UnifiedAssistantForCausalLM,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedTextConfig,
    set_seed,
)

WINDOW = 16
VOCAB = 256
DRAFTS = 4
S, F = "sliding_attention", "full_attention"
PROMPTS = (("short", 7, 48), ("long", 45, 48))  # name, prompt tokens, new tokens: both pass three windows

ROPE = {
    F: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    S: {"rope_type": "default", "rope_theta": 10_000.0},
}
COMMON = {
    "vocab_size": VOCAB,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": None,
    "attention_k_eq_v": False,
    "sliding_window": WINDOW,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "use_double_wide_mlp": False,
    "rope_parameters": ROPE,
}
NO_PLE = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCAB}
PLE = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
LARGE = {  # 12B, 26B-A4B, 31B: V is the raw K on full layers, nothing shared
    "hidden_size": 64,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "num_attention_heads": 4,
    "attention_k_eq_v": True,
    "num_kv_shared_layers": 0,
    "use_bidirectional_attention": "vision",
}
SMALL = dict(hidden_size=48, intermediate_size=96, num_attention_heads=4, **PLE)  # E2B, E4B
DENSE_HEAD = {"use_ordered_embeddings": False}
CENTROIDS = {"use_ordered_embeddings": True, "num_centroids": 32, "centroid_intermediate_top_k": 12}


@dataclass(frozen=True)
class Variant:
    """One published size in miniature; `fit_steps` were chosen so that acceptance is mixed."""

    target: dict
    head: dict
    fit_steps: int
    unified: bool = False
    seed: int = 1  # of the target; chosen so that its greedy text does not fall into a loop


VARIANTS = {
    # per-layer embeddings, a K/V-sharing tail twice as wide, a centroid head
    "e2b": Variant(
        SMALL
        | {"num_hidden_layers": 10, "layer_types": [S, S, S, S, F] * 2, "num_key_value_heads": 1}
        | {"num_kv_shared_layers": 5, "use_double_wide_mlp": True},
        CENTROIDS,
        fit_steps=700,
    ),
    # as E2B with two K/V heads, five sliding layers to a full one and an ordinary MLP throughout
    "e4b": Variant(
        SMALL
        | {"num_hidden_layers": 12, "layer_types": ([S] * 5 + [F]) * 2, "num_key_value_heads": 2}
        | {"num_kv_shared_layers": 6},
        CENTROIDS,
        fit_steps=700,
    ),
    # the encoder-free size: dense, four K/V heads on sliding layers and one on full ones
    "12b": Variant(
        LARGE
        | {"intermediate_size": 96, "num_hidden_layers": 12, "layer_types": ([S] * 5 + [F]) * 2}
        | {"num_attention_heads": 8, "num_key_value_heads": 4},
        DENSE_HEAD,
        fit_steps=250,
        unified=True,
        seed=2,
    ),
    # experts beside a dense MLP
    "a4b": Variant(
        LARGE
        | NO_PLE
        | {"intermediate_size": 48, "num_hidden_layers": 6, "layer_types": [S] * 5 + [F]}
        | {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 24},
        DENSE_HEAD,
        fit_steps=400,
    ),
    "31b": Variant(
        LARGE
        | NO_PLE
        | {"intermediate_size": 128, "num_hidden_layers": 12, "layer_types": ([S] * 5 + [F]) * 2},
        DENSE_HEAD,
        fit_steps=450,
    ),
}


def restore_kv_sharing_modes() -> None:
    """Give transformers 5.23.0 back the rule of 5.22.2 for which layer stores and which reuses K/V.

    5.23.0 raises when every layer is shared, as in every assistant, and stores nothing when none is, as in
    12B, 26B-A4B and 31B: no MTP pair of Gemma 4 runs. The rule before: layers from the first shared one on
    reuse, and the last layer of each type before it stores.
    """

    def modes(config) -> list[str | None]:
        first_shared = config.num_hidden_layers - config.num_kv_shared_layers
        out = [None if i < first_shared else "reuse" for i in range(config.num_hidden_layers)]
        for kind in set(config.layer_types):
            own = [i for i in range(first_shared) if config.layer_types[i] == kind]
            if own:
                out[own[-1]] = "store"
        return out

    for config_class in (Gemma4TextConfig, Gemma4UnifiedTextConfig):
        config_class.kv_sharing_modes = property(modes)


def target_settings(name: str) -> dict:
    return COMMON | {"final_logit_softcapping": 30.0} | VARIANTS[name].target


def drafter_settings(name: str) -> dict:
    """Four K/V-less layers whose head counts are the target's."""
    target = target_settings(name)
    copied = ("num_attention_heads", "num_key_value_heads", "num_global_key_value_heads", "attention_k_eq_v")
    settings = COMMON | {key: target[key] for key in copied}
    settings |= {"num_hidden_layers": 4, "layer_types": [S, S, S, F], "num_kv_shared_layers": 4}
    settings |= {"hidden_size": 32, "intermediate_size": 64, "final_logit_softcapping": None}
    if not VARIANTS[name].unified:
        settings |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
        settings |= {"enable_moe_block": False}
    return settings


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every tensor a value that matters: matrices scaled by fan-in, gains and scalars away from 1."""
    generator = torch.Generator().manual_seed(seed)
    seen = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.data_ptr() in seen or "inv_freq" in name or name.endswith("embed_scale"):
            continue
        seen.add(tensor.data_ptr())
        if name.endswith("token_ordering"):
            tensor.copy_(torch.randperm(tensor.numel(), generator=generator))
        elif name.endswith("layer_scalar"):
            tensor.copy_(0.8 + 0.15 * torch.rand(tensor.shape, generator=generator))
        else:
            noise = torch.randn(tensor.shape, generator=generator)
            fan_in = tensor.shape[-1] ** 0.5
            if "embed_tokens" in name or name == "lm_head.weight":
                tensor.copy_(noise * (2.0 / fan_in))
            elif name.endswith(("router.scale", "per_expert_scale")) or tensor.ndim == 1:
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(noise / fan_in)


def build(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Target and drafter in float32 with eager attention, random and not yet fitted."""
    unified = VARIANTS[name].unified
    text_config = Gemma4UnifiedTextConfig if unified else Gemma4TextConfig
    target_class = Gemma4UnifiedForCausalLM if unified else Gemma4ForCausalLM
    drafter_config = Gemma4UnifiedAssistantConfig if unified else Gemma4AssistantConfig
    drafter_class = Gemma4UnifiedAssistantForCausalLM if unified else Gemma4AssistantForCausalLM
    target_size = target_settings(name)
    set_seed(0)
    target = target_class._from_config(text_config(**target_size), attn_implementation="eager").float().eval()
    randomise(target, VARIANTS[name].seed)
    assistant = drafter_config(
        text_config=text_config(**drafter_settings(name)),
        backbone_hidden_size=target_size["hidden_size"],
        **VARIANTS[name].head,
    )
    drafter = drafter_class._from_config(assistant, attn_implementation="eager").float().eval()
    randomise(drafter, seed=2)
    return target, drafter


def prompts() -> list[tuple[str, torch.Tensor, int]]:
    """(name, ids [1, L], new tokens): random ids after <bos>."""
    generator = torch.Generator().manual_seed(11)
    out = []
    for name, length, new_tokens in PROMPTS:
        ids = torch.randint(3, VOCAB, (1, length), generator=generator)
        ids[0, 0] = 2
        out.append((name, ids, new_tokens))
    return out


def visible_rows(shared: dict, position: int) -> dict:
    """What a drafter at `position` may see: committed rows only, of sliding layers the last W."""
    first = {S: max(0, position - WINDOW), F: 0}
    return {kind: tuple(rows[:, :, first[kind] : position] for rows in kv) for kind, kv in shared.items()}
