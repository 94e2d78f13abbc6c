"""What the commands of a chat do; each gets the session and the words after its name."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mlx_mtp.cli import chat_files, options
from mlx_mtp.cli.commands import HELP, Command
from mlx_mtp.cli.layout import terminal_columns
from mlx_mtp.cli.question import can_ask
from mlx_mtp.cli.session import Session
from mlx_mtp.cli.status import figures_table
from mlx_mtp.cli.talk import View
from mlx_mtp.cli.terminal import has_style, is_smart, say
from mlx_mtp.cli.trace_style import LEGEND, STYLES
from mlx_mtp.cli.why import explanation
from mlx_mtp.errors import MtpError, ParameterError

NOTHING_YET = "there is nothing to go back to yet"
IMAGES = "images and sound are not read by this program; describe it in words"


class Leave(Exception):
    """The chat is over."""


class OtherModel(Exception):
    """The conversation goes on with another model."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.model = model


def obey(session: Session, command: Command) -> None:
    """Carry out a command; what it refuses is said, and the chat goes on. Raises Leave or OtherModel."""
    try:
        _ACTIONS[command.name](session, command.argument)
    except MtpError as error:
        say(str(error))


def _help(session: Session, argument: str) -> None:
    say(HELP)


def _leave(session: Session, argument: str) -> None:
    raise Leave


def _clear(session: Session, argument: str) -> None:
    session.restart(session.talk.system)
    say("(the conversation is forgotten)")


def _system(session: Session, argument: str) -> None:
    session.restart(argument or None)
    say("(a new conversation with this system prompt)" if argument else "(a new conversation)")


def _stats(session: Session, argument: str) -> None:
    say("no reply yet" if session.stats is None else figures_table(session.stats))


def _why(session: Session, argument: str) -> None:
    say(explanation(session.policy, session.stats, terminal_columns(sys.stderr)))


def _mtp(session: Session, argument: str) -> None:
    if argument:
        from mlx_mtp.policy import make_policy

        k = options.parse_mtp(argument)
        make_policy(k, has_drafter=session.pair.drafter is not None)
        session.talk.options = replace(session.talk.options, num_draft_tokens=k)
    k = session.talk.options.num_draft_tokens
    say(f"MTP is {'off' if k == 0 else 'auto' if k == 'auto' else f'{k} draft tokens a round'}")


def _n(session: Session, argument: str) -> None:
    if argument:
        from mlx_mtp.api import check_answers

        number = int(argument) if argument.isascii() and argument.isdigit() else argument
        session.talk.n = check_answers(number)  # type: ignore[arg-type]  # it refuses what is no number
    n = session.talk.n
    say("one answer to each message" if n == 1 else f"{n} answers to each message")


def _pick(session: Session, argument: str) -> None:
    session.pick(argument)


def _set(session: Session, argument: str) -> None:
    name, _, value = argument.replace("=", " ").partition(" ")
    if argument and not value.strip():
        raise ParameterError(f"/set takes a name and a value, got {argument!r:.40}; try /set temperature 0.7")
    if argument:
        session.talk.set(name.strip().lower().replace("-", "_"), value.strip())
        say(f"({name.strip()} is {value.strip()} from the next reply on)")
    else:
        say(session.talk.settings(session.pair.sampling))


def _model(session: Session, argument: str) -> None:
    if not argument:
        say(f"{session.talk.model}: {session.pair.max_context:,} tokens of context")
        return
    raise OtherModel(argument)


def _regen(session: Session, argument: str) -> None:
    text = session.talk.take_back()
    if text is None:
        say(NOTHING_YET)
        return
    session.talk.next_seed()
    session.say(text)


def _undo(session: Session, argument: str) -> None:
    text = session.talk.take_back()
    say(NOTHING_YET if text is None else "(the last message and its answer are taken back)")


def _edit(session: Session, argument: str) -> None:
    if not can_ask():
        raise ParameterError("/edit needs a terminal; send the message again instead")
    text = session.talk.take_back()
    if text is None:
        say(NOTHING_YET)
        return
    changed = _in_editor(text)
    if not changed.strip():
        say("(nothing was left of the message, and it is taken back)")
        return
    session.say(changed)


def _in_editor(text: str) -> str:
    """The text as it is after the person's editor ended; as it was where that failed."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    with tempfile.TemporaryDirectory(prefix="mlx-mtp-") as folder:
        path = Path(folder) / "message.md"
        path.write_text(text, encoding="utf-8")
        try:
            subprocess.run([*editor.split(), str(path)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            say(f"the editor {editor!r} failed ({error}); set EDITOR; the message is sent as it was")
            return text
        return path.read_text(encoding="utf-8", errors="replace").rstrip("\n")


def _trace(session: Session, argument: str) -> None:
    talk = session.talk
    if talk.view == "trace":
        talk.view = usual_view()
        say("(no more colours by origin)")
        return
    talk.view = "trace"
    if not has_style(sys.stdout):
        say("(tokens cannot be coloured here: this is no terminal with colours)")
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stderr, highlight=False)
    for origin, meaning in LEGEND:
        console.print(Text(f"{origin}: {meaning}", style=STYLES[origin]))


def _thoughts(session: Session, argument: str) -> None:
    say(session.thoughts.strip() or "the last answer came without thoughts; /set thinking on asks for them")


def _image(session: Session, argument: str) -> None:
    raise ParameterError(IMAGES)


def usual_view() -> View:
    """How answers are shown unless told otherwise."""
    return "markdown" if is_smart(sys.stdout) else "plain"


_ACTIONS: dict[str, Callable[[Session, str], None]] = {
    "help": _help,
    "clear": _clear,
    "system": _system,
    "regen": _regen,
    "undo": _undo,
    "edit": _edit,
    "n": _n,
    "pick": _pick,
    "set": _set,
    "model": _model,
    "mtp": _mtp,
    "why": _why,
    "trace": _trace,
    "thoughts": _thoughts,
    "stats": _stats,
    "save": chat_files.save,
    "load": chat_files.load,
    "resume": chat_files.resume,
    "image": _image,
    "exit": _leave,
}
