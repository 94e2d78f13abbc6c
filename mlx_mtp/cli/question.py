"""Yes/no questions to the person at the terminal."""

import sys

from mlx_mtp.clean import clean_for_terminal
from mlx_mtp.cli.layout import terminal_columns, wrapped
from mlx_mtp.cli.terminal import write_aside

YES, NO = ("y", "yes"), ("", "n", "no")


def can_ask() -> bool:
    """Whether somebody can read a question (on stderr) and answer it (on stdin)."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def ask(question: str) -> bool:
    """Ask until the answer is yes or no; Enter and Ctrl-D are no, Ctrl-C leaves."""
    shown = wrapped(clean_for_terminal(f"{question} [y/N]"), terminal_columns(sys.stderr))
    while True:
        write_aside(f"{shown} ")
        line = sys.stdin.readline()
        if not line:
            write_aside("\n")
            return False
        word = line.strip().lower()
        if word in YES or word in NO:
            return word in YES
        write_aside("Please type y or n. ")
