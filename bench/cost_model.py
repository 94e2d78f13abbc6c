"""Predicted time of a round from bytes, operations, launches and distinct experts: stock MLX against our kernels.

    python bench/cost_model.py bench/results/launches.json            # the tables of docs/kernels-cost.md
    python bench/cost_model.py bench/results/launches.json --write    # put them there

Nothing here was measured on a Mac by us. Inputs are the launches counted by launches.py, the sizes of the published
shapes, and the published figures of mlx_mtp/chips.py; the check against published speeds shows how far off it is.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chips import PUBLISHED, Published
from synthetic import configs_of

from mlx_mtp.chips import (
    ALU_REACHED,
    BANDWIDTH_REACHED,
    CHIPS,
    GATHER,
    LAUNCH_SECONDS,
    OTHERS,
    OVERLAP,
    ROWS_ATTENTION,
    SKINNY,
    STOCK_ATTENTION,
    Chip,
    Curve,
    stock_curve,
)
from mlx_mtp.config import SLIDING, DrafterConfig, TargetConfig, TextConfig
from mlx_mtp.published_configs import SIZES
from mlx_mtp.tensor_names import expected_tensors

PAGE = Path(__file__).parent.parent / "docs" / "kernels-cost.md"
SCALE_BITS = 0.5  # a float16 scale and bias a group of 64
CONTEXT = 1024
TABLES = ("embed_tokens_per_layer", "masked_embedding.token_ordering")  # rows are looked up, not all read


@dataclass(frozen=True, slots=True)
class Bytes:
    """What one row's pass reads, and its multiply-adds: dense matrices, one expert in one layer, K/V."""

    dense: float
    products: float  # parameters that one row is multiplied with
    expert: float  # gate, up and down
    experts: int
    top_k: int
    layers: int
    kv: float


def bytes_of(
    config: TargetConfig | DrafterConfig, bits: int = 4, mlp_bits: int | None = None, context: int = CONTEXT
) -> Bytes:
    """Sizes of the published shapes; `mlp_bits` of the dense MLP where they differ."""
    text, dense, products = config.text, 0.0, 0.0
    for name, shape in expected_tensors(config).items():
        if len(shape) != 2 or name in TABLES or (name == "embed_tokens" and _clustered(config)):
            continue
        own = mlp_bits if ".mlp." in name and mlp_bits else bits
        dense += math.prod(shape) * _bits(own) / 8
        products += math.prod(shape)
    if isinstance(config, DrafterConfig) and config.num_centroids:
        rows = config.centroid_top_k * text.vocab_size // config.num_centroids
        dense += rows * text.hidden_size * _bits(bits) / 8
    expert = 3 * text.hidden_size * text.moe_intermediate_size
    products += text.num_experts_per_token * expert * text.num_layers if text.num_experts else 0
    return Bytes(
        dense,
        products,
        expert * _bits(bits) / 8,
        text.num_experts,
        text.num_experts_per_token,
        text.num_layers,
        sum(_kv_bytes(text, kind, context) for kind in text.layer_types),
    )


def _clustered(config: TargetConfig | DrafterConfig) -> bool:
    return isinstance(config, DrafterConfig) and bool(config.num_centroids)


def _bits(bits: int) -> float:
    return bits if bits == 16 else bits + SCALE_BITS


def _kv_bytes(text: TextConfig, kind: str, context: int) -> int:
    rows = min(context, text.sliding_window) if kind == SLIDING else context
    return 2 * 2 * rows * text.kv_heads_of(kind) * text.head_dim_of(kind)


@dataclass(frozen=True, slots=True)
class Way:
    """How products, experts and attention grow with rows: stock MLX, or kernels of ours as good as stated."""

    name: str
    launches: str  # which count of launches.json
    dense: Callable[[Chip], Curve] | None  # None: one read, or the multiply-adds where they take longer
    distinct: Callable[[int], float] | None  # experts read by M rows; None: one a (row, expert) pair
    attention: Curve


def independent(rows: int) -> float:
    """Distinct of 128 experts if rows choose 8 each without regard to one another."""
    return 128 * (1 - (1 - 8 / 128) ** rows)


STOCK = Way("stock MLX", "stock", stock_curve, None, STOCK_ATTENTION)
CAUTIOUS = Way(
    "ours, as published kernels of this kind", "ours", lambda _: SKINNY, independent, ROWS_ATTENTION
)
BOUND = Way("ours, bytes and operations alone", "ours", None, OVERLAP, Curve((1, 2), (1, 1), "one walk"))
WAYS = (STOCK, CAUTIOUS, BOUND)


def pass_seconds(size: Bytes, chip: Chip, rows: int, launches: float, way: Way) -> float:
    """One pass of `rows` rows; launches and memory traffic are taken to follow each other."""
    bandwidth = chip.gb_per_s * 1e9 * BANDWIDTH_REACHED
    operations = 2 * size.products * rows / (chip.tflops * 1e12 * ALU_REACHED)
    if way.dense is None:
        dense = max(size.dense / bandwidth, operations)
    else:
        dense = size.dense / bandwidth * way.dense(chip)(rows)
    experts = 0.0
    if size.experts:
        read = size.top_k * rows if way.distinct is None else way.distinct(rows)
        share = GATHER(rows if way.distinct is None else GATHER.rows[-1])
        experts = size.layers * size.expert * read / (bandwidth * share)
    return launches * LAUNCH_SECONDS + dense + experts + size.kv / bandwidth * way.attention(rows)


def round_seconds(
    size: str,
    chip: Chip,
    drafts: int,
    way: Way,
    counted: dict[str, Any],
    *,
    bits: int = 4,
    mlp_bits: int = 4,
    drafter_bits: int = 4,
) -> float:
    """A greedy round: `drafts` rows verified beside the last token, and as many drafted anew."""
    target, drafter = configs_of(size)
    launches = counted[size][way.launches]["greedy"]["k=3" if drafts else "k=0"]
    seconds = pass_seconds(bytes_of(target, bits, mlp_bits), chip, drafts + 1, launches["verify"], way)
    step = pass_seconds(bytes_of(drafter, drafter_bits), chip, 1, launches["draft"] / 3, way)
    return seconds + drafts * step


def check(counted: dict[str, Any]) -> list[tuple[Published, float]]:
    """What stock MLX is predicted to do where somebody published what it did."""
    chips = {chip.name: chip for chip in (*CHIPS, *OTHERS)}
    rows = []
    for one in PUBLISHED:
        how: Any = {"bits": one.bits, "mlp_bits": one.mlp_bits, "drafter_bits": one.drafter_bits}
        plain = round_seconds(one.size, chips[one.chip], 0, STOCK, counted, **how)
        if one.what == "round":
            predicted = round_seconds(one.size, chips[one.chip], one.drafts, STOCK, counted, **how) / plain
        else:
            predicted = 1 / plain
        rows.append((one, predicted))
    return rows


def check_table(counted: dict[str, Any]) -> str:
    """Predicted against published, the worst errors included."""
    head = "| size | chip | what | published | predicted | error | source |\n|---|---|---|---|---|---|---|\n"
    return head + "".join(
        f"| {one.size} {one.bits}-bit | {one.chip} | {_words(one)} | {one.value:g} | {predicted:.3g} | "
        f"{100 * (predicted / one.value - 1):+.0f} % | {one.source} |\n"
        for one, predicted in check(counted)
    )


def _words(one: Published) -> str:
    return f"round with {one.drafts} drafts, in plain steps" if one.what == "round" else one.what


def launches_table(counted: dict[str, Any]) -> str:
    """Launches of a round by size, sampling and drafts."""
    head = "| size | sampling | drafts | stock | ours | fewer |\n|---|---|---|---|---|---|\n"
    lines = []
    for size in SIZES:
        for how, by_drafts in counted[size]["stock"].items():
            for drafts, stock in by_drafts.items():
                before, after = stock["round"], counted[size]["ours"][how][drafts]["round"]
                share = 100 * (1 - after / before)
                lines.append(f"| {size} | {how} | {drafts[2:]} | {before:,} | {after:,} | {share:.0f} % |\n")
    return head + "".join(lines)


def time_table(counted: dict[str, Any]) -> str:
    """Milliseconds of a plain step and of a round with three drafts, by size, chip and way."""
    names = " | ".join(f"{way.name}: 0, 3 drafts (rounds in plain steps)" for way in WAYS)
    head = f"| size | chip | {names} |\n|---|---|{'---|' * len(WAYS)}\n"
    lines = []
    for size in SIZES:
        for chip in CHIPS:
            cells = []
            for way in WAYS:
                plain, played = (1e3 * round_seconds(size, chip, k, way, counted) for k in (0, 3))
                cells.append(f"{plain:.1f}, {played:.1f} ({played / plain:.2f})")
            lines.append(f"| {size} | {chip.name} | {' | '.join(cells)} |\n")
    return head + "".join(lines)


def chip_table() -> str:
    """The figures that the predictions start from."""
    head = "| chip | GB/s | TFLOPS | source |\n|---|---|---|---|\n"
    return head + "".join(
        f"| {chip.name} | {chip.gb_per_s:g} | {chip.tflops:g} | {chip.source} |\n"
        for chip in (*CHIPS, *OTHERS)
    )


def filled(page: str, counted: dict[str, Any]) -> str:
    """The page with each table between its two comments."""
    tables = {
        "launches": launches_table(counted),
        "times": time_table(counted),
        "check": check_table(counted),
        "chips": chip_table(),
    }
    for name, text in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        start, stop = page.index(begin) + len(begin), page.index(end)
        page = page[:start] + text + page[stop:]
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("launches", type=Path, help="what launches.py wrote with --json")
    parser.add_argument("--write", action="store_true", help=f"fill in {PAGE.name}")
    args = parser.parse_args()
    counted = json.loads(args.launches.read_text())["results"]
    if args.write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), counted), encoding="utf-8")
    else:
        print(check_table(counted), launches_table(counted), time_table(counted), sep="\n")


if __name__ == "__main__":
    main()
