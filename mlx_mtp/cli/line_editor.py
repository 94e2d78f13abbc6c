"""Reads what a person types: with line editing on a terminal, plainly from a pipe or a dumb terminal."""

import sys
from collections.abc import Callable

from mlx_mtp.cli.stdin_text import decoded
from mlx_mtp.cli.terminal import is_smart, write_aside

PROMPT = "> "
ReadLine = Callable[[], str]


def line_reader() -> ReadLine:
    """-> what gives the next line, raising EOFError at the end and KeyboardInterrupt on Ctrl-C."""
    if is_smart(sys.stdin) and is_smart(sys.stdout):
        return _editing_reader()
    return _plain_reader(prompts=sys.stdin is not None and sys.stdin.isatty())


def _plain_reader(*, prompts: bool) -> ReadLine:
    def read() -> str:
        if prompts:
            write_aside(PROMPT)
        line = sys.stdin.buffer.readline() if sys.stdin is not None else b""
        if not line:
            raise EOFError
        return decoded(line.rstrip(b"\r\n"), "this line")

    return read


def _editing_reader() -> ReadLine:
    """prompt_toolkit with Alt-Enter for a new line; pasted lines stay one message."""
    import os

    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output.vt100 import Vt100_Output

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    # Asking for the cursor's position would wait for terminals that never answer; one line needs no answer.
    output = Vt100_Output.from_pty(sys.stdout, term=os.environ.get("TERM"))
    output.enable_cpr = False
    session: PromptSession[str] = PromptSession(key_bindings=keys, output=output)
    return lambda: session.prompt(PROMPT)
