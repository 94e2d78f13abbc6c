"""The tables of docs/memory.md, from `estimate_memory`: written into it, or compared with it.

python bench/memory_table.py --write
python bench/memory_table.py --check
"""

import json
from pathlib import Path

from marked_tables import put, write_or_check
from memory_peaks import comparison

from mlx_mtp.memory import MemoryEstimate, estimate_memory
from mlx_mtp.published_configs import SIZES

DOC = Path(__file__).parent.parent / "docs" / "memory.md"
CONTEXTS = (4096, 32_768, 131_072)
RESULTS = Path(__file__).parent / "results" / "memory_peaks.json"
# Bits of most matrices, and of the dense MLPs: the quantisation-aware conversions keep those at 8.
PRECISIONS = ((4, None), (4, 8), (8, None), (16, None))
NAMES = {"e2b": "E2B", "e4b": "E4B", "12b": "12B", "26b-a4b": "26B-A4B", "31b": "31B"}
BEGIN, END = "<!-- {}: made by bench/memory_table.py -->", "<!-- end of {} -->"
GIB = 2**30


def estimates(size: str, bits: int, mlp_bits: int | None) -> list[MemoryEstimate]:
    return [estimate_memory(size, context, bits=bits, mlp_bits=mlp_bits) for context in CONTEXTS]


def precision(bits: int, mlp_bits: int | None) -> str:
    return str(bits) if mlp_bits is None else f"{bits}, MLPs {mlp_bits}"


def totals_table() -> str:
    """Every size, precision and context: GB of the whole process."""
    lines = [
        "| Model | Bits | Weights | Drafter | At 4k | At 32k | At 128k |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for size in SIZES:
        for bits, mlp_bits in PRECISIONS:
            own = estimates(size, bits, mlp_bits)
            figures = [own[0].weights, own[0].drafter, *(estimate.total for estimate in own)]
            cells = " | ".join(
                f"{figure / GIB:.1f}" if figure > GIB / 2 else f"{figure / GIB:.2f}" for figure in figures
            )
            lines.append(f"| {NAMES[size]} | {precision(bits, mlp_bits)} | {cells} |")
    return "\n".join(lines)


def share_table() -> str:
    """What MTP adds to plain decoding."""
    lines = ["| Model | Bits | At 4k | At 32k | At 128k |", "|---|---|--:|--:|--:|"]
    for size in SIZES:
        for bits, mlp_bits in PRECISIONS:
            cells = " | ".join(f"{own.mtp_share:.1%}" for own in estimates(size, bits, mlp_bits))
            lines.append(f"| {NAMES[size]} | {precision(bits, mlp_bits)} | {cells} |")
    return "\n".join(lines)


def parts_table() -> str:
    """Where the memory goes, at 32k and the 4-bit precision that the aliases stand for."""
    lines = ["| Part | " + " | ".join(NAMES.values()) + " |", "|---|" + "--:|" * len(SIZES)]
    columns = [estimate_memory(size, 32_768, bits=4, mlp_bits=8) for size in SIZES]
    for number, (part, _) in enumerate(columns[0].lines()):
        cells = " | ".join(f"{column.lines()[number][1] / GIB:.2f}" for column in columns)
        lines.append(f"| {part} | {cells} |")
    lines.append("| total | " + " | ".join(f"{column.total / GIB:.2f}" for column in columns) + " |")
    return "\n".join(lines)


def measured_table() -> str:
    """Recorded peaks on a Linux CPU beside the estimate."""
    return comparison(json.loads(RESULTS.read_text())["results"])[0]


TABLES = {"totals": totals_table, "parts": parts_table, "shares": share_table, "measured": measured_table}


def with_tables(text: str) -> str:
    """The document with its tables made anew; ValueError where a table's marks are missing."""
    for name, table in TABLES.items():
        text = put(text, BEGIN.format(name), END.format(name), table())
    return text


if __name__ == "__main__":
    write_or_check(DOC, with_tables, __doc__)
