"""The Gemma 4 transformer layer that target and drafter share: norms, rope, projections, MLP, experts.

Formulas: transformers 5.22.2 `modeling_gemma4.py`. Attention scale is 1.0 everywhere; q_norm and k_norm take its place.
What a kernel of ours may compute is called through `kernels` (see kernels/table.py).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from mlx_mtp.config import FULL, SLIDING, TextConfig
from mlx_mtp.weights import Weight

if TYPE_CHECKING:
    from mlx_mtp.kernels.table import Kernels, Project

Tensors = Mapping[str, Any]  # canonical name -> Weight for matrices, mx.array for the rest
OnChoice = Callable[[mx.array], None]  # is shown the expert ids [rows, top_k] that a layer's rows are sent to


@dataclass(frozen=True, slots=True)
class Experts:
    """Router and stacked expert matrices of one MoE layer (26B-A4B), beside its dense MLP."""

    router: Weight
    router_norm: mx.array  # router.scale * H^-0.5, the gain of the router's RMSNorm
    per_expert_scale: mx.array
    gate: Weight
    up: Weight
    down: Weight
    top_k: int
    pre_norm: mx.array
    post_norm: mx.array
    post_norm_of_mlp: mx.array


@dataclass(frozen=True, slots=True)
class PerLayerInput:
    """The gate through which an E-size layer takes in its per-layer embedding."""

    gate: Weight
    projection: Weight
    post_norm: mx.array


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer; `k_proj` is None where K/V come from another layer, `v_proj` where V is the raw K."""

    kind: str
    q_proj: Weight
    q_norm: mx.array
    k_proj: Weight | None
    v_proj: Weight | None
    k_norm: mx.array | None
    o_proj: Weight
    gate_proj: Weight
    up_proj: Weight
    down_proj: Weight
    input_norm: mx.array
    post_attention_norm: mx.array
    pre_feedforward_norm: mx.array
    post_feedforward_norm: mx.array
    layer_scalar: mx.array
    experts: Experts | None
    per_layer_input: PerLayerInput | None
    eps: float


class Rotation(NamedTuple):
    """Rotary embedding of certain rows, worked out once a pass and shared by all layers of one attention type."""

    cosine: mx.array  # [B, M, 1, 1, D/2], float32
    sine: mx.array  # [B, M, 1, 2, D/2], negative for the first half

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, M, heads, D] -> the same, dims j and j + D/2 rotated as a pair; in float32, one fused kernel."""
        halves = x.reshape(*x.shape[:-1], 2, -1)
        rotated = halves * self.cosine + halves[..., ::-1, :] * self.sine
        return rotated.astype(x.dtype).reshape(x.shape)  # in this order the cast is part of that kernel


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of one attention type; `frequencies` [D/2] in radians a position, 0 where a pair stays."""

    frequencies: mx.array

    def at(self, position: mx.array | int, rows: int) -> Rotation:
        """The rotation of rows at position .. position+rows-1, position [B] or an int.

        mx.fast.rope would work out angles, sines and cosines anew in each layer where it has no kernel of its own.
        """
        positions = mx.array(position, mx.int32).reshape(-1, 1)
        if rows > 1:
            positions = positions + mx.arange(rows, dtype=mx.int32)
        angles = positions[..., None, None, None] * self.frequencies
        sine = mx.sin(angles)
        return Rotation(mx.cos(angles), mx.concatenate([-sine, sine], axis=-2))


def make_ropes(config: TextConfig) -> dict[str, Rope]:
    """One Rope per attention type; full layers rotate only the first `partial_rotary_factor` of their pairs."""
    ropes = {
        SLIDING: Rope(_frequencies(config.head_dim, config.sliding_rope_theta, config.head_dim // 2)),
        FULL: Rope(
            _frequencies(
                config.global_head_dim,
                config.full_rope_theta,
                int(config.partial_rotary_factor * config.global_head_dim // 2),
            )
        ),
    }
    mx.eval([rope.frequencies for rope in ropes.values()])
    return ropes


def _frequencies(head_dim: int, theta: float, rotated: int) -> mx.array:
    """The first `rotated` of D/2 pairs turn at theta^(-2j/D), D being the whole head_dim; the others stay."""
    exponents = mx.arange(rotated, dtype=mx.float32) * (2.0 / head_dim)
    return mx.concatenate([1.0 / theta**exponents, mx.zeros((head_dim // 2 - rotated,), mx.float32)])


def make_layer(config: TextConfig, tensors: Tensors, index: int) -> Layer:
    """Gather layer `index` from canonically named tensors; the checkpoint reader has checked names and shapes."""
    prefix = f"layers.{index}."
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return Layer(
        kind=config.layer_types[index],
        q_proj=own["self_attn.q_proj"],
        q_norm=own["self_attn.q_norm"],
        k_proj=own.get("self_attn.k_proj"),
        v_proj=own.get("self_attn.v_proj"),
        k_norm=own.get("self_attn.k_norm"),
        o_proj=own["self_attn.o_proj"],
        gate_proj=own["mlp.gate_proj"],
        up_proj=own["mlp.up_proj"],
        down_proj=own["mlp.down_proj"],
        input_norm=own["input_layernorm"],
        post_attention_norm=own["post_attention_layernorm"],
        pre_feedforward_norm=own["pre_feedforward_layernorm"],
        post_feedforward_norm=own["post_feedforward_layernorm"],
        layer_scalar=own["layer_scalar"],
        experts=_make_experts(config, own) if config.num_experts else None,
        per_layer_input=_make_per_layer_input(own) if config.per_layer_input_dim else None,
        eps=config.rms_norm_eps,
    )


def _make_experts(config: TextConfig, own: Tensors) -> Experts:
    router_norm = own["router.scale"] * config.hidden_size**-0.5
    mx.eval(router_norm)
    return Experts(
        router=own["router.proj"],
        router_norm=router_norm,
        per_expert_scale=own["router.per_expert_scale"],
        gate=own["experts.gate_proj"],
        up=own["experts.up_proj"],
        down=own["experts.down_proj"],
        top_k=config.num_experts_per_token,
        pre_norm=own["pre_feedforward_layernorm_2"],
        post_norm=own["post_feedforward_layernorm_2"],
        post_norm_of_mlp=own["post_feedforward_layernorm_1"],
    )


def _make_per_layer_input(own: Tensors) -> PerLayerInput:
    return PerLayerInput(
        own["per_layer_input_gate"], own["per_layer_projection"], own["post_per_layer_input_norm"]
    )


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """x [..., D] over its last axis in float32; the gain is `weight`, not 1 + weight."""
    return mx.fast.rms_norm(x, weight, eps)


@partial(mx.compile, shapeless=True)
def gated_gelu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up with the tanh approximation, gate * (1 + tanh(u)) / 2, written as gate / (1 + exp(-2u)).

    Without a power and a tanh it takes a third of the time on a CPU; both forms differ by rounding only.
    """
    slope = -2 * (2 / math.pi) ** 0.5
    return gate / (1 + mx.exp(gate * (slope + slope * 0.044715 * gate * gate))) * up


def norm_rotate(
    raw: mx.array, gain: mx.array, rotation: Rotation, eps: float, values: mx.array | None = None
) -> tuple[mx.array, mx.array | None]:
    """raw [B, M, heads, D], gain [D] -> normed and rotated heads; values, if any, normed without a gain."""
    return rotation(rms_norm(raw, gain, eps)), None if values is None else rms_norm(values, None, eps)


def queries_of(kernels: "Kernels", layer: Layer, x: mx.array, rotation: Rotation, batch: int) -> mx.array:
    """x [B * M, H] (normed) -> queries [B, heads, M, D], rotated."""
    shape = (batch, x.shape[0] // batch, -1, layer.q_norm.shape[0])
    raw = kernels.project(layer.q_proj, x).reshape(shape)
    queries, _ = kernels.norm_rotate(raw, layer.q_norm, rotation, layer.eps)
    return queries.transpose(0, 2, 1, 3)


def keys_values_of(
    kernels: "Kernels", layer: Layer, x: mx.array, rotation: Rotation, batch: int
) -> tuple[mx.array, mx.array]:
    """x [B * M, H] (normed) -> keys, values [B, kv_heads, M, D]; keys rotated, values normed without a gain."""
    assert layer.k_proj is not None and layer.k_norm is not None, "only layers that own K/V are asked for it"
    shape = (batch, x.shape[0] // batch, -1, layer.k_norm.shape[0])
    raw_keys = kernels.project(layer.k_proj, x).reshape(shape)
    raw_values = raw_keys if layer.v_proj is None else kernels.project(layer.v_proj, x).reshape(shape)
    keys, values = kernels.norm_rotate(raw_keys, layer.k_norm, rotation, layer.eps, raw_values)
    assert values is not None, "some were given"
    return keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)


def add_norm(
    x: mx.array,
    y: mx.array,
    gain: mx.array,
    eps: float,
    *,
    scalar: mx.array | None = None,
    then: mx.array | None = None,
) -> tuple[mx.array, mx.array | None]:
    """x, y [N, H] -> (x + y normed) * scalar, and that normed with the gain `then`, if there is one."""
    total = x + rms_norm(y, gain, eps)
    total = total if scalar is None else total * scalar
    return total, None if then is None else rms_norm(total, then, eps)


def run_layer(
    kernels: "Kernels",
    layer: Layer,
    x: mx.array,
    attention: Callable[[mx.array], mx.array],
    per_layer_input: mx.array | None,
    on_choice: OnChoice | None = None,
) -> mx.array:
    """One layer on rows [N, H]; `attention` maps the normed rows to merged heads [N, heads * D].

    Rows of all batch members stand in one axis: a product of three axes is four operations for MLX, not one.
    """
    attended = kernels.project(layer.o_proj, attention(rms_norm(x, layer.input_norm, layer.eps)))
    eps, is_gated = layer.eps, layer.per_layer_input is not None
    x, normed = kernels.add_norm(x, attended, layer.post_attention_norm, eps, then=layer.pre_feedforward_norm)
    assert normed is not None, "its gain was given"
    fed = _feed_forward(kernels, layer, x, normed, on_choice)
    scalar = None if is_gated else layer.layer_scalar
    x, _ = kernels.add_norm(x, fed, layer.post_feedforward_norm, eps, scalar=scalar)
    if layer.per_layer_input is not None:
        assert per_layer_input is not None, "the layer has a gate for an embedding of its own"
        gate = gated_gelu(kernels.project(layer.per_layer_input.gate, x), per_layer_input)
        projected = kernels.project(layer.per_layer_input.projection, gate)
        x, _ = kernels.add_norm(x, projected, layer.per_layer_input.post_norm, eps, scalar=layer.layer_scalar)
    return x


def _feed_forward(
    kernels: "Kernels", layer: Layer, x: mx.array, normed: mx.array, on_choice: OnChoice | None
) -> mx.array:
    """The residual stream [N, H] and what the dense MLP takes of it -> what is added to it, not yet normed."""
    gated = gated_gelu(kernels.project(layer.gate_proj, normed), kernels.project(layer.up_proj, normed))
    dense = kernels.project(layer.down_proj, gated)
    if layer.experts is None:
        return dense
    routed = kernels.experts(layer.experts, x, layer.eps, kernels.project, on_choice)
    return kernels.add_norm(routed, dense, layer.experts.post_norm_of_mlp, layer.eps)[0]


def mixture(
    experts: Experts, x: mx.array, eps: float, project: "Project", on_choice: OnChoice | None = None
) -> mx.array:
    """x [N, H] (the residual stream itself) -> the normed, weighted sum of its top-k experts, on stock operations."""
    chosen, weights = route(experts, x, eps, project)
    if on_choice is not None:
        on_choice(chosen)
    rows = rms_norm(x, experts.pre_norm, eps)[..., None, None, :]
    gated = gated_gelu(experts.gate.project_experts(rows, chosen), experts.up.project_experts(rows, chosen))
    outputs = experts.down.project_experts(gated, chosen).squeeze(-2)
    return rms_norm((outputs * weights[..., None]).sum(-2), experts.post_norm, eps)


def route(experts: Experts, x: mx.array, eps: float, project: "Project") -> tuple[mx.array, mx.array]:
    """x [N, H] -> expert ids and their weights, both [N, top_k].

    Softmax over all experts renormalised over the best equals a softmax over the best alone; float32 as in
    transformers.
    """
    scores = project(experts.router, rms_norm(x, experts.router_norm, eps)).astype(mx.float32)
    chosen = mx.argpartition(scores, kth=-experts.top_k, axis=-1)[..., -experts.top_k :]
    weights = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1)
    return chosen, (weights * experts.per_expert_scale[chosen]).astype(x.dtype)
