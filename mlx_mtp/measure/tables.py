"""The figures as data: one record a row, and these as Markdown, CSV, JSON and JSON lines."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any, Literal

from mlx_mtp.measure.results import SCHEMA, Document, as_json
from mlx_mtp.measure.summary import Row, rows_of, skipped_of

Format = Literal["md", "csv", "json", "jsonl"]
FORMATS = ("md", "csv", "json", "jsonl")
MARKDOWN = (
    ("workload", "workload"),
    ("sampling", "sampling"),
    ("context", "context"),
    ("batch", "batch"),
    ("arm", "arm"),
    ("tok/s", "tokens_per_s"),
    ("± %", "half_width_percent"),
    ("x plain", "speedup"),
    ("95 %", "speedup_interval"),
    ("prefill tok/s", "prompt_tokens_per_s"),
    ("TTFT ms p50", "ttft_ms_p50"),
    ("p95", "ttft_ms_p95"),
    ("round ms p50", "round_ms_p50"),
    ("p95", "round_ms_p95"),
    ("tok/round", "tokens_per_round"),
    ("accepted", "acceptance"),
    ("round cost", "round_cost"),
    ("parked", "parked_share"),
    ("peak GB", "peak_gb"),
    ("text", "text"),
    ("samples", "samples"),
    ("notes", "notes"),
)


def record_of(row: Row) -> dict[str, Any]:
    """One row as plain values: times in ms, rates a second, shares 0 .. 1, None where there is nothing to say."""
    time, speedup, total = row.ms_per_token, row.speedup, row.total
    return {
        "workload": row.case.workload,
        "sampling": row.case.sampling,
        "context": row.case.context,
        "batch": row.case.batch,
        "arm": row.arm,
        "samples": row.samples,
        "marked": sum(row.marked.values()),
        "noisy": row.is_noisy,
        "tokens_per_s": row.tokens_per_s,
        "ms_per_token": None if time is None else time.median,
        "ms_per_token_min": None if time is None else time.least,
        "ms_per_token_max": None if time is None else time.most,
        "half_width": None if time is None else time.half_width,
        "speedup": None if speedup is None else speedup.value,
        "speedup_low": None if speedup is None else speedup.low,
        "speedup_high": None if speedup is None else speedup.high,
        "faster_plain": row.faster_plain,
        "time_over_faster_plain": None if total is None else total.value,
        "time_over_faster_plain_low": None if total is None else total.low,
        "time_over_faster_plain_high": None if total is None else total.high,
        "prompt_tokens_per_s": row.prompt_tokens_per_s,
        "warm_up_s": row.warm_up_s,
        **_two("ttft_ms", row.ttft_ms),
        **_two("round_ms", row.round_ms),
        **_two("gap_ms", row.gap_ms),
        "tokens_per_round": row.tokens_per_round,
        "acceptance": row.acceptance,
        "acceptance_by_position": list(row.acceptance_by_position),
        "round_cost": row.round_cost,
        "break_even": row.break_even,
        "parked_share": row.parked_share,
        "peak_bytes": row.peak_bytes,
        "footprint_bytes": row.footprint_bytes,
        "joules_per_token": row.joules_per_token,
        "same_text": row.same_text,
        "parted_per_1000": None if row.verdict is None else row.verdict["per_1000"],
        "notes": notes_of(row),
    }


def notes_of(row: Row) -> str:
    """In words: why there are no figures, what was marked, where texts part, why it parked."""
    said = [] if row.trouble is None else [row.trouble]
    if row.trouble is None and row.is_noisy:
        said.append("noisy" if row.is_clean else "noisy: too few clean samples")
    said += [f"{count} {mark}" for mark, count in row.marked.items()]
    if row.verdict is not None and row.verdict["first"]:
        first = row.verdict["first"][0]
        said.append(f"text {first['text']} parts at token {first['index']}, {first['why']}")
    if row.unsteady:
        said.append(f"other text in {row.unsteady} repeats")
    if row.reason is not None:
        said.append(row.reason)
    if row.mlx_lm is not None:
        agreed = row.mlx_lm
        said.append(f"mlx-lm's best token is ours {agreed['agreed']} of {agreed['tokens']} times")
    return "; ".join(said)


def text_of(row: Row) -> str:
    """The verdict in a word."""
    return {None: "", True: "same", False: "OTHER"}[row.same_text]


def in_format(document: Document, form: Format) -> str:
    """The whole run in one format, ending in a newline."""
    records = [record_of(row) for row in rows_of(document)]
    if form == "json":
        return as_json({**document, "rows": records})
    if form == "jsonl":
        head = {
            name: document[name]
            for name in ("kind", "schema", "created", "complete", "fingerprint", "settings")
        }
        return "".join(json.dumps(line) + "\n" for line in (head, *records))
    return _csv(records) if form == "csv" else _markdown(document)


def _csv(records: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ["schema", *(records[0] if records else [])]
    writer.writerow(names)
    for record in records:
        cells = [
            " ".join(map(str, v)) if isinstance(v, list) else "" if v is None else v for v in record.values()
        ]
        writer.writerow([SCHEMA, *cells])
    return out.getvalue()


def _markdown(document: Document) -> str:
    lines = [
        "| " + " | ".join(title for title, _ in MARKDOWN) + " |",
        "|" + "|".join(" --- " for _ in MARKDOWN) + "|",
    ]
    for row in rows_of(document):
        shown = _shown(row)
        lines.append("| " + " | ".join(shown[name].replace("|", "\\|") for _, name in MARKDOWN) + " |")
    skipped = [f"- {case.key}: not played, {why}" for case, why in skipped_of(document)]
    where = machine_line(document)
    return "\n".join([where, "", *lines, *(["", *skipped] if skipped else []), "", f"Schema {SCHEMA}.", ""])


def machine_line(document: Document) -> str:
    """Machine, system, versions and model in a line."""
    found = document["fingerprint"]
    machine, versions = found["machine"], found["versions"]
    name = document["opening"].get("name", "model")
    cores = (
        f"{machine['gpu_cores']} GPU cores" if machine["gpu_cores"] else f"{machine['processors']} processors"
    )
    preloaded = f", {found['preloaded']} preloaded" if found["preloaded"] else ""
    return (
        f"{name} ({found['target']['format']}, {found['dtype']}) on {machine['chip']}, {cores}, "
        f"{machine['memory_bytes'] / 2**30:.0f} GB, {machine['system']} {machine['os_version']}, computed by the "
        f"{found['device'].upper()}{preloaded}; mlx-mtp {versions['mlx-mtp']}, MLX {versions['mlx']}, "
        f"mlx-lm {versions['mlx-lm']}"
    )


def _shown(row: Row) -> dict[str, str]:
    """`record_of` as short text."""
    time, speedup = row.ms_per_token, row.speedup
    return {
        "workload": row.case.workload,
        "sampling": row.case.sampling,
        "context": str(row.case.context) if row.case.context else "as written",
        "batch": str(row.case.batch),
        "arm": row.arm,
        "tokens_per_s": _number(row.tokens_per_s),
        "half_width_percent": "" if time is None else f"{100 * time.half_width:.1f}",
        "speedup": "" if speedup is None else f"{speedup.value:.2f}",
        "speedup_interval": "" if speedup is None else f"{speedup.low:.2f} to {speedup.high:.2f}",
        "prompt_tokens_per_s": _number(row.prompt_tokens_per_s),
        **{
            f"{name}_{place}": "" if both is None else _number(both[i])
            for name, both in (("ttft_ms", row.ttft_ms), ("round_ms", row.round_ms))
            for i, place in enumerate(("p50", "p95"))
        },
        "tokens_per_round": "" if row.tokens_per_round is None else f"{row.tokens_per_round:.2f}",
        "acceptance": _percent(row.acceptance),
        "round_cost": "" if row.round_cost is None else f"{row.round_cost:.2f}",
        "parked_share": _percent(row.parked_share),
        "peak_gb": "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}",
        "text": text_of(row),
        "samples": str(row.samples),
        "notes": notes_of(row),
    }


def _two(name: str, both: tuple[float, float] | None) -> dict[str, float | None]:
    return {f"{name}_p50": both[0] if both else None, f"{name}_p95": both[1] if both else None}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"
