"""How many bytes each thing takes that is in memory while a model runs; the formulas are derived in docs/memory.md.

Arithmetic on configurations only: nothing is allocated and no file is read.
"""

import math
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_mtp.attention import KEY_TILE, SCORES_PER_TILE
from mlx_mtp.config import FULL, SLIDING, DrafterConfig, TargetConfig, TextConfig
from mlx_mtp.kernels.operations import AttentionShape
from mlx_mtp.kernels.verify_attention import scratch_bytes
from mlx_mtp.prefill import CHUNK
from mlx_mtp.quantization import QuantClaims, QuantFormat
from mlx_mtp.quantize_plan import CHOOSER_FORMAT, CHOOSERS
from mlx_mtp.state import bucket_for, capacity_for, kv_shapes
from mlx_mtp.tensor_names import expected_tensors
from mlx_mtp.turns import CHECKPOINT_BYTES

MIB = 2**20
TOKEN_ORDERING = "masked_embedding.token_ordering"
MLP_PARTS = (".mlp.gate_proj", ".mlp.up_proj", ".mlp.down_proj")
TOKENS_A_TURN = 256  # how often a conversation leaves a checkpoint behind
DRAFT_TOKENS = 8  # the most that num_draft_tokens="auto" plays (policy.CANDIDATES)

# How many arrays of a kind are alive at once, from measured peaks (docs/memory.md). MLX allocates ahead of what it
# computes: a hundred operations on the CPU, which is some layers' scores, or ten tiles' of a long context.
LAYERS_OF_SCORES = 4
TILES_OF_SCORES = 10
ARRAYS_OF_ROWS = 4  # rows of a chunk as wide as its widest product
ARRAYS_OF_LOGITS = 3  # [B, rows, V] float32, where sampling looks at 64 candidates at most, as Gemma's own
ARRAYS_OF_LOGITS_WIDE = 20  # the same with penalties, or with thresholds over the whole vocabulary
ARRAYS_OF_ROUND_SCORES = 2  # [B, rows, heads, bucket] float32


@dataclass(frozen=True, slots=True)
class Formats:
    """How a model's matrices are stored: what config.json claims, or `dense_bytes` a number where it claims none.

    dense_bytes: also of norms, scales and biases, and of activations; 4 where a CPU casts them to float32.
    """

    claims: QuantClaims = field(default_factory=QuantClaims)
    dense_bytes: int = 2

    def of(self, path: str, shape: tuple[int, ...]) -> QuantFormat | None:
        """The format of the matrix at `path`, None where it is dense: a width that groups do not divide stays so."""
        form = self.claims.by_path.get(path, self.claims.default)
        return None if form is None or shape[-1] % form.group_size else form


def formats_of_bits(
    bits: int, names: dict[str, tuple[int, ...]], dense_bytes: int, mlp_bits: int | None = None
) -> Formats:
    """What a conversion to `bits`, mlx-lm's or ours, makes of these tensors; `mlp_bits` where the dense MLPs differ."""
    if bits == 16:
        return Formats(dense_bytes=dense_bytes)
    by_path: dict[str, QuantFormat | None] = {
        name: CHOOSER_FORMAT for name in names if name.endswith(CHOOSERS)
    }
    if mlp_bits is not None and mlp_bits != bits:
        form = None if mlp_bits == 16 else QuantFormat(mlp_bits, 64, "affine")
        by_path |= dict.fromkeys((name for name in names if name.endswith(MLP_PARTS)), form)
    return Formats(QuantClaims(QuantFormat(bits, 64, "affine"), by_path), dense_bytes)


def weight_bytes(config: TargetConfig | DrafterConfig, formats: Formats) -> int:
    """Bytes of all tensors that the text model needs; towers for images and sound are never loaded."""
    return sum(tensor_bytes(name, shape, formats) for name, shape in expected_tensors(config).items())


def tensor_bytes(name: str, shape: tuple[int, ...], formats: Formats) -> int:
    """Packed values, and a scale and bias a group (one byte of scale and no bias in the block-float formats)."""
    count = math.prod(shape)
    if name == TOKEN_ORDERING:
        return 4 * count
    form = formats.of(name, shape) if len(shape) > 1 else None
    if form is None:
        return formats.dense_bytes * count
    groups = count // form.group_size
    return count * form.bits // 8 + groups * (2 * formats.dense_bytes if form.mode == "affine" else 1)


def kv_bytes(text: TextConfig, rows: int, batch: int, item: int) -> int:
    """K and V buffers with room for `rows` tokens."""
    return sum(2 * item * math.prod(shape) for shape in kv_shapes(text, batch, capacity_for(rows)))


def grown_layer_bytes(text: TextConfig, rows: int, item: int) -> int:
    """One full layer's K and V: `state.grow` has one layer at a time twice."""
    return 2 * item * text.kv_heads_of(FULL) * capacity_for(rows) * text.head_dim_of(FULL)


def ring_bytes(text: TextConfig, item: int) -> int:
    """The sliding layers' K and V of one row, which is what a turn's checkpoint keeps."""
    shapes = zip(text.layer_types[: text.first_shared_layer], kv_shapes(text, 1, 0), strict=True)
    return sum(2 * item * math.prod(shape) for kind, shape in shapes if kind == SLIDING)


def checkpoint_bytes(text: TextConfig, turns: int, item: int) -> int:
    """Checkpoints of so many turns, oldest dropped over the budget; the newest is always kept."""
    one = ring_bytes(text, item)
    kept = min(turns, max(1, CHECKPOINT_BYTES // one)) if one else 0
    return kept * one


def prefill_bytes(text: TextConfig, prompt: int, context: int, item: int) -> int:
    """Scratch of one chunk of a prompt: scores of layers or tiles, rows of the widest product, per-layer inputs.

    The last layer with K/V and those that share it run for one row only.
    """
    chunk = min(CHUNK, prompt)
    layers = range(max(1, text.first_shared_layer - 1))
    is_full = any(text.layer_types[i] == FULL for i in layers)
    keys = context if is_full else min(context, text.sliding_window + chunk)
    row = 4 * text.num_heads * chunk
    if keys <= 2 * KEY_TILE:
        scores = LAYERS_OF_SCORES * row * keys
    else:
        scores = TILES_OF_SCORES * min(4 * SCORES_PER_TILE, row * KEY_TILE)
    widest = max(
        max(text.mlp_size_of(i) for i in layers),
        text.num_heads * max(text.head_dim, text.global_head_dim),
        text.num_experts_per_token * max(text.moe_intermediate_size, text.hidden_size),
        text.hidden_size,
    )
    per_layer = 3 * text.num_layers * text.per_layer_input_dim
    return scores + chunk * item * (ARRAYS_OF_ROWS * widest + per_layer)


def round_bytes(
    text: TextConfig, context: int, batch: int, drafts: int, *, wide: bool = False, kernels: bool = False
) -> int:
    """Scratch of one round with so many drafts: logits and what sampling makes of them, and attention's scores.

    kernels: whether attention may be ours, whose partitions then take the place of the scores if they are more.
    """
    rows = batch * (drafts + 1)
    logits = 4 * rows * text.vocab_size
    scores = ARRAYS_OF_ROUND_SCORES * 4 * rows * text.num_heads * bucket_for(context)
    if kernels:
        scores = max(scores, attention_scratch_bytes(text, context, batch, drafts + 1))
    arrays = ARRAYS_OF_LOGITS_WIDE if wide else ARRAYS_OF_LOGITS
    return arrays * logits + scores


def attention_scratch_bytes(text: TextConfig, context: int, batch: int, rows: int) -> int:
    """The most that our attention kernels keep of one layer while it runs, `rows` rows of each conversation.

    One layer's at a time: full layers are several apart, and each of their launches reads more than a command buffer.
    """
    return max(
        scratch_bytes(_attention_of(text, kind), batch, rows, bucket_for(context))
        for kind in set(text.layer_types)
    )


def _attention_of(text: TextConfig, kind: str) -> AttentionShape:
    window = text.sliding_window if kind == SLIDING else None
    return AttentionShape(text.num_heads, text.kv_heads_of(kind), text.head_dim_of(kind), window, mx.bfloat16)
