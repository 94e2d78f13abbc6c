"""`mlx-mtp chat`: a conversation in the terminal."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Annotated

import typer

from mlx_mtp.cli import options
from mlx_mtp.cli.chat_commands import Leave, OtherModel, obey, usual_view
from mlx_mtp.cli.chat_files import go_on_with
from mlx_mtp.cli.commands import HELP, Command, Message, read_line
from mlx_mtp.cli.first_choice import choose_model, remember
from mlx_mtp.cli.idle_calibration import IdleCalibration
from mlx_mtp.cli.interrupts import Interrupts
from mlx_mtp.cli.json_turns import JsonTurns
from mlx_mtp.cli.kernel_tests import KernelTests
from mlx_mtp.cli.line_editor import ReadLine, line_reader
from mlx_mtp.cli.opening import Opening, opened, opening
from mlx_mtp.cli.option_groups import takes
from mlx_mtp.cli.session import Session
from mlx_mtp.cli.stdin_text import argument_text, piped_text
from mlx_mtp.cli.talk import Talk
from mlx_mtp.cli.terminal import say
from mlx_mtp.cli.transcripts import conversation_path, kept_conversations, new_name
from mlx_mtp.errors import MtpError, ParameterError

REPLY_TOKENS = 4096


@takes(wanted=opening, reply=partial(options.reply_options, max_tokens=REPLY_TOKENS))
def chat(
    *,
    model: options.ModelOrLast = "",
    prompt: Annotated[
        str, typer.Argument(metavar="[PROMPT]", help="The first message; with piped text: the only one.")
    ] = "",
    wanted: Opening,
    reply: options.ReplyOptions,
    system: options.System = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Show answers as they are, not as Markdown.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the conversation kept last.")] = False,
    history: Annotated[
        bool,
        typer.Option("--history/--no-history", help="Keep typed lines and conversations for the next time."),
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object at the end instead of text.")
    ] = False,
    as_jsonl: Annotated[
        bool, typer.Option("--jsonl", help="A JSON object for each turn instead of text.")
    ] = False,
) -> None:
    """Chat: Ctrl-C stops a reply, Ctrl-D leaves, /help lists the commands."""
    if as_json and as_jsonl:
        raise ParameterError("--json gives one object, --jsonl one for each turn; choose one of them")
    asked = wanted.of(model)
    turns = JsonTurns(at_once=as_jsonl) if as_json or as_jsonl else None
    first = _first_message(prompt)
    talk = Talk(asked.model, reply, "plain" if plain or turns is not None else usual_view())
    talk.restart(system)
    _keep_it(talk, history=history and turns is None, resume=resume)
    if not model:
        asked = choose_model(asked)
    _chat(asked, talk, lambda: _given(first, line_reader(history=history)), turns, resume=resume)
    if turns is not None:
        turns.finish(talk.model)


def _first_message(prompt: str) -> str | None:
    """The message of the command line, with what is piped in behind it; None where there is none."""
    if not prompt:
        return None
    return "\n\n".join(part for part in (argument_text(prompt), piped_text()) if part)


def _given(first: str | None, read: ReadLine) -> ReadLine:
    """The first message, then what is typed; nothing more where nobody can type."""
    if first is None:
        return read
    left = [f"/{first}" if first.startswith("/") else first]

    def next_line() -> str:
        if left:
            return left.pop()
        if not sys.stdin.isatty():
            raise EOFError
        return read()

    return next_line


def _keep_it(talk: Talk, *, history: bool, resume: bool) -> None:
    """Where the conversation is kept: under the time it began, or where the last one was."""
    if resume:
        kept = kept_conversations()
        if not kept:
            raise ParameterError("no conversation was kept here yet; leave out --resume")
        talk.kept_as = kept[0][0]
    elif history and sys.stdin is not None and sys.stdin.isatty():
        talk.kept_as = conversation_path(new_name())


def _chat(
    asked: Opening,
    talk: Talk,
    make_reader: Callable[[], ReadLine],
    turns: JsonTurns | None,
    *,
    resume: bool,
) -> None:
    """Talk with one model after another until the person leaves; the terminal is left alone until one is open."""
    read: ReadLine | None = None
    interrupts, before = Interrupts(), None
    while True:
        with ExitStack() as stack:
            try:
                pair = stack.enter_context(opened(asked))
            except MtpError as error:
                if before is None:
                    raise
                say(f"{error}\n(going on with {before.model})")
                asked, before = before, None
                continue
            remember(asked)
            talk.model = asked.model
            say("Ctrl-C stops a reply, Ctrl-D leaves, /help lists the commands.")
            session, tests = Session(pair, talk, interrupts, turns), KernelTests(pair)
            calibration = IdleCalibration(pair)
            if resume and talk.kept_as is not None:
                go_on_with(session, talk.kept_as)
                resume = False
            try:
                read = read or make_reader()
                _converse(session, read, interrupts, tests, calibration)
                return
            except OtherModel as other:
                asked, before = Opening(other.model, yes=asked.yes), asked
            finally:
                tests.pause()


def _converse(
    session: Session,
    read: ReadLine,
    interrupts: Interrupts,
    tests: KernelTests,
    calibration: IdleCalibration,
) -> None:
    """Turns until the input ends, /exit, or Ctrl-C twice (which leaves as KeyboardInterrupt)."""
    while True:
        try:
            if session.stats is not None:  # never before the first reply
                if session.talk.options.num_draft_tokens == "auto":
                    calibration.play()
                tests.resume()
            line = read()
        except EOFError:
            return
        except KeyboardInterrupt:
            interrupts.note()
            say("(Ctrl-C again or Ctrl-D leaves)")
            continue
        finally:
            tests.pause()
        interrupts.settled()
        asked = read_line(line)
        if isinstance(asked, Message):
            if asked.text.strip():
                session.say(asked.text)
        elif isinstance(asked, Command):
            try:
                obey(session, asked)
            except Leave:
                return
        else:
            say(f"there is no command /{asked.name}; these are:\n{HELP}")
