"""Predicted gains of MTP against published ones, and what our kernels are expected to show: writes docs/predictions.md.

    python bench/predictions.py             # print the page
    python bench/predictions.py --write     # write it

Nothing here was measured on a Mac by us. Costs of rounds come from cost_model.py, the acceptance of each kind of text
from the constants below, which are the same for every row; no row has a constant of its own.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from predicted_gains import (
    DENSE,
    HOST_SECONDS_A_LAYER,
    MIXED,
    PADDED,
    PADDED_BEFORE_M3,
    SMALL,
    Predicted,
    curve,
    predict,
)
from prediction_errors import BY_TEXT, HOST, by_source, contradictions, score, without
from published_gains import GAINS, LEFT_OUT, Gain
from sim_page import simulated
from sim_texts import tokens_of

from mlx_mtp.chips import BF16_EMULATED

PAGE = Path(__file__).parent.parent / "docs" / "predictions.md"
SIMULATION = Path(__file__).parent / "results" / "simulation.json"
GOALS = {"median": 0.15, "side": 0.80}


def published_table(rows: Sequence[Predicted]) -> str:
    """Stock kernels against what was published."""
    lines = [
        "| size | chip | text | drafts | tokens a round | setup | published | predicted | error | 1.0 | source |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gain = row.gain
        error = "-" if gain.value is None else f"{100 * (row.stock / gain.value - 1):+.0f} %"
        side = "-" if gain.pays is None else "right" if (row.stock > 1) == gain.pays else "wrong"
        tokens = f"{tokens_of(row.chance, gain.drafts):.2f}{'' if gain.has_acceptance else ' *'}"
        value = "< 1" if gain.value is None else f"{gain.value:g}"
        lines.append(
            f"| {gain.size} | {gain.chip} | {gain.text} | {gain.drafts} | {tokens} | {setup(gain)} | {value} | "
            f"{row.stock:.2f} | {error} | {side} | {gain.source} |"
        )
    return "\n".join(lines) + "\n"


def bits(gain: Gain) -> str:
    """Of target and drafter."""
    return f"{gain.bits}/{gain.drafter_bits}" + (f", MLP {gain.mlp_bits}" if gain.mlp_bits else "")


def setup(gain: Gain) -> str:
    """Bits, and what is particular."""
    words = [bits(gain)]
    words += ["nvfp4"] if not gain.is_affine else []
    words += ["exact"] if gain.is_exact else []
    words += ["old MLX"] if not gain.has_wide else []
    words += [f"{gain.context // 1024}k context"] if gain.context > 1024 else []
    return ", ".join([*words, *([gain.note] if gain.note else [])])


def ours_table(rows: Sequence[Predicted]) -> str:
    """The same rows, once each, on our kernels."""
    lines = [
        "| size | chip | text | bits | tokens a second: plain, best | published drafts | best number | gain | over "
        "stock's plain | experts shared |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    seen = set()
    for row in rows:
        gain = row.gain
        stock_plain = 1 / curve(gain, "stock").own(0)
        shared = "-" if row.shared is None else f"{row.shared:.2f}"
        line = (
            f"| {gain.size} | {gain.chip} | {gain.text} | {bits(gain)} | {row.plain:.0f}, "
            f"{row.plain * row.ours_best:.0f} | {gain.drafts}: {row.ours:.2f} | {row.best} | {row.ours_best:.2f} | "
            f"{row.plain * row.ours_best / stock_plain:.2f} | {shared} |"
        )
        if line not in seen:
            lines.append(line)
        seen.add(line)
    return "\n".join(lines) + "\n"


def figures(name: str, rows: Sequence[Predicted]) -> str:
    """One line of a table of errors."""
    error, right, sided = score(rows)
    counted = sum(row.gain.value is not None for row in rows)
    median = "-" if error is None else f"{100 * error:.1f} %"
    share = f", {100 * right / sided:.0f} %" if sided else ""
    return f"| {name} | {len(rows)} | {counted} | {median} | {right} of {sided}{share} |\n"


def goals(rows: Sequence[Predicted]) -> str:
    """What is reached, by size, in all, and of rows with and without an acceptance of their own."""
    lines = "| rows | | with a figure | median error | right side of 1.0 |\n|---|---|---|---|---|\n"
    for size in ("31b", "12b", "26b-a4b", "e4b"):
        lines += figures(size, [row for row in rows if row.gain.size == size])
    lines += figures("acceptance published for the row", [row for row in rows if row.gain.has_acceptance])
    lines += figures("acceptance by kind of text", [row for row in rows if not row.gain.has_acceptance])
    lines += figures("all", rows)
    error, right, sided = score(rows)
    assert error is not None
    median_met = "reached" if error <= GOALS["median"] else "**missed**"
    side_met = "reached" if right >= GOALS["side"] * sided else "**missed**"
    return lines + (
        f"\nThe goals were a median error of at most 15 %: {median_met} ({100 * error:.1f} %);\nand at least 80 % on "
        f"the right side of 1.0: {side_met} ({100 * right / sided:.0f} %).\n"
    )


def sources(rows: Sequence[Predicted]) -> str:
    """Each source against all others: nobody's figures carry the result."""
    lines = "| source | rows | with a figure | median error | right side of 1.0 |\n|---|---|---|---|---|\n"
    for name, (own, others) in by_source(rows).items():
        lines += figures(name, own) + figures(f"all but {name}", others)
    return lines


def taken_away() -> str:
    """The score with one input taken away."""
    lines = "| without | rows | with a figure | median error | right side of 1.0 |\n|---|---|---|---|---|\n"
    return lines + "".join(figures(name, rows) for name, rows in without().items())


def in_words(rows: Sequence[Predicted]) -> str:
    """Whether the goals are met by these rows."""
    error, right, sided = score(rows)
    assert error is not None
    met = "meet" if error <= GOALS["median"] and right >= GOALS["side"] * sided else "miss"
    return f"{met} the goals ({100 * error:.1f} %, {100 * right / sided:.0f} %)"


def floors(rows: Sequence[Predicted]) -> str:
    """Sources that no model can meet, as their own figures differ."""
    lines = []
    for gain, costs in contradictions(rows):
        listed = ", ".join(f"{cost:.2f}" for cost in costs)
        lines.append(f"- {gain.size} on {gain.chip}, {setup(gain)} ({gain.source}): {listed}")
    return "\n".join(lines)


def constants() -> str:
    """Everything that was chosen, once for all rows."""
    dense = ", ".join(f"{text} {rate:g}" for text, rate in DENSE.items())
    mixed = ", ".join(
        f"{text} {part['rate']:g} of 3 drafts"
        if "rate" in part
        else f"{text} {part['tokens_a_round']:g} tokens of 5"
        for text, part in MIXED.items()
    )
    return f"""\
- What was accepted: as the source says for the very row. Rows with * in the column of tokens have no such figure and
  get that of their kind of text:
  - 31B and 12B: {dense}, of 2 and 3 drafts (llama.cpp
    #23398, 31B); "mean" is the mean of the five;
  - 26B-A4B: {mixed}
    (a user's oMLX file; prose and JSON r/LocalLLaMA); "mean" is chat;
  - E4B: {SMALL["tokens_a_round"]:g} tokens of 4 (mlx-vlm #1121).
- Each draft of a round is taken to be as likely right as the one before it.
- Drafts: the block less one, 3 where none was given. The drafter in 16 bits, the target in 4, unless the source says
  otherwise; 12B keeps its MLP in 8 bits, as shipped.
- "Old MLX": before 0.32 (26 June 2026, by the source's date or version), without a product for several rows, so that
  each row costs a product of its own (`qmv`, mlx#3839); "exact" modes do the same. nvfp4 has that product on every chip
  (mlx#3764), 4 bits in MLX's affine format from M3 on.
- M1 and M2 have no bfloat16 arithmetic: rows beyond the first cost {BF16_EMULATED:.2f} times as much in stock MLX
  (mlx#4216, a product of 512 rows on an M1 Max; that it holds for few rows is assumed).
- Engines written in Python (mlx-vlm, oMLX, Rapid-MLX) build a round's graph once the round before is read, while the
  GPU waits; plain decoding builds it ahead. {1e3 * HOST_SECONDS_A_LAYER:.2f} ms a layer (oMLX #1097: 19.2 ms for
  the 64 of a Qwen 27B on an M1 machine), taken for all layers and chips.
- 16-bit targets, old MLX: products of several rows take {PADDED.times[1]:g} times one row ({PADDED.source}), on M1
  and M2 {PADDED_BEFORE_M3.times[1]:g} ({PADDED_BEFORE_M3.source}).
- Bandwidth reached, launches, growth with rows, experts: [kernels-cost.md](kernels-cost.md). Not in it: heat.
"""


def page(simulation: Path = SIMULATION) -> str:
    """The whole of docs/predictions.md."""
    rows = [predict(gain) for gain in GAINS]
    others = by_source(rows)["mlxcel"][1]
    others_before = by_source(without()[HOST])["mlxcel"][1]
    left_out = "\n".join(f"- {what}" for what in LEFT_OUT)
    return f"""\
# Predictions

**Everything on this page is predicted. Nothing was measured by us on a Mac.** It was written by `bench/predictions.py`
from `bench/published_gains.py` (what others published), `bench/cost_model.py` (what a round should take) and, for the
last part, `bench/simulate.py`.

```sh
python bench/simulate.py --json bench/results/simulation.json
python bench/predictions.py --write
```

## What was chosen

No row has a constant of its own.

{constants()}
## MTP on stock kernels: predicted against published

Speed with MTP over plain decoding, batch 1. Other engines, prompts and MLX versions. What was accepted is an input
where its source gives it, as are drafts, bits and the version of MLX; the gain is the output. So most rows test what a
round costs.

{goals(rows)}
{published_table(rows)}
A side is counted where the published figure is more than 2 % from 1.0. Left out:

{left_out}

### Is it fitted?

No figure was adjusted to bring a row nearer. But the same rows had been predicted before, with a median error of 17 %
and 76 % on the right side. Then the inputs were read again at their sources (drafts accepted, blocks, versions of MLX,
bits of drafters and of the MLP), and time of the host and bfloat16 on M1 and M2 were added with those errors in sight,
as published and for all rows. So each of these is taken away here:

{taken_away()}
What a source accepted has to be known: by kind of text alone the predictions {in_words(without()[BY_TEXT])}.

Each source (a project's pages count as one) against all others:

{sources(rows)}
mlxcel's rows are more than half of all, and carefully measured. The others alone {in_words(others)};
without time of the host they would {in_words(others_before)}.

### Where it is off

Some sources give figures that no model can meet: rounds of the same pair, chip and settings, which should cost the same
whatever the text, cost so many plain steps by their own tokens a round and gains:

{floors(rows)}

Two engines contradict each other on one chip: 12B on an M3 Ultra, 1.74 to 2.61 (mlxcel) and 0.94 (Rapid-MLX). Old MLX
and time of the host explain most of that, but not that mlx-vlm's early reports of the 26B-A4B are much better (M4 Max
1.53, M1 Max 1.13 on code) than those of the 31B are (M4 Pro 0.65): the former are predicted too slow, the latter too
fast. M1 Ultra, slow at one row already, is predicted up to a fifth too fast; exact modes of 12B on M5 Max and M3 Ultra
too slow (they give up 23 and 15 % by mlxcel's figures, 32 and 18 % here).

## Our kernels: what we expect a Mac to show, to be refuted

The same rows on our kernels, taken to be as good as published ones of their kind (`kernels-cost.md`, the middle
column; 16-bit products to grow with rows as 4-bit ones), with the drafter's bits as published: 4 bits help the 26B-A4B.
"Gain" is over our own plain decoding at the best number of drafts, which is what "auto" should come near; "over stock's
plain" holds what our kernels save without drafts too. "Experts shared": the gain if neighbouring tokens of the 26B-A4B
share experts as those of other models do; the main figure has them choose independently. How much those of the 26B-A4B
share nobody has counted; what is counted is a tiny pair with random weights, which only shows how
(`bench/expert_overlap.py`, `doctor --report` does it for any pair):

![Distinct experts by rows: a tiny golden pair measured, and the formula for 26B-A4B](expert_overlap.svg)

Best numbers beyond the published one take later drafts to be as good as earlier ones. They are not: code on 12B gave
3.93 tokens with a block of 8 on an M3 Ultra and 4.53 on an M1 Ultra (mlxcel), where this rule says 5.5. So gains at the
best number may be a quarter too high.

{ours_table(rows)}
Refuted where a Mac in good order, at these settings, shows less than 0.85 times the gain at the published number of
drafts, or "auto" slower than 0.98 times plain.

## AutoPolicy on simulated texts

{simulated(simulation)}"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    args = parser.parse_args()
    if args.write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())


if __name__ == "__main__":
    main()
