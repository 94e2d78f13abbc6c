"""Whether a drafter belongs to a target: it reads that target's hidden rows and K/V as they are."""

from mlx_mtp.config import FULL, SLIDING, DrafterConfig, TargetConfig
from mlx_mtp.errors import PairError

# The targets' hidden sizes name them: each drafter was published for one.
PUBLISHED_SIZES = {1536: "E2B", 2560: "E4B", 3840: "12B", 2816: "26B-A4B", 5376: "31B"}


def check_pair(target: TargetConfig, drafter: DrafterConfig) -> None:
    """Raise PairError unless every size that the drafter shares with the target agrees."""
    text, draft = target.text, drafter.text
    remedy = drafter_for(text.hidden_size)
    must_agree("hidden size (backbone_hidden_size)", drafter.backbone_hidden_size, text.hidden_size, remedy)
    must_agree("vocabulary", draft.vocab_size, text.vocab_size, remedy)
    feeding = text.feeding_layers
    kinds = dict.fromkeys(draft.layer_types)
    for kind in kinds:
        if kind not in feeding:
            raise PairError(
                f"the drafter reads K/V of a {kind} layer, and no such layer of the target owns K/V; {remedy}"
            )
        must_agree(f"{kind} head size", draft.head_dim_of(kind), text.head_dim_of(kind), remedy)
        must_agree(f"{kind} K/V heads", draft.kv_heads_of(kind), text.kv_heads_of(kind), remedy)
    if SLIDING in kinds:
        must_agree("sliding window", draft.sliding_window, text.sliding_window, remedy)
        must_agree("sliding rope_theta", draft.sliding_rope_theta, text.sliding_rope_theta, remedy)
    if FULL in kinds:
        must_agree("full rope_theta", draft.full_rope_theta, text.full_rope_theta, remedy)
        must_agree(
            "full partial_rotary_factor", draft.partial_rotary_factor, text.partial_rotary_factor, remedy
        )


def must_agree(what: str, drafter_has: float, target_has: float, remedy: str) -> None:
    if drafter_has != target_has:
        raise PairError(f"the drafter expects {what} {drafter_has}, the target has {target_has}; {remedy}")


def drafter_for(hidden_size: int) -> str:
    """Which drafter to use instead, by name where the target's size is a published one."""
    size = PUBLISHED_SIZES.get(hidden_size)
    if size is None:
        return "use the assistant published for this target"
    return f"use the assistant published for this target, google/gemma-4-{size}-it-assistant"
