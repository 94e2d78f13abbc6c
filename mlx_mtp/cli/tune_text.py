"""What `tune` found, in words, tables and a plot, and as JSON."""

import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlx_mtp.batch_choice import GOALS, Goal
from mlx_mtp.cli.bars import Bar, bars, has_blocks
from mlx_mtp.cli.layout import table, terminal_columns, wrapped
from mlx_mtp.exactness_tax import Tax
from mlx_mtp.profiles import ProfileKey
from mlx_mtp.round_times import RoundTimes
from mlx_mtp.tuning import Choice, Point, Width, choices_of, curve_of, widths_of

SCHEMA = "mlx-mtp tune 1"
Start = Literal["a profile", "the file", "published", "nothing"]
BEGAN_WITH: dict[Start, str] = {
    "a profile": "times kept from earlier runs",
    "the file": "the profile in the file",
    "published": "figures published of this chip",
    "nothing": "nothing known of this machine: every row taken to cost a pass",
}

GOAL_WORDS: dict[Goal, str] = {
    "throughput": "Several rows decoded together for throughput, if memory admits; tokens a second of all and of each",
    "latency": "As many rows as leave each most of its speed",
}


@dataclass(frozen=True, slots=True)
class Tuning:
    """A pair's times and where they come from; `tax` None where it was not asked for."""

    model: str
    chip: str
    gpu_cores: int | None
    began_with: Start
    was_measured: bool
    times: RoundTimes
    tax: Tax | None


def as_fields(found: Tuning, key: ProfileKey) -> dict[str, Any]:
    """One JSON object; `break_even` is in tokens a round, seconds in seconds."""
    tax = None if found.tax is None else asdict(found.tax)
    if tax is None and found.times.plain_tax is not None:
        tax = {"ratio": found.times.plain_tax, "reason": "measured in an earlier run"}
    return {
        "schema": SCHEMA,
        "model": found.model,
        "key": asdict(key),
        "began_with": found.began_with,
        "measured": found.was_measured,
        "plain_seconds": found.times.usual_seconds(),
        "curve": [asdict(point) for point in curve_of(found.times)],
        "choices": [asdict(choice) for choice in choices_of(found.times)],
        "batches": [
            {"goal": width.goal, "acceptance": width.acceptance, **asdict(width.choice)}
            for width in widths_of(found.times)
        ],
        "exactness_tax": tax,
        "distinct_experts": {str(rows): seen for rows, seen in sorted(found.times.distinct.items())},
    }


def as_text(found: Tuning) -> str:
    """For stdout, as wide as its terminal."""
    columns = terminal_columns(sys.stdout)
    curve, widths = curve_of(found.times), widths_of(found.times)
    parts = [
        wrapped(_headline(found), columns),
        _under(
            "A round with so many drafts: its time in ms, the tokens it must give to be as fast as plain decoding "
            "(break-even), and the share of right drafts that gives them",
            _curve_table(curve, columns),
            columns,
        ),
        _under(
            "Its time in plain rounds; the mark: its tokens if every draft is right",
            _plot(curve, columns),
            columns,
        ),
        _under(
            "What auto comes to, by the share of right drafts",
            _choice_table(choices_of(found.times), columns),
            columns,
        ),
        *(_under(GOAL_WORDS[goal], _width_table(goal, widths, columns), columns) for goal in GOALS if widths),
        "\n".join(wrapped(line, columns) for line in _closing(found)),
    ]
    return "\n\n".join(parts)


def _under(words: str, below: str, columns: int | None) -> str:
    return f"{wrapped(words, columns)}:\n{below}"


def _headline(found: Tuning) -> str:
    cores = "" if found.gpu_cores is None else f", {found.gpu_cores} GPU cores"
    if found.was_measured:
        source = f"timed now; began with {BEGAN_WITH[found.began_with]}"
    elif found.times.is_known():
        source = BEGAN_WITH[found.began_with]
    else:
        source = f"nothing was timed yet; expected from {BEGAN_WITH[found.began_with]}"
    return f"{found.model} on {found.chip}{cores}: {source}"


def _curve_table(curve: list[Point], columns: int | None) -> str:
    rows = [
        [
            str(point.drafts),
            "-" if point.seconds is None else f"{1e3 * point.seconds:.3g}",
            f"{point.break_even:.2f}" if point.drafts else "",
            _pays(point),
            point.known,
        ]
        for point in curve
    ]
    return table(["drafts", "ms", "tokens", "right", ""], rows, columns, title=0)


def _pays(point: Point) -> str:
    if not point.drafts:
        return ""
    return "never" if point.pays_from is None else f"{100 * point.pays_from:.0f} %"


def _plot(curve: list[Point], columns: int | None) -> str:
    drawn = [
        Bar(str(point.drafts), point.break_even, f"{point.break_even:.2f}", point.drafts + 1.0)
        for point in curve
    ]
    return bars(drawn, columns, blocks=has_blocks(sys.stdout))


def _choice_table(choices: list[Choice], columns: int | None) -> str:
    rows = [
        [
            f"{100 * choice.acceptance:.0f} %",
            str(choice.drafts) if choice.drafts else "parked",
            f"{choice.tokens_per_round:.2f}",
            f"{choice.gain:.2f}x",
        ]
        for choice in choices
    ]
    return table(["right", "drafts", "tokens", "gain"], rows, columns, title=0)


def _width_table(goal: Goal, widths: list[Width], columns: int | None) -> str:
    rows = [
        [
            f"{100 * width.acceptance:.0f} %",
            str(width.choice.width),
            str(width.choice.num_draft_tokens),
            f"{width.choice.tokens_per_second:.3g}",
            f"{width.choice.of_each:.3g}",
        ]
        for width in widths
        if width.goal == goal
    ]
    return table(["right", "rows", "drafts", "tokens/s", "each"], rows, columns, title=0)


def _closing(found: Tuning) -> list[str]:
    """The tax, experts if any were counted, and what to do with all this."""
    lines = []
    if found.tax is not None:
        lines.append(str(found.tax))
    elif found.times.plain_tax is not None:
        lines.append(f"exactness tax: {found.times.plain_tax:.2f}x, measured in an earlier run")
    else:
        lines.append("exactness tax: not measured yet")
    if found.times.distinct:
        seen = ", ".join(f"{rows} rows {n:.1f}" for rows, n in sorted(found.times.distinct.items()))
        lines.append(f"distinct experts of a layer: {seen}")
    if found.times.is_known():
        lines.append("These times are kept, and --mtp auto starts from them.")
    else:
        lines.append("mlx-mtp tune without --show times this machine.")
    return lines
