"""The tables of auto_gain.py and batch_width.py in README.md here, from their result files: written, or compared.

python bench/gain_tables.py --write
python bench/gain_tables.py --check
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marked_tables import put, write_or_check

HERE = Path(__file__).resolve().parent
README, RESULTS = HERE / "README.md", HERE / "results"
BEGIN, END = "<!-- gains: made by bench/gain_tables.py -->", "<!-- end of gains -->"
NAMES = {"stock": "own BLAS", "openblas": "OpenBLAS", "dense": "dense", "moe": "experts"}
WIDTH_FILES = {
    "batch_width.json": "demo pair, own BLAS",
    "batch_width_openblas.json": "demo pair, OpenBLAS",
    "batch_width_enlarged.json": "enlarged pair, OpenBLAS",
}
WAYS = ("best for each text", "best for each text, in hindsight", "best for all texts together", "plain")


def tables(results: Path = RESULTS) -> str:
    """All tables, in the order of README.md."""
    gains = results / "auto_gain.json"
    parts = [gain_table(json.loads(gains.read_text()))] if gains.is_file() else []
    parts += [
        width_table(json.loads((results / name).read_text()), title)
        for name, title in WIDTH_FILES.items()
        if (results / name).is_file()
    ]
    return "\n\n".join(parts)


def gain_table(record: Mapping[str, Any]) -> str:
    """A row for each pair and kind of text: auto's speed over each way to choose a number of drafts, with bounds."""
    over = ("the best for each text", "the best in hindsight", "the best for all texts", "plain")
    lines = [
        f"| pair | auto | passes | {' | '.join(f'over {other}' for other in over)} | all traces replayed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, own in record["results"]["summary"].items():
        pair = ", ".join(NAMES[part] for part in name.split("-"))
        for arm, found in own["measured"].items():
            cells = [bounded(found[way]) for way in WAYS]
            replayed = own["replayed"]["all traces, later"]["mean"] if arm == "auto, later" else None
            cells.append("" if replayed is None else f"{replayed:.2f}")
            kind = arm.removeprefix("auto, ") + " texts"
            lines.append(f"| {pair} | {kind} | {found['passes']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bounded(one: Mapping[str, Any]) -> str:
    if one["lower"] is None:
        return f"{one['speed']:.2f}"
    return f"{one['speed']:.2f} ({one['lower']:.2f} to {one['upper']:.2f})"


def width_table(record: Mapping[str, Any], title: str) -> str:
    """A row for each width: tokens a second of each arm, medians, and auto over plain of the same pass."""
    rates = record["results"]["tokens a second"]
    passes = len(next(iter(rates.values()))["all"])
    widths = list(dict.fromkeys(name.rpartition(" ")[0] for name in rates))
    arms = ("plain", "k=2", "k=4", "auto")
    lines = [
        f"| {title}, {passes} passes | {' | '.join(arms)} | auto over plain |",
        f"|---|{'---|' * (len(arms) + 1)}",
    ]
    for width in widths:
        own = [rates.get(f"{width} {arm}") for arm in arms]
        cells = ["" if one is None else f"{one['median']:.0f}" for one in own]
        lines.append(f"| {words_of(width)} | {' | '.join(cells)} | {over(own[-1])} |")
    return "\n".join(lines)


def words_of(width: str) -> str:
    return "width chosen meanwhile" if width == "width auto" else width


def over(auto: Mapping[str, Any] | None) -> str:
    ratio = (auto or {}).get("this / plain of the width")
    return "" if ratio is None else f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def with_tables(text: str, written: str) -> str:
    """`text` with the tables between their marks; ValueError where they have none."""
    return put(text, BEGIN, END, f"\n{written}\n")


if __name__ == "__main__":
    write_or_check(README, lambda text: with_tables(text, tables()), __doc__)
