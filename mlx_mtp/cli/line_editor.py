"""Reads what a person types: with line editing on a terminal, plainly from a pipe or a dumb terminal."""

import os
import sys
from collections.abc import Callable

from mlx_mtp.cli.stdin_text import decoded
from mlx_mtp.cli.terminal import is_smart, say, write_aside
from mlx_mtp.errors import StorageError

PROMPT, MORE = "> ", ". "
QUOTES = '"""'
HISTORY = "chat-history"  # in the data folder
ReadLine = Callable[[], str]


def line_reader(*, history: bool = True) -> ReadLine:
    """-> what gives the next message, raising EOFError at the end and KeyboardInterrupt on Ctrl-C.

    Lines between two lines of three quotes are one message. history: typed lines are kept for the next time.
    """
    if is_smart(sys.stdin) and is_smart(sys.stdout):
        return _whole(_editing_reader(history=history))
    return _whole(_plain_reader(prompts=sys.stdin is not None and sys.stdin.isatty()))


def _whole(read: Callable[[str], str]) -> ReadLine:
    def message() -> str:
        line = read(PROMPT)
        if not line.startswith(QUOTES):
            return line
        lines = [line.removeprefix(QUOTES)]
        while not (len(lines) > 1 or lines[0]) or not lines[-1].rstrip().endswith(QUOTES):
            try:
                lines.append(read(MORE))
            except EOFError:
                break
        return "\n".join(lines).rstrip().removesuffix(QUOTES).strip("\n")

    return message


def _plain_reader(*, prompts: bool) -> Callable[[str], str]:
    def read(prompt: str) -> str:
        if prompts:
            write_aside(prompt)
        line = sys.stdin.buffer.readline() if sys.stdin is not None else b""
        if not line:
            raise EOFError
        return decoded(line.rstrip(b"\r\n"), "this line")

    return read


def _editing_reader(*, history: bool) -> Callable[[str], str]:
    """prompt_toolkit with Alt-Enter for a new line and Ctrl-G for an editor; pasted lines stay one message."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output.vt100 import Vt100_Output

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-g")
    def _editor(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()

    # Asking for the cursor's position would wait for terminals that never answer; one line needs no answer.
    output = Vt100_Output.from_pty(sys.stdout, term=os.environ.get("TERM"))
    output.enable_cpr = False
    path = _history_file() if history else None
    kept = InMemoryHistory() if path is None else FileHistory(path)
    session: PromptSession[str] = PromptSession(key_bindings=keys, output=output, history=kept)
    return session.prompt


def _history_file() -> str | None:
    """The file of typed lines, readable by its owner alone; None, said once, where there can be none."""
    from mlx_mtp.store import data_folder, make_folder

    try:
        path = make_folder(data_folder()) / HISTORY
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        path.chmod(0o600)
    except (OSError, StorageError) as error:
        say(f"warning: typed lines are not kept: {error}")
        return None
    return str(path)
