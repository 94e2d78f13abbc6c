"""The Gemma 4 text model: token ids and K/V in, post-norm hidden rows and logits out."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.config import TargetConfig, TextConfig
from mlx_mtp.kernels.table import STOCK, Kernels
from mlx_mtp.layers import Layer, Rope, Tensors, make_layer, make_ropes, rms_norm
from mlx_mtp.weights import Weight, load_weights


@dataclass(frozen=True, slots=True)
class PerLayerEmbedding:
    """E2B and E4B: a second table that gives every layer its own embedding of each token."""

    table: Weight
    projection: Weight
    norm: mx.array
    dim: int


@dataclass(frozen=True, slots=True)
class Target:
    """A Gemma 4 target ready to run; layers, ropes and tables are immutable."""

    config: TargetConfig
    embedding: Weight
    embed_scale: mx.array
    per_layer: PerLayerEmbedding | None
    layers: tuple[Layer, ...]
    norm: mx.array
    ropes: dict[str, Rope]
    dtype: mx.Dtype
    kernels: Kernels = STOCK  # of passes over the rows of a round
    prefill_kernels: Kernels = STOCK  # of chunks, whose many rows stock operations are made for

    @property
    def text(self) -> TextConfig:
        return self.config.text


def make_target(config: TargetConfig, tensors: Tensors) -> Target:
    """Assemble a target from canonically named tensors (see `checkpoint.read_target`), evaluated."""
    load_weights(tensors)
    text = config.text
    dtype = tensors["norm"].dtype
    # transformers keeps the scale as a tensor in the weights' dtype: sqrt(1536) is 39.25 in bfloat16.
    embed_scale = mx.array(text.hidden_size**0.5, dtype)
    mx.eval(embed_scale)
    per_layer = None
    if text.per_layer_input_dim:
        per_layer = PerLayerEmbedding(
            tensors["embed_tokens_per_layer"],
            tensors["per_layer_model_projection"],
            tensors["per_layer_projection_norm"],
            text.per_layer_input_dim,
        )
    return Target(
        config=config,
        embedding=tensors["embed_tokens"],
        embed_scale=embed_scale,
        per_layer=per_layer,
        layers=tuple(make_layer(text, tensors, i) for i in range(text.num_layers)),
        norm=tensors["norm"],
        ropes=make_ropes(text),
        dtype=dtype,
    )


def embed(target: Target, ids: mx.array) -> mx.array:
    """ids [B, M] -> scaled embeddings [B, M, H]; what the target's first layer and the drafter both take."""
    return target.embedding.rows(ids).astype(target.dtype) * target.embed_scale


def per_layer_inputs(target: Target, ids: mx.array, embedded: mx.array, kernels: Kernels) -> mx.array | None:
    """ids [B, M], embedded [B, M, H] -> [B, M, layers, d], or None for targets without per-layer embeddings."""
    per_layer = target.per_layer
    if per_layer is None:
        return None
    shape = (*ids.shape, target.text.num_layers, per_layer.dim)
    by_token = (per_layer.table.rows(ids).astype(target.dtype) * per_layer.dim**0.5).reshape(shape)
    by_context = (kernels.project(per_layer.projection, embedded) * target.text.hidden_size**-0.5).reshape(
        shape
    )
    by_context = rms_norm(by_context, per_layer.norm, target.text.rms_norm_eps)
    return (by_context + by_token) * 2.0**-0.5


def final_norm(target: Target, x: mx.array) -> mx.array:
    """The last layer's output [B, M, H] -> post-norm hidden rows, which the head and the drafter read."""
    return rms_norm(x, target.norm, target.text.rms_norm_eps)


def logits_of(target: Target, hidden: mx.array) -> mx.array:
    """Post-norm hidden [B, M, H] -> softcapped logits [B, M, V] in the model's dtype."""
    logits = target.kernels.project(target.embedding, hidden)
    cap = target.text.final_logit_softcapping
    return logits if cap is None else mx.tanh(logits / cap) * cap
