"""What a checkpoint must hold, under one set of names, and how each published naming maps onto it."""

import math
import re

from mlx_mtp.config import DrafterConfig, TargetConfig, TextConfig

PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
OTHER_TOWERS = (
    "vision_tower.",
    "audio_tower.",
    "embed_vision.",
    "embed_audio.",
    "vision_embedder.",
    "audio_embedder.",
    "multi_modal_projector.",
)
BUFFERS = ("rotary_emb.", "input_max", "input_min", "output_max", "output_min")
PARTS = ("weight", "scales", "biases", "global_scale")
KV_OF_LAYER = re.compile(r"layers\.(\d+)\.self_attn\.(?:k_proj|v_proj|k_norm)$")
LAYER_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
MOE_NORMS = ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2")


def expected_tensors(config: TargetConfig | DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor the model needs; a matrix is [N, K], experts [E, N, K]."""
    text = config.text
    tensors: dict[str, tuple[int, ...]] = {"embed_tokens": (text.vocab_size, text.hidden_size)}
    if isinstance(config, DrafterConfig):
        tensors["pre_projection"] = (text.hidden_size, 2 * config.backbone_hidden_size)
        tensors["post_projection"] = (config.backbone_hidden_size, text.hidden_size)
        if config.num_centroids:
            tensors["masked_embedding.centroids"] = (config.num_centroids, text.hidden_size)
            tensors["masked_embedding.token_ordering"] = (text.vocab_size,)
    if text.per_layer_input_dim:
        width = text.num_layers * text.per_layer_input_dim
        tensors["embed_tokens_per_layer"] = (text.per_layer_vocab_size, width)
        tensors["per_layer_model_projection"] = (width, text.hidden_size)
        tensors["per_layer_projection_norm"] = (text.per_layer_input_dim,)
    for layer in range(text.num_layers):
        for name, shape in layer_tensors(text, layer).items():
            tensors[f"layers.{layer}.{name}"] = shape
    tensors["norm"] = (text.hidden_size,)
    return tensors


def layer_tensors(text: TextConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Name within the layer -> shape."""
    hidden, mlp = text.hidden_size, text.mlp_size_of(layer)
    tensors: dict[str, tuple[int, ...]] = dict.fromkeys(LAYER_NORMS, (hidden,))
    tensors |= attention_tensors(text, layer)
    tensors |= {
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
        "layer_scalar": (1,),
    }
    if text.per_layer_input_dim:
        tensors["per_layer_input_gate"] = (text.per_layer_input_dim, hidden)
        tensors["per_layer_projection"] = (hidden, text.per_layer_input_dim)
        tensors["post_per_layer_input_norm"] = (hidden,)
    if text.num_experts:
        experts, width = text.num_experts, text.moe_intermediate_size
        tensors |= dict.fromkeys(MOE_NORMS, (hidden,))
        tensors["router.proj"] = (experts, hidden)
        tensors["router.scale"] = (hidden,)
        tensors["router.per_expert_scale"] = (experts,)
        tensors["experts.gate_proj"] = (experts, width, hidden)
        tensors["experts.up_proj"] = (experts, width, hidden)
        tensors["experts.down_proj"] = (experts, hidden, width)
    return tensors


def attention_tensors(text: TextConfig, layer: int) -> dict[str, tuple[int, ...]]:
    kind = text.layer_types[layer]
    head, hidden = text.head_dim_of(kind), text.hidden_size
    queries, keys = text.num_heads * head, text.kv_heads_of(kind) * head
    tensors: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.q_norm": (head,),
        "self_attn.o_proj": (hidden, queries),
    }
    if layer < text.first_shared_layer:
        tensors["self_attn.k_proj"] = (keys, hidden)
        tensors["self_attn.k_norm"] = (head,)
        if not text.shares_k_as_v(kind):
            tensors["self_attn.v_proj"] = (keys, hidden)
    return tensors


def parameter_count(config: TargetConfig | DrafterConfig) -> int:
    """Numbers in all the tensors the model needs; the token ordering is a table of ids, not counted."""
    return sum(
        math.prod(shape)
        for name, shape in expected_tensors(config).items()
        if name != "masked_embedding.token_ordering"
    )


def canonical_path(name: str) -> str:
    """A module path without the wrapper's prefix, and experts without MLX's `switch_glu`."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    return name.replace(".experts.switch_glu.", ".experts.")


def canonical_name(name: str) -> tuple[str, str] | None:
    """A tensor's name in a file -> (canonical name, part); None for towers and buffers that are not used."""
    bare = name.removeprefix("model.")
    if bare.startswith(OTHER_TOWERS) or any(buffer in name for buffer in BUFFERS):
        return None
    path = canonical_path(name)
    stem, _, last = path.rpartition(".")
    return (stem, last) if stem and last in PARTS else (path, "weight")


def is_shared_kv(name: str, text: TextConfig) -> bool:
    """Whether `name` is K/V of a layer that reads another's: older checkpoints still have those."""
    match = KV_OF_LAYER.search(name)
    return match is not None and text.first_shared_layer <= int(match[1]) < text.num_layers
