"""Where words go: the answer to stdout, all else to stderr, and no control byte but our own."""

import os
import sys
from typing import TextIO

import typer

from mlx_mtp.clean import TerminalCleaner, clean_for_terminal
from mlx_mtp.cli.layout import terminal_columns, wrapped

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def is_smart(stream: TextIO | None) -> bool:
    """Whether `stream` is a terminal that moves its cursor; closed streams, files and TERM=dumb are not."""
    return stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def has_style(stream: TextIO | None) -> bool:
    """Whether dim text may be asked of `stream` (https://no-color.org)."""
    return is_smart(stream) and not os.environ.get("NO_COLOR")


def say(text: str, *, end: str = "\n") -> None:
    """Lines for the person, on stderr; on a terminal broken between words, and dim where that is possible."""
    columns = terminal_columns(sys.stderr)
    text = "\n".join(wrapped(line, columns) for line in clean_for_terminal(text).split("\n"))
    if has_style(sys.stderr):
        text = f"{DIM}{text}{PLAIN}"
    write_aside(text + end)


def write_aside(text: str) -> None:
    """To stderr as it is; a reader who left is no reason to stop the answer."""
    try:
        print(text, end="", file=sys.stderr, flush=True)
    except BrokenPipeError:
        _silence(sys.stderr)


def write_answer(text: str) -> None:
    """To stdout at once; when its reader has left (`| head`), the command ends quietly with 0."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        _silence(sys.stdout)
        raise typer.Exit(0) from None


def hold_standard_files() -> None:
    """Open standard files that came closed on nothing, or the next file opened would take their number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _silence(stream: TextIO) -> None:
    """Point a broken stream at nothing, or Python would complain while it exits."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)


class ReplyWriter:
    """Writes a reply as it comes: the answer to stdout, thoughts and tool calls to stderr, all cleaned."""

    def __init__(self) -> None:
        self._cleaners: dict[str, TerminalCleaner] = {}
        self._channel = "answer"
        self._at_line_start = True

    def write(self, text: str, channel: str) -> None:
        cleaner = self._cleaners.setdefault(channel, TerminalCleaner())
        text = cleaner.push(text)
        if not text:
            return
        if channel != self._channel:
            self._enter(channel)
        if channel == "answer":
            write_answer(text)
        else:
            write_aside(text)
        self._at_line_start = text.endswith("\n")

    def finish(self) -> None:
        """End the last line and any style."""
        self._enter("answer")
        if not self._at_line_start:
            write_answer("\n")

    def note(self, text: str) -> None:
        """A remark in the middle of a reply, on a line of its own where both go to one terminal."""
        if not self._at_line_start and is_smart(sys.stdout):
            write_aside("\n")
        say(text)

    def _enter(self, channel: str) -> None:
        """Leave the current channel, ending its line and style, and say which one begins."""
        if channel == self._channel:
            return
        if self._channel == "answer":
            if not self._at_line_start:
                write_answer("\n")
        else:
            write_aside(("" if self._at_line_start else "\n") + (PLAIN if has_style(sys.stderr) else ""))
        if channel != "answer":
            write_aside((DIM if has_style(sys.stderr) else "") + f"[{channel}] ")
        self._channel = channel
        self._at_line_start = True
