"""What a round costs: a model with a prior from published figures, T = launch + weights + rows + experts + context.

A prior is a prediction, used until rounds were timed (`round_times`); it orders numbers of drafts, no more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_mtp.chips import BANDWIDTH_REACHED, GATHER, LAUNCH_SECONDS, SKINNY, Chip, stock_curve
from mlx_mtp.config import FULL, DrafterConfig, TargetConfig, TextConfig
from mlx_mtp.tensor_names import expected_tensors

# Launches of a pass: of a layer, and of one with experts; counted in graphs by bench/launches.py for one row.
LAUNCHES_OF_LAYER = 23
LAUNCHES_OF_EXPERTS = {"stock": 22, "ours": 8}
LAUNCHES_OF_STEP = 80  # one drafter step, its head included
SLOPE_AT = 5  # rows between whose time and that of one row the curves are taken as straight
TABLES = ("embed_tokens_per_layer", "masked_embedding.token_ordering")  # rows are looked up, not all read

By = Literal["ours", "stock"]


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of a round's parts; rows are counted per batch member, experts as distinct ones read in each layer."""

    launch_s: float
    weights_s: float  # one reading of all dense weights
    row_s: float  # a verified row beyond the first
    expert_s: float = 0.0  # one more distinct expert, in all layers
    context_s_per_token: float = 0.0  # K/V of full layers, for each batch member
    draft_s: float = 0.0  # a drafter step, for all batch members
    experts: int = 0
    top_k: int = 0

    def seconds(
        self,
        rows: int,
        batch: int = 1,
        context: int = 0,
        drafts: int = 0,
        distinct_experts: float | None = None,
    ) -> float:
        """A round that verifies `rows` rows of each of `batch` members and makes `drafts` drafts.

        distinct_experts: read in a layer, None for what rows that choose independently would read.
        """
        all_rows = rows * batch
        if distinct_experts is None:
            distinct_experts = independent_experts(all_rows, self.experts, self.top_k)
        return (
            self.launch_s
            + self.weights_s
            + self.row_s * (all_rows - 1)
            + self.expert_s * distinct_experts
            + self.context_s_per_token * context * batch
            + self.draft_s * drafts
        )

    def ratio(self, drafts: int, batch: int = 1, context: int = 0) -> float:
        """A round with so many drafts, verified and made, in rounds without."""
        with_drafts = self.seconds(drafts + 1, batch, context, drafts)
        return with_drafts / self.seconds(1, batch, context)


# Where nothing is known every row costs a pass: the reference BLAS of a CPU. What is measured replaces it.
UNKNOWN = CostModel(launch_s=0.0, weights_s=1.0, row_s=0.9, draft_s=0.05)


def independent_experts(rows: int, experts: int, top_k: int) -> float:
    """Distinct experts that rows choose without regard to one another: experts * (1 - (1 - top_k / experts)^rows)."""
    return experts * (1 - (1 - top_k / experts) ** rows) if experts else 0.0


def prior(
    target: TargetConfig,
    drafter: DrafterConfig | None,
    chip: Chip | None,
    *,
    bits: float = 4,
    drafter_bits: float = 4,
    kernels: By = "stock",
) -> CostModel:
    """A prediction from bytes, launches and published curves; `UNKNOWN` for a chip of which nothing is published.

    bits: of the weights, 16 for dense ones; 8 and fewer are taken to have scales and biases in groups of 64.
    """
    if chip is None:
        return UNKNOWN
    text, bandwidth = target.text, chip.gb_per_s * 1e9 * BANDWIDTH_REACHED
    curve = stock_curve(chip) if kernels == "stock" else SKINNY
    weights = dense_bytes(target, bits) / bandwidth
    launches = text.num_layers * (
        LAUNCHES_OF_LAYER + (LAUNCHES_OF_EXPERTS[kernels] if text.num_experts else 0)
    )
    expert = 3 * text.hidden_size * text.moe_intermediate_size * _bits(bits) / 8
    share = GATHER(1 if kernels == "stock" else GATHER.rows[-1])
    step = 0.0
    if drafter is not None:
        step = dense_bytes(drafter, drafter_bits) / bandwidth + LAUNCHES_OF_STEP * LAUNCH_SECONDS
    return CostModel(
        launch_s=launches * LAUNCH_SECONDS,
        weights_s=weights,
        row_s=weights * (curve(SLOPE_AT) - 1) / (SLOPE_AT - 1),
        expert_s=text.num_layers * expert / (bandwidth * share) if text.num_experts else 0.0,
        context_s_per_token=context_bytes(text) / bandwidth,
        draft_s=step,
        experts=text.num_experts,
        top_k=text.num_experts_per_token,
    )


def dense_bytes(config: TargetConfig | DrafterConfig, bits: float) -> float:
    """What one pass reads of matrices that every row needs."""
    clustered = isinstance(config, DrafterConfig) and config.num_centroids > 0
    total = 0.0
    for name, shape in expected_tensors(config).items():
        if len(shape) == 2 and name not in TABLES and not (clustered and name == "embed_tokens"):
            total += math.prod(shape) * _bits(bits) / 8
    if isinstance(config, DrafterConfig) and clustered:
        rows = config.centroid_top_k * config.text.vocab_size // config.num_centroids
        total += rows * config.text.hidden_size * _bits(bits) / 8
    return total


def context_bytes(text: TextConfig) -> float:
    """K/V of one position in the full layers that own it, read in 16 bits by every layer of the kind."""
    full = sum(kind == FULL for kind in text.layer_types)
    return 2.0 * 2 * full * text.kv_heads_of(FULL) * text.head_dim_of(FULL)


def _bits(bits: float) -> float:
    return bits + 0.5 if bits <= 8 else bits


def monotone(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest sequence that never falls, by weighted least squares (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        mean, total, length = value, weight, 1
        while blocks and blocks[-1][0] > mean:
            other, its, several = blocks.pop()
            mean, total, length = (mean * total + other * its) / (total + its), total + its, length + several
        blocks.append((mean, total, length))
    return [mean for mean, _, length in blocks for _ in range(length)]
