"""What a target and a drafter look like: frozen, parsed from both published forms of config.json."""

from dataclasses import dataclass

SLIDING = "sliding_attention"
FULL = "full_attention"


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The transformer that target and drafter share (transformers' `gemma4_text`); sizes in elements."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: tuple[str, ...]
    num_heads: int
    num_kv_heads: int
    num_global_kv_heads: int
    head_dim: int
    global_head_dim: int
    sliding_window: int
    num_kv_shared_layers: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    sliding_rope_theta: float = 10_000.0
    full_rope_theta: float = 1_000_000.0
    partial_rotary_factor: float = 0.25
    attention_k_eq_v: bool = False
    use_double_wide_mlp: bool = False
    final_logit_softcapping: float | None = None
    per_layer_input_dim: int = 0
    per_layer_vocab_size: int = 0
    num_experts: int = 0
    num_experts_per_token: int = 0
    moe_intermediate_size: int = 0

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def first_shared_layer(self) -> int:
        """Layers from this index on own no K/V projections and read an earlier layer's."""
        return self.num_layers - self.num_kv_shared_layers

    @property
    def kv_source(self) -> tuple[int, ...]:
        """For each layer of a target, the index of the layer whose K/V it reads."""
        last_own = self.feeding_layers
        return tuple(
            i if i < self.first_shared_layer else last_own[kind] for i, kind in enumerate(self.layer_types)
        )

    @property
    def feeding_layers(self) -> dict[str, int]:
        """The last K/V-owning layer of each attention type: what shared layers and the drafter read."""
        return {kind: i for i, kind in enumerate(self.layer_types[: self.first_shared_layer])}

    def head_dim_of(self, kind: str) -> int:
        return self.global_head_dim if kind == FULL else self.head_dim

    def kv_heads_of(self, kind: str) -> int:
        return self.num_global_kv_heads if kind == FULL else self.num_kv_heads

    def shares_k_as_v(self, kind: str) -> bool:
        """Full layers of 12B, 26B-A4B and 31B have no v_proj: V is the raw K projection."""
        return self.attention_k_eq_v and kind == FULL

    def mlp_size_of(self, layer: int) -> int:
        doubled = self.use_double_wide_mlp and layer >= self.first_shared_layer
        return self.intermediate_size * (2 if doubled else 1)


@dataclass(frozen=True, slots=True)
class TargetConfig:
    """A published Gemma 4 target, text part only."""

    text: TextConfig
    model_type: str
    eos_token_ids: tuple[int, ...]
    multimodal: bool


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """A `gemma4_assistant`: four K/V-less layers between two projections from and to the target's width."""

    text: TextConfig
    model_type: str
    backbone_hidden_size: int
    num_centroids: int  # 0: dense head over the whole vocabulary
    centroid_top_k: int
