"""Bytes, times and text widths as a person reads them."""

import unicodedata

UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def bytes_text(count: float) -> str:
    """Decimal units, as the hub and Finder count: 812 B, 3.1 MB, 15.2 GB, 128 GB."""
    for scale, unit in UNITS:
        if count >= 0.9995 * scale:
            return f"{_three_digits(count / scale)} {unit}"
    return f"{count:.0f} B"


def share_text(done: float, total: float) -> str:
    """`2.1/4.9 GB`: both in the total's unit."""
    for scale, unit in UNITS:
        if total >= 0.9995 * scale:
            return f"{_three_digits(done / scale)}/{_three_digits(total / scale)} {unit}"
    return f"{done:.0f}/{total:.0f} B"


def _three_digits(value: float) -> str:
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def time_text(seconds: float) -> str:
    """42 s, 12 min, 2 h 10 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min"


def columns_of(text: str) -> int:
    """Columns that `text` takes on a terminal."""
    return sum(_columns(char) for char in text)


def cut(text: str, columns: int) -> str:
    """`text` in at most `columns` columns; what is left out of its middle is marked by `…`."""
    if columns_of(text) <= columns:
        return text
    if columns < 1:
        return ""
    kept = columns - 1
    tail = _fitting(text[::-1], kept // 2)[::-1]
    return _fitting(text, kept - columns_of(tail)) + "…" + tail


def _fitting(text: str, columns: int) -> str:
    used = 0
    for index, char in enumerate(text):
        used += _columns(char)
        if used > columns:
            return text[:index]
    return text


def _columns(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
