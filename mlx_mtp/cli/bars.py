"""A plot for any terminal, file or log: one bar a line, with a mark on it; no colours and no cursor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from mlx_mtp.cli.sizes import columns_of, cut

USUAL_COLUMNS, MOST_COLUMNS = 80, 120
SHORTEST = 4  # of the longest bar, whatever else has to be cut
BLOCKS, MARK = "▏▎▍▌▋▊▉█", "│"
PLAIN_BLOCK, PLAIN_MARK = "#", "|"
GAP = "  "


@dataclass(frozen=True, slots=True)
class Bar:
    """One line: what it is, how long its bar is, where its mark stands, and its figure in words."""

    label: str
    value: float
    text: str
    mark: float | None = None


def bars(rows: Sequence[Bar], columns: int | None, *, blocks: bool = True) -> str:
    """Bars under one another on one scale, from 0; columns None: as for a terminal of 80.

    blocks: with the eighths of a column that Unicode has; else in ASCII.
    """
    columns = min(columns or USUAL_COLUMNS, MOST_COLUMNS)
    labels, texts = (
        max(map(columns_of, words)) for words in zip(*((r.label, r.text) for r in rows), strict=True)
    )
    room = columns - 1 - labels - len(GAP) - 1
    with_text = room - texts - 1 >= SHORTEST
    room = max(room - texts - 1 if with_text else room, SHORTEST)
    longest = max(max(row.value, row.mark or 0.0) for row in rows)
    scale = (room - 1) / longest if longest > 0 else 0.0  # the last column is left to marks
    lines = []
    for row in rows:
        line = _bar(row.value * scale, None if row.mark is None else row.mark * scale, room, blocks)
        label = row.label.rjust(labels)
        lines.append(cut(f"{label}{GAP}{line} {row.text if with_text else ''}".rstrip(), columns - 1))
    return "\n".join(lines)


def _bar(length: float, mark: float | None, room: int, blocks: bool) -> str:
    eighths = round(8 * length)
    full, rest = divmod(eighths, 8)
    if blocks:
        drawn = BLOCKS[-1] * full + (BLOCKS[rest - 1] if rest else "")
    else:
        drawn = PLAIN_BLOCK * (full + (rest >= 4))
    cells = list(drawn.ljust(room)[:room])
    if mark is not None:
        cells[min(round(mark), room - 1)] = MARK if blocks else PLAIN_MARK
    return "".join(cells)


def has_blocks(stream: TextIO) -> bool:
    """Whether a stream's encoding has the characters that bars are made of."""
    try:
        (BLOCKS + MARK).encode(stream.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True
