"""Text that fits the terminal it goes to: tables, and sentences broken between words."""

import os
import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO

from mlx_mtp.clean import clean_for_terminal
from mlx_mtp.cli.sizes import columns_of

GAP = "  "


def terminal_columns(stream: TextIO | None = None) -> int | None:
    """Columns of the terminal that `stream` (stdout unless given) is, None where it is none."""
    stream = stream or sys.stdout
    if stream is None or not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


def wrapped(text: str, columns: int | None) -> str:
    """One line, broken between words where it is too long, under its own indentation; names are never broken."""
    if columns is None or columns_of(text) < columns:
        return text
    indent = text[: len(text) - len(text.lstrip(" "))]
    return textwrap.fill(
        text.lstrip(" "),
        width=max(columns - 1, 10),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], columns: int | None, *, title: int = -1
) -> str:
    """`rows` under `header`; where that is wider than `columns`, each row's cells one below another.

    title: which cell stands first then, the last unless given. columns None: no limit.
    """
    cells = [list(header), *([clean_for_terminal(cell) for cell in row] for row in rows)]
    widths = [max(columns_of(row[index]) for row in cells) for index in range(len(header))]
    if columns is not None and sum(widths) + len(GAP) * (len(widths) - 1) > columns:
        return "\n".join(_stacked(cells[0], row, title) for row in cells[1:])
    return "\n".join(_aligned(row, widths) for row in cells)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell + " " * (width - columns_of(cell)) for cell, width in zip(row, widths, strict=True)]
    return GAP.join(padded).rstrip()


def _stacked(header: Sequence[str], row: Sequence[str], title: int) -> str:
    named = [f"{GAP}{name} {cell}" for name, cell in zip(header, row, strict=True)]
    del named[title]
    return "\n".join([row[title], *named])
