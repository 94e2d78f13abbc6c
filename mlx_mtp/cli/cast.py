"""Recordings of a terminal in asciinema's format, version 2 (https://docs.asciinema.org/manual/asciicast/v2/)."""

import json
from collections.abc import Iterable
from io import StringIO
from pathlib import Path

from rich.console import Console, RenderableType

from mlx_mtp.errors import StorageError

HOME, CLEAR, HIDE, SHOW = "\x1b[H", "\x1b[2J", "\x1b[?25l", "\x1b[?25h"


def write_cast(
    path: Path, frames: Iterable[tuple[float, RenderableType]], *, columns: int, lines: int, title: str
) -> None:
    """Frames with their seconds -> a file that `asciinema play` shows; StorageError where it cannot be written."""
    header = {
        "version": 2,
        "width": columns,
        "height": lines,
        "title": title,
        "env": {"TERM": "xterm-256color"},
    }
    try:
        with path.open("w", encoding="utf-8") as out:
            out.write(json.dumps(header) + "\n")
            before, seconds = "", 0.0
            out.write(json.dumps([0.0, "o", HIDE + CLEAR]) + "\n")
            for seconds, frame in frames:
                drawn = HOME + rendered(frame, columns, lines).rstrip("\n").replace("\n", "\r\n")
                if drawn != before:
                    out.write(json.dumps([round(seconds, 3), "o", drawn]) + "\n")
                    before = drawn
            out.write(json.dumps([round(seconds + 1, 3), "o", SHOW + "\r\n"]) + "\n")
    except OSError as error:
        raise StorageError(
            f"the recording {path} cannot be written: {error.strerror}; choose another file"
        ) from None


def rendered(frame: RenderableType, columns: int, lines: int) -> str:
    """A frame as a colour terminal of that size gets it."""
    console = Console(
        file=StringIO(), force_terminal=True, color_system="256", width=columns, height=lines, no_color=False,
        highlight=False, legacy_windows=False,
    )  # fmt: skip
    with console.capture() as drawn:
        console.print(frame)
    return drawn.get()
