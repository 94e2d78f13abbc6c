"""config.json -> TargetConfig or DrafterConfig: nested and flat files, old and re-saved field names."""

from typing import Any

from mlx_mtp.config import FULL, SLIDING, DrafterConfig, TargetConfig, TextConfig
from mlx_mtp.config_fields import Fields, shown
from mlx_mtp.errors import CheckpointError, PairError

NESTED_TARGETS = ("gemma4", "gemma4_unified")
FLAT_TARGETS = ("gemma4_text", "gemma4_unified_text")
DRAFTERS = ("gemma4_assistant", "gemma4_unified_assistant")
PLAIN_GEMMAS = ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text")
# Sizes that weights do not pin down, bounded far above the published ones so that no config.json asks for terabytes.
LARGEST_WINDOW = 1 << 16
LARGEST_CONTEXT = 1 << 24
LARGEST_HEAD = 1 << 13
SUPPORTED = ", ".join((*NESTED_TARGETS, *FLAT_TARGETS, *DRAFTERS))


def parse_target_config(raw: dict[str, Any], source: str) -> TargetConfig:
    """Read a target's config.json, given as a dict; `source` names it in errors.

    Raises CheckpointError for a field that is wrong or unsupported, PairError where it is a drafter's.
    """
    fields = top_fields(raw, source)
    kind = fields.get("model_type")
    if kind in DRAFTERS:
        raise PairError(
            f"{source}: a target was expected, but this is a drafter ({kind}); "
            "give the Gemma 4 model as target and this one as drafter"
        )
    if kind not in NESTED_TARGETS and kind not in FLAT_TARGETS:
        raise unknown_type(source, kind)
    nested = kind in NESTED_TARGETS
    text_fields = text_section(fields) if nested else fields
    vocab_size = shared_vocab_size(fields, text_fields)
    eos = fields.token_ids("eos_token_id", vocab_size) + text_fields.token_ids("eos_token_id", vocab_size)
    return TargetConfig(
        text=parse_text(text_fields, vocab_size, is_drafter=False),
        model_type=kind,
        eos_token_ids=tuple(dict.fromkeys(eos)) or (1,),
        multimodal=nested,
    )


def parse_drafter_config(raw: dict[str, Any], source: str) -> DrafterConfig:
    """Read a drafter's config.json, given as a dict; `source` names it in errors.

    Raises CheckpointError for a field that is wrong or unsupported, PairError where it is not a drafter's.
    """
    fields = top_fields(raw, source)
    kind = fields.get("model_type")
    if kind in NESTED_TARGETS or kind in FLAT_TARGETS:
        raise PairError(
            f"{source}: a drafter was expected, but this is a target ({kind}); "
            "give the model published beside it with the ending '-assistant'"
        )
    if kind in PLAIN_GEMMAS:
        raise PairError(
            f"{source}: a drafter must be a Gemma 4 assistant that reads the target's K/V, but this is an "
            f"ordinary model ({kind}); give the target's own '-assistant' model"
        )
    if kind not in DRAFTERS:
        raise unknown_type(source, kind)
    text_fields = text_section(fields)
    vocab_size = shared_vocab_size(fields, text_fields)
    num_centroids, top_k = parse_centroids(fields, vocab_size)
    return DrafterConfig(
        text=parse_text(text_fields, vocab_size, is_drafter=True),
        model_type=kind,
        backbone_hidden_size=fields.integer("backbone_hidden_size"),
        num_centroids=num_centroids,
        centroid_top_k=top_k,
    )


def top_fields(raw: object, source: str) -> Fields:
    """The whole file as fields; no code from a model folder is ever run."""
    if not isinstance(raw, dict):
        raise CheckpointError(
            f"{source}: must hold a JSON object, got {shown(raw)}; download the model again"
        )
    for name in ("auto_map", "model_file"):
        if raw.get(name) is not None:
            raise CheckpointError(
                f"{source}: models that bring their own code are refused, got {name} = {shown(raw[name])}; "
                "use the published model, or remove the entry if the weights need no code"
            )
    return Fields(raw, source)


def unknown_type(source: str, kind: object) -> CheckpointError:
    return CheckpointError(
        f"{source}: model_type must be one of {SUPPORTED}, got {shown(kind)}; use a Gemma 4 model"
    )


def text_section(fields: Fields) -> Fields:
    if not fields.get("text_config"):
        raise fields.refuse("text_config", "an object with the text model's sizes", fields.get("text_config"))
    text_fields = fields.section("text_config")
    text_fields.only("model_type", (None, *FLAT_TARGETS), None)
    return text_fields


def shared_vocab_size(fields: Fields, text_fields: Fields) -> int:
    """vocab_size from the text section or the top level, which must agree where both have it."""
    top = fields.get("vocab_size")
    size = text_fields.integer("vocab_size", 262_144 if top is None else top)
    if top is not None and top != size:
        raise fields.refuse("vocab_size", f"the same as text_config's {size}", top)
    return size


def parse_text(fields: Fields, vocab_size: int, *, is_drafter: bool) -> TextConfig:
    """The transformer itself; absent fields take transformers' defaults for `gemma4_text`."""
    refuse_unsupported(fields)
    layer_types = parse_layer_types(fields)
    head_dims, kv_heads = parse_head_shapes(fields, layer_types)
    per_layer_dim, per_layer_vocab = parse_per_layer_inputs(fields, is_drafter)
    experts, experts_per_token, expert_size = parse_experts(fields, is_drafter)
    theta, partial = parse_rope(fields)
    softcap = fields.get("final_logit_softcapping")
    text = TextConfig(
        vocab_size=vocab_size,
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        layer_types=layer_types,
        num_heads=fields.integer("num_attention_heads"),
        num_kv_heads=kv_heads[SLIDING],
        num_global_kv_heads=kv_heads[FULL],
        head_dim=head_dims[SLIDING],
        global_head_dim=head_dims[FULL],
        sliding_window=fields.integer("sliding_window", 512, high=LARGEST_WINDOW),
        num_kv_shared_layers=parse_shared_layers(fields, layer_types, is_drafter),
        max_position_embeddings=fields.integer("max_position_embeddings", 131_072, high=LARGEST_CONTEXT),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, high=1.0),
        sliding_rope_theta=theta[SLIDING],
        full_rope_theta=theta[FULL],
        partial_rotary_factor=partial,
        attention_k_eq_v=fields.flag("attention_k_eq_v", False),
        use_double_wide_mlp=fields.flag("use_double_wide_mlp", False),
        # The reference never caps a drafter's logits, whatever its config says.
        final_logit_softcapping=None
        if is_drafter or softcap is None
        else fields.number("final_logit_softcapping", 30.0),
        per_layer_input_dim=per_layer_dim,
        per_layer_vocab_size=per_layer_vocab,
        num_experts=experts,
        num_experts_per_token=experts_per_token,
        moe_intermediate_size=expert_size,
    )
    check_heads(fields, text)
    if is_drafter and text.use_double_wide_mlp:
        raise fields.refuse("use_double_wide_mlp", "false in a drafter", True)
    return text


def refuse_unsupported(fields: Fields) -> None:
    """Settings that no published Gemma 4 uses and that would change the arithmetic."""
    fields.only("hidden_activation", ("gelu_pytorch_tanh", None), None)
    fields.only("attention_bias", (False, None), None)
    fields.only("tie_word_embeddings", (True, None), None)
    fields.only("use_bidirectional_attention", (None, "vision"), None)


def parse_layer_types(fields: Fields) -> tuple[str, ...]:
    count = fields.integer("num_hidden_layers", high=1000)
    pattern = [SLIDING if (i + 1) % 6 else FULL for i in range(count - 1)] + [FULL]
    kinds = fields.get("layer_types", pattern)
    if not isinstance(kinds, list) or any(kind not in (SLIDING, FULL) for kind in kinds):
        raise fields.refuse("layer_types", f"a list of '{SLIDING}' and '{FULL}'", kinds)
    if len(kinds) != count:
        raise fields.refuse("layer_types", f"num_hidden_layers = {count} long", f"{len(kinds)} entries")
    if kinds[-1] != FULL:
        raise fields.refuse("layer_types", f"a list that ends in '{FULL}'", kinds[-1])
    return tuple(kinds)


def parse_head_shapes(fields: Fields, layer_types: tuple[str, ...]) -> tuple[dict[str, int], dict[str, int]]:
    """Head size and K/V heads of each attention type, from either form transformers writes."""
    head_dims = dict.fromkeys((SLIDING, FULL), fields.integer("head_dim", 256, high=LARGEST_HEAD))
    kv_heads = dict.fromkeys((SLIDING, FULL), fields.integer("num_key_value_heads"))
    if fields.get("per_layer_config") is not None:
        overrides = read_per_layer_config(fields, layer_types)
        for kind, layer in {kind: i for i, kind in enumerate(layer_types)}.items():
            entry = overrides.get(layer)
            if entry is not None:
                head_dims[kind] = entry.integer("head_dim", head_dims[kind], high=LARGEST_HEAD)
                kv_heads[kind] = entry.integer("num_key_value_heads", kv_heads[kind])
        return head_dims, kv_heads
    head_dims[FULL] = fields.integer("global_head_dim", 512, high=LARGEST_HEAD)
    if fields.flag("attention_k_eq_v", False):  # only then does the reference look at the global count
        kv_heads[FULL] = fields.integer("num_global_key_value_heads", kv_heads[FULL])
    return head_dims, kv_heads


def read_per_layer_config(fields: Fields, layer_types: tuple[str, ...]) -> dict[int, Fields]:
    """Overrides by layer; layers of one attention type must all have the same ones."""
    section = fields.section("per_layer_config")
    overrides = {}
    for key in section.raw:
        if not key.isdecimal() or int(key) >= len(layer_types):
            raise section.refuse("every key", f"a layer from 0 to {len(layer_types) - 1}", key)
        overrides[int(key)] = section.section(key)
        unknown = set(overrides[int(key)].raw) - {"head_dim", "num_key_value_heads"}
        if unknown:
            rule = "an override of head_dim or num_key_value_heads"
            raise section.refuse(f"layer {key}", rule, sorted(unknown))
    for kind in set(layer_types):
        entries = [overrides[i].raw if i in overrides else {} for i, k in enumerate(layer_types) if k == kind]
        if any(entry != entries[0] for entry in entries):
            raise section.refuse(f"every {kind} layer", "overridden alike", "layers that differ")
    return overrides


def parse_shared_layers(fields: Fields, layer_types: tuple[str, ...], is_drafter: bool) -> int:
    """How many layers at the end own no K/V; all of them in a drafter, where 0 also means all."""
    count = fields.integer("num_kv_shared_layers", 0, low=0, high=len(layer_types))
    if is_drafter:
        if count not in (0, len(layer_types)):
            raise fields.refuse("num_kv_shared_layers", f"all {len(layer_types)} layers in a drafter", count)
        return len(layer_types)
    first_shared = len(layer_types) - count
    orphans = set(layer_types[first_shared:]) - set(layer_types[:first_shared])
    if orphans:
        rule = f"such that a layer with K/V feeds the shared {sorted(orphans)}"
        raise fields.refuse("num_kv_shared_layers", rule, count)
    return count


def parse_per_layer_inputs(fields: Fields, is_drafter: bool) -> tuple[int, int]:
    """Per-layer embedding width and vocabulary; (0, 0) without them."""
    unified = fields.get("model_type") == "gemma4_unified_text"
    absent = 0 if is_drafter or unified else 256
    width = fields.integer("hidden_size_per_layer_input", absent, low=0)
    if is_drafter and width:
        raise fields.refuse("hidden_size_per_layer_input", "0 in a drafter", width)
    return (width, fields.integer("vocab_size_per_layer_input", 262_144)) if width else (0, 0)


def parse_experts(fields: Fields, is_drafter: bool) -> tuple[int, int, int]:
    """Experts, experts a token, expert width; zeros for a dense model."""
    if not fields.flag("enable_moe_block", False):
        return 0, 0, 0
    if is_drafter:
        raise fields.refuse("enable_moe_block", "false in a drafter", True)
    count = fields.integer("num_experts")
    return count, fields.integer("top_k_experts", high=count), fields.integer("moe_intermediate_size")


def parse_rope(fields: Fields) -> tuple[dict[str, float], float]:
    """Base frequency of each attention type, and the share of a full layer's head that rotates."""
    section = fields.section("rope_parameters")
    sliding, full = section.section(SLIDING), section.section(FULL)
    sliding.only("rope_type", ("default", None), None)
    full.only("rope_type", ("proportional", None), None)
    for part in (sliding, full):
        part.only("factor", (1.0, None), None)
    theta = {
        SLIDING: sliding.number("rope_theta", 10_000.0),
        FULL: full.number("rope_theta", 1_000_000.0),
    }
    sliding.only("partial_rotary_factor", (1.0, None), None)
    return theta, full.number("partial_rotary_factor", 0.25, high=1.0)


def parse_centroids(fields: Fields, vocab_size: int) -> tuple[int, int]:
    """Centroids and how many are searched; (0, 0) for a head over the whole vocabulary."""
    if not fields.flag("use_ordered_embeddings", False):
        return 0, 0
    count = fields.integer("num_centroids", 2048)
    if vocab_size % count:
        raise fields.refuse("num_centroids", f"a divisor of the vocabulary's {vocab_size} tokens", count)
    return count, fields.integer("centroid_intermediate_top_k", 32, high=count)


def check_heads(fields: Fields, text: TextConfig) -> None:
    for kind in set(text.layer_types):
        if text.num_heads % text.kv_heads_of(kind):
            got = f"{text.num_heads} heads over {text.kv_heads_of(kind)} K/V heads in {kind} layers"
            raise fields.refuse("num_attention_heads", "a multiple of the K/V heads", got)
        if text.head_dim_of(kind) % 2:
            raise fields.refuse("head_dim", "even, for rotary positions", text.head_dim_of(kind))
