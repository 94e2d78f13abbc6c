"""What `bench` says to a person: a table for each case, verdicts, what a guarantee or a comparison found."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from mlx_mtp.cli.layout import table, wrapped
from mlx_mtp.cli.sizes import bytes_text
from mlx_mtp.measure.compare import Compared
from mlx_mtp.measure.guarantee import Finding
from mlx_mtp.measure.intervals import Ratio
from mlx_mtp.measure.plan import Case
from mlx_mtp.measure.results import Document
from mlx_mtp.measure.summary import Row, rows_of, skipped_of
from mlx_mtp.measure.tables import machine_line, notes_of, text_of

NARROW = ("arm", "tok/s", "±", "x plain", "tok/round", "accept", "cost", "text")
WIDE = (*NARROW, "95 % of x", "by position", "TTFT ms", "round ms", "prefill", "parked", "peak")
WIDE_COLUMNS = 136


def as_text(document: Document, columns: int | None) -> str:
    """The whole run; `columns` None: as wide as it gets."""
    wide = columns is None or columns >= WIDE_COLUMNS
    parts = [wrapped(machine_line(document), columns), _settings_line(document, columns)]
    for case, rows in groupby(rows_of(document), key=lambda row: row.case):
        parts.append(_case_text(case, list(rows), columns, wide=wide))
    parts += [wrapped(f"{title_of(case)}: not played, {why}", columns) for case, why in skipped_of(document)]
    parts.append("\n".join(wrapped(line, columns) for line in _closing(document)))
    return "\n\n".join(part for part in parts if part)


def title_of(case: Case) -> str:
    context = f"{case.context} tokens before it" if case.context else "prompts as written"
    return f"{case.workload}, {case.sampling}, {context}, {case.batch} at a time"


def _settings_line(document: Document, columns: int | None) -> str:
    settings, prompts = document["settings"], document["fingerprint"]["prompts"]
    each, tokens = settings["prompts"], settings["tokens"]
    least, most = settings["min_repeats"], settings["max_repeats"]
    repeats = f"{least}" if least == most else f"{least} to {most}"
    return wrapped(
        f"prompt set {prompts['version']}, {each} of each workload, {tokens} tokens each, {repeats} repeats, "
        f"arms in turn. tok/s: of decoding, the median, ± half the 95 % interval; "
        "cost: a round's time in plain rounds, and so the tokens a round from which drafting gains; ms: p50/p95",
        columns,
    )


def _case_text(case: Case, rows: list[Row], columns: int | None, *, wide: bool) -> str:
    room = None if columns is None else columns - 2
    cells = [[_cell(row, name) for name in (WIDE if wide else NARROW)] for row in rows]
    lines = [
        wrapped(title_of(case), columns),
        _indented(table(WIDE if wide else NARROW, cells, room, title=0)),
    ]
    arms_of: dict[str, list[str]] = {}
    for row in rows:
        arms_of.setdefault(notes_of(row), []).append(row.arm)
    lines += [wrapped(f"  {', '.join(arms)}: {notes}", columns) for notes, arms in arms_of.items() if notes]
    return "\n".join(lines)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.split("\n"))


def _cell(row: Row, name: str) -> str:
    if name == "arm":
        return row.arm
    if name == "text":
        return text_of(row)
    if row.trouble is not None or row.ms_per_token is None:
        return "-"
    return {
        "tok/s": _rate(row.tokens_per_s),
        "±": f"{100 * row.ms_per_token.half_width:.1f} %",
        "x plain": "-" if row.speedup is None else f"{row.speedup.value:.2f}",
        "tok/round": "-" if row.tokens_per_round is None else f"{row.tokens_per_round:.2f}",
        "accept": _percent(row.acceptance),
        "cost": "-" if row.round_cost is None else f"{row.round_cost:.2f}",
        "95 % of x": _interval(row.speedup),
        "by position": "/".join(f"{100 * share:.0f}" for share in row.acceptance_by_position[:4]) or "-",
        "TTFT ms": _milliseconds(row.ttft_ms),
        "round ms": _milliseconds(row.round_ms),
        "prefill": _rate(row.prompt_tokens_per_s),
        "parked": _percent(row.parked_share),
        "peak": "-" if row.peak_bytes is None else bytes_text(row.peak_bytes),
    }[name]


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _interval(ratio: Ratio | None) -> str:
    return "-" if ratio is None else f"{ratio.low:.2f} to {ratio.high:.2f}"


def _milliseconds(both: tuple[float, float] | None) -> str:
    return "-" if both is None else f"{_short(both[0])}/{_short(both[1])}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _closing(document: Document) -> list[str]:
    """What holds for the run as a whole."""
    rows = rows_of(document)
    judged = [row for row in rows if row.verdict is not None]
    tokens = sum(row.verdict["tokens"] for row in judged if row.verdict)
    parted = sum(row.verdict["parted"] for row in judged if row.verdict)
    promise = document["fingerprint"]["promise"]
    lines = []
    if judged:
        said = f"{parted} texts part" if parted else "the same tokens as without"
        lines.append(
            f"text with MTP: {said}, {tokens} tokens compared (promise {promise} holds here, see prove)"
        )
    agreed = [row.mlx_lm for row in rows if row.mlx_lm]
    if agreed:
        same, forced = sum(a["agreed"] for a in agreed), sum(a["tokens"] for a in agreed)
        lines.append(f"mlx-lm's model: its best token is ours {same} of {forced} times")
    warm = [row.warm_up_s for row in rows if row.warm_up_s]
    if warm:
        lines.append(
            f"warm-up, discarded: {sum(warm):.1f} s in {len(warm)} passes, the slowest {max(warm):.1f} s"
        )
    if document["process_peak_bytes"]:
        lines.append(f"peak memory of the process: {bytes_text(document['process_peak_bytes'])}")
    lines.append(f"energy: {_energy(rows, document)}")
    lines += [str(note) for note in document["notes"]]
    if not document["complete"]:
        lines.append("this run is not complete")
    return lines


def _energy(rows: Sequence[Row], document: Document) -> str:
    known = [(row, row.joules_per_token) for row in rows if row.joules_per_token is not None]
    if not known:
        return str(document["energy"])
    said = ", ".join(f"{row.case.workload} {row.arm} {joules:.2f}" for row, joules in known)
    return f"joules a token of {document['energy']}: {said}"


def findings_text(findings: Sequence[Finding], columns: int | None) -> str:
    """What the guarantee's checks said: those that fail one by one, the others counted."""
    failed = [finding for finding in findings if not finding.holds]
    lines = [f"  {f.case.key} {f.arm} {f.check}: {f.said}".replace("  :", ":") for f in failed]
    held = len(findings) - len(failed)
    return "\n".join(
        wrapped(line, columns) for line in [f"guarantee: {held} of {len(findings)} checks hold", *lines]
    )


def comparison_text(found: Sequence[Compared], columns: int | None) -> str:
    """A row for each arm that both runs have, and what they come to."""
    rows = [
        [
            c.case.key,
            c.arm,
            f"{c.before_ms:.2f}",
            f"{c.after_ms:.2f}",
            f"{c.ratio.value:.3f}",
            f"{c.ratio.low:.3f} to {c.ratio.high:.3f}",
            c.word,
        ]
        for c in found
    ]
    header = ("case", "arm", "ms before", "ms after", "after/before", "95 %", "second run is")
    return f"{table(header, rows, columns, title=0)}\n{_in_sum(found)}"


def _in_sum(found: Sequence[Compared]) -> str:
    """How many rows say what, and how many of them chance would give where nothing has changed."""
    words = Counter(c.word for c in found if c.is_clean)
    clean = words.total()
    if clean == 0:
        return f"{len(found)} rows, and none says anything: a machine was not at rest"
    alike = clean - words["faster"] - words["slower"]
    told = f"{words['faster']} faster, {words['slower']} slower, {alike} without a difference shown"
    unknown = "" if clean == len(found) else f", {len(found) - clean} unknown"
    chance = "" if clean < 10 else f"; by chance alone about {0.05 * clean:.0f} would be faster or slower"
    return f"{len(found)} rows: {told}{unknown}{chance}"
