"""Distinct experts of 1 to 16 neighbouring rows on the golden MoE pair's own texts, against independent choice: a plot.

    pip install 'mlx-mtp[plot]'
    python bench/expert_overlap.py --json bench/results/expert_overlap.json --svg docs/expert_overlap.svg

The pair is tiny and random (8 experts, 2 a token, 6 layers): the routing is real, but it says nothing of the 26B-A4B,
whose experts nobody has counted in public. `mlx-mtp doctor --report` counts them on a Mac.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.chips import OVERLAP
from mlx_mtp.cost import independent_experts
from mlx_mtp.report.experts import routes_of, summary
from mlx_mtp.report.protocol import Deadline

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "a4b"
MOST_ROWS = 16
SHUFFLES = 50
TEXTS = {"greedy": "greedy texts (they loop)", "penalised": "texts with a repetition penalty"}
LARGE = (128, 8)  # experts of the 26B-A4B, and how many a token is sent to

Routes = list[list[set[int]]]  # by layer, by row


def golden_routes(kind: str) -> tuple[Routes, list[int]]:
    """The experts of every generated row of both golden texts, by layer, and where each text ends."""
    sys.path.insert(0, str(ROOT / "tests"))
    from pairs import golden_pair

    target, golden = golden_pair("a4b").target, np.load(GOLDEN / "golden.npz")
    routes: Routes = [[] for _ in target.layers]
    ends = []
    for prompt in ("short", "long"):
        ids, text = golden[f"{prompt}.ids"].tolist(), golden[f"{prompt}.{kind}"].tolist()
        for layer, rows in enumerate(routes_of(target, ids, text[len(ids) :], Deadline(600).check)):
            routes[layer] += rows
        ends.append(len(routes[0]))
    return routes, ends


def distinct(routes: Routes, ends: list[int], experts: int, top_k: int) -> list[float]:
    """Mean distinct experts of 1, 2, .. `MOST_ROWS` neighbouring rows, over layers and places."""
    by_rows = summary(routes, ends, experts, top_k, most_rows=MOST_ROWS)["by_rows"]
    return [by_rows[str(rows)]["distinct"] for rows in range(1, MOST_ROWS + 1)]


def shuffled(routes: Routes, rng: random.Random) -> Routes:
    """The same rows in another order: as popular experts as before, but no neighbours."""
    order = list(range(len(routes[0])))
    rng.shuffle(order)
    return [[layer[at] for at in order] for layer in routes]


def measured() -> dict[str, Any]:
    """All curves of the golden pair, index 0 for one row."""
    mx.set_default_device(mx.cpu)
    found: dict[str, Any] = {"experts": 8, "experts_per_token": 2, "texts": {}}
    for kind in TEXTS:
        routes, ends = golden_routes(kind)
        experts, top_k = found["experts"], found["experts_per_token"]
        by_layer = [distinct([layer], ends, experts, top_k) for layer in routes]
        rng = random.Random(5)
        others = [distinct(shuffled(routes, rng), ends[-1:], experts, top_k) for _ in range(SHUFFLES)]
        found["texts"][kind] = {
            "rows": ends[-1],
            "distinct": distinct(routes, ends, experts, top_k),
            "least_of_layers": [min(values) for values in zip(*by_layer, strict=True)],
            "most_of_layers": [max(values) for values in zip(*by_layer, strict=True)],
            "rows_in_any_order": [round(sum(values) / SHUFFLES, 4) for values in zip(*others, strict=True)],
        }
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    """Two panels: the golden pair, measured; and the 26B-A4B, of which only formulas and other models are known."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "expert_overlap", "svg.fonttype": "none", "font.size": 10})
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6.4), layout="constrained")
    figure.suptitle("Distinct experts that a verify pass reads in a layer, by rows", fontsize=13)
    rows = range(1, MOST_ROWS + 1)
    experts, top_k = found["experts"], found["experts_per_token"]
    left.set_title("Golden pair a4b (tiny, random weights): measured on its own texts")
    bounds(left, rows, experts, top_k)
    for kind, colour, marker in (("penalised", "tab:blue", "o"), ("greedy", "tab:orange", "s")):
        own = found["texts"][kind]
        left.fill_between(rows, own["least_of_layers"], own["most_of_layers"], color=colour, alpha=0.12, lw=0)
        left.plot(rows, own["distinct"], color=colour, marker=marker, ms=4, label=f"measured, {TEXTS[kind]}")
        left.plot(
            rows,
            own["rows_in_any_order"],
            color=colour,
            ls="--",
            lw=1,
            label=f"its rows in any order ({kind})",
        )
    left.set_ylim(0, experts + 0.5)
    right.set_title("26B-A4B (128 experts, 8 a token): not measured by anyone")
    bounds(right, rows, *LARGE)
    right.plot(
        OVERLAP.rows,
        OVERLAP.times,
        color="tab:green",
        marker="^",
        ms=4,
        label="as shared in other models (Cohere, Laguna)",
    )
    right.set_ylim(0, 134)
    for axes in (left, right):
        axes.set_xlabel("rows of the pass (drafts + 1), neighbouring tokens")
        axes.set_ylabel("distinct experts, mean over layers")
        axes.set_xticks([1, 2, 4, 6, 8, 10, 12, 14, 16])
        axes.set_xlim(0.5, MOST_ROWS + 0.5)
        axes.grid(alpha=0.25)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=8.5)
    figure.supxlabel(
        "Left: bands are the layers with fewest and most. A tiny random model: its curves show real routing of "
        "that model, not how much the 26B-A4B shares.\nThat decides what drafts cost on the 26B-A4B; "
        "mlx-mtp doctor --report counts it on a Mac.",
        fontsize=9,
    )
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def bounds(axes: Any, rows: Sequence[int], experts: int, top_k: int) -> None:
    """What rows could read at most and at least, and what they read if each chose by itself."""
    most = [min(experts, top_k * row) for row in rows]
    axes.plot(rows, most, color="0.55", ls=":", label="none shared: k M, at most E")
    axes.plot(
        rows,
        [independent_experts(row, experts, top_k) for row in rows],
        color="black",
        label="independent: E (1 - (1 - k/E)^M)",
    )
    axes.plot(rows, [top_k] * len(rows), color="0.55", ls="-.", label="all shared: k")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the curves here")
    parser.add_argument("--svg", type=Path, help="write the plot here; needs matplotlib, in the extra `plot`")
    args = parser.parse_args()
    found = measured()
    for kind, own in found["texts"].items():
        print(f"{kind}, {own['rows']} rows: " + ", ".join(f"{value:.2f}" for value in own["distinct"]))
    own = [
        independent_experts(rows, found["experts"], found["experts_per_token"])
        for rows in range(1, MOST_ROWS + 1)
    ]
    print("independent: " + ", ".join(f"{value:.2f}" for value in own))
    if args.json:
        label = "a tiny random pair: says nothing of the 26B-A4B"
        args.json.write_text(json.dumps({"label": label, **found}, indent=1) + "\n", encoding="utf-8")
    if args.svg:
        plot(found, args.svg)


if __name__ == "__main__":
    main()
