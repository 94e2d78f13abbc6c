"""A diagnosis as text: sections of lines and one table, as wide as the terminal."""

import sys
import textwrap
from typing import TYPE_CHECKING

from mlx_mtp.clean import clean_for_terminal
from mlx_mtp.cli.layout import table, terminal_columns, wrapped
from mlx_mtp.cli.sizes import bytes_text
from mlx_mtp.cli.terminal import PLAIN, has_style

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_mtp.diagnosis import Diagnosis
    from mlx_mtp.health import Status
    from mlx_mtp.kernels.listing import KernelLine

MARKS = {"ok": "ok", "warning": "warning", "problem": "PROBLEM"}
COLOURS = {"ok": "\x1b[32m", "warning": "\x1b[33m", "problem": "\x1b[31m"}
WIDEST = 100
LABEL = 14  # columns of a label and the space after it


def as_text(diagnosis: "Diagnosis", columns: int | None = None) -> str:
    """The whole answer; `columns` None takes the terminal's, or no limit but `WIDEST` where there is none."""
    width = columns or terminal_columns(sys.stdout)
    parts = [_machine(diagnosis, width), _checks(diagnosis, width), _models(diagnosis, width)]
    if diagnosis.kernel_lines:
        parts.append(kernel_table(diagnosis.kernel_lines, width))
    if diagnosis.places is not None:
        parts.append(_files(diagnosis, width))
    parts.append(_verdict(diagnosis, width))
    return "\n\n".join(parts)


def _machine(diagnosis: "Diagnosis", width: int | None) -> str:
    from mlx_mtp.admission import gigabytes

    machine, software = diagnosis.machine, diagnosis.software
    cores = f", {machine.gpu_cores} GPU cores" if machine.gpu_cores else ""
    system = (
        f"{'macOS' if machine.system == 'Darwin' else machine.system} {machine.os_version}, {machine.arch}"
    )
    memory = (
        f"{gigabytes(machine.memory_bytes)}, of which models may take {gigabytes(diagnosis.budget_bytes)}"
    )
    lines = [("chip", machine.chip + cores), ("system", system)]
    if software is not None:
        memory += f"; {gigabytes(software.free_bytes)} free now"
        packages = ", ".join(f"{name} {version or 'missing'}" for name, version in software.packages.items())
        lines += [
            ("python", f"{software.python} ({software.executable})"),
            ("versions", f"mlx-mtp {software.mlx_mtp}, {packages}"),
        ]
    lines += [
        ("memory", memory),
        ("arithmetic", diagnosis.dtype_reason),
        ("kernels", diagnosis.kernels),
    ]
    return "\n".join(_labelled(label, text, width) for label, text in lines)


def _checks(diagnosis: "Diagnosis", width: int | None) -> str:
    lines = []
    for check in diagnosis.checks:
        remedy = f" -> {check.remedy}" if check.remedy else ""
        line = _labelled(MARKS[check.status], f"{check.name}: {check.found}{remedy}", width)
        lines.append(_coloured(line, check.status) if has_style(sys.stdout) else line)
    return "\n".join(lines)


def _coloured(line: str, status: "Status") -> str:
    """The line with its mark, which it begins with, in a colour."""
    mark = MARKS[status]
    return f"{COLOURS[status]}{mark}{PLAIN}{line.removeprefix(mark)}"


def _models(diagnosis: "Diagnosis", width: int | None) -> str:
    from mlx_mtp.admission import gigabytes

    rows = [
        [
            fit.name,
            gigabytes(fit.memory_bytes),
            "yes" if fit.is_cached else "no",
            "recommended" if fit.is_recommended else "yes" if fit.fits else "no",
        ]
        for fit in diagnosis.models
    ]
    context = diagnosis.models[0].context
    listed = table(("model", "memory", "downloaded", "fits"), rows, width, title=0)
    note = f"memory: estimated with the drafter and {context:,} tokens of context"
    return f"{listed}\n{_wrapped(note, width)}\n{_wrapped(diagnosis.reason, width)}"


def kernel_table(lines: "Sequence[KernelLine]", width: int | None) -> str:
    """A row for each operation: by whom it is computed, how much faster than by stock MLX, and why."""
    rows = [
        [line.operation, "x".join(map(str, line.shape)), line.format, line.by, _speeds(line), line.reason]
        for line in lines
    ]
    listed = table(("operation", "shape", "format", "by", "speed by rows", "why"), rows, width, title=0)
    return "\n".join(wrapped(line, width) for line in listed.split("\n"))


def _speeds(line: "KernelLine") -> str:
    """1: 1.02x, 4: 1.80x."""
    return ", ".join(f"{rows}: {speed:.2f}x" for rows, speed in (line.speed_up or {}).items()) or "-"


def _files(diagnosis: "Diagnosis", width: int | None) -> str:
    assert diagnosis.places is not None
    places = diagnosis.places
    lines = [_labelled("downloads", places.downloads, width)]
    for model in diagnosis.cached:
        if model.kind == "other":
            continue
        partial = "" if model.is_complete else ", partial"
        lines.append(
            _labelled("", f"{model.repo_id} ({model.kind}, {bytes_text(model.bytes)}{partial})", width)
        )
    lines.append(_labelled("our files", places.data or "no folder: nothing is kept", width))
    if places.cache not in (None, places.data):
        lines.append(_labelled("", str(places.cache), width))
    lines += [
        _labelled("", f"{kept.path}: {kept.what} ({bytes_text(kept.bytes)})", width)
        for kept in diagnosis.kept
    ]
    return "\n".join(lines)


def _verdict(diagnosis: "Diagnosis", width: int | None) -> str:
    if not diagnosis.is_usable:
        problems = ", ".join(check.name for check in diagnosis.checks if check.status == "problem")
        return _wrapped(f"Models cannot run here: {problems}.", width)
    if diagnosis.recommended is None:
        return _wrapped("Only the demo pair runs here: mlx-mtp chat demo", width)
    return _wrapped(f"Try: mlx-mtp chat {diagnosis.recommended}", width)


def _labelled(label: str, text: str, width: int | None) -> str:
    """A label and its text beside it, or below it where the terminal is narrow."""
    text = clean_for_terminal(text)
    limit = min(width or WIDEST, WIDEST)
    if limit < 3 * LABEL:
        body = textwrap.fill(
            text,
            limit,
            initial_indent="  ",
            subsequent_indent="  ",
            break_on_hyphens=False,
            break_long_words=False,
        )
        return f"{label}\n{body}" if label else body
    return textwrap.fill(
        text,
        limit,
        initial_indent=f"{label:<{LABEL}}",
        subsequent_indent=" " * LABEL,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _wrapped(text: str, width: int | None) -> str:
    limit = min(width or WIDEST, WIDEST)
    return textwrap.fill(clean_for_terminal(text), limit, break_on_hyphens=False, break_long_words=False)
