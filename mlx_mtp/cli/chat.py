"""`mlx-mtp chat`: a conversation in the terminal."""

from typing import Annotated

import typer

from mlx_mtp.cli import options
from mlx_mtp.cli.commands import HELP, Command, Message, read_line
from mlx_mtp.cli.first_choice import choose_model, remember
from mlx_mtp.cli.interrupts import Interrupts
from mlx_mtp.cli.kernel_tests import KernelTests
from mlx_mtp.cli.line_editor import ReadLine, line_reader
from mlx_mtp.cli.opening import opened, opening
from mlx_mtp.cli.session import Session
from mlx_mtp.cli.status import figures_table
from mlx_mtp.cli.terminal import say
from mlx_mtp.errors import MtpError

REPLY_TOKENS = 4096


def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="[MODEL]",
            help=f"{options.MODEL_HELP} Without it: the one used last, or one that suits this machine.",
        ),
    ] = "",
    drafter: options.Drafter = "auto",
    quantize: options.Quantize = None,
    drafter_bits: options.DrafterBits = "auto",
    revision: options.Revision = None,
    context: options.Context = None,
    yes: options.Yes = False,
    mtp: options.Mtp = "auto",
    max_tokens: options.MaxTokens = REPLY_TOKENS,
    seed: options.Seed = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.Repetition = None,
    presence_penalty: options.Presence = None,
    frequency_penalty: options.Frequency = None,
    stop: options.Stop = None,
    system: options.System = None,
    thinking: options.Thinking = None,
) -> None:
    """Chat: Ctrl-C stops a reply, Ctrl-D leaves, /help lists the commands."""
    reply = options.reply_options(
        mtp=mtp,
        max_tokens=max_tokens,
        stop=stop,
        thinking=thinking,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )
    asked = opening(
        model,
        drafter=drafter,
        quantize=quantize,
        drafter_bits=drafter_bits,
        revision=revision,
        context=context,
        yes=yes,
    )
    if not model:
        asked = choose_model(asked)
    with opened(asked) as pair:
        remember(asked)
        interrupts = Interrupts()
        say("Ctrl-C stops a reply, Ctrl-D leaves, /help lists the commands.")
        session, tests = Session(pair, reply.request(pair), system, interrupts), KernelTests(pair)
        try:
            _converse(session, line_reader(), interrupts, tests)
        finally:
            tests.pause()


def _converse(session: Session, read: ReadLine, interrupts: Interrupts, tests: KernelTests) -> None:
    """Turns until the input ends, /exit, or Ctrl-C twice (which leaves as KeyboardInterrupt)."""
    while True:
        if session.stats is not None:  # never before the first reply
            tests.resume()
        try:
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
            if asked.name == "exit":
                return
            _obey(session, asked)
        else:
            say(f"there is no command /{asked.name}; these are:\n{HELP}")


def _obey(session: Session, command: Command) -> None:
    """Carry out a command other than /exit."""
    if command.name == "help":
        say(HELP)
    elif command.name == "clear":
        session.restart(session.system)
        say("(the conversation is forgotten)")
    elif command.name == "system":
        session.restart(command.argument or None)
        say("(a new conversation with this system prompt)" if command.argument else "(a new conversation)")
    elif command.name == "stats":
        say("no reply yet" if session.stats is None else figures_table(session.stats))
    elif command.name == "mtp":
        _set_mtp(session, command.argument)
    elif command.name == "n":
        _set_answers(session, command.argument)
    elif command.name == "pick":
        session.pick(command.argument)


def _set_mtp(session: Session, argument: str) -> None:
    if argument:
        try:
            session.set_mtp(options.parse_mtp(argument))
        except MtpError as error:
            say(str(error))
            return
    k = session.num_draft_tokens
    say(f"MTP is {'off' if k == 0 else 'auto' if k == 'auto' else f'{k} draft tokens a round'}")


def _set_answers(session: Session, argument: str) -> None:
    """How many answers each message gets from now on."""
    if argument:
        try:
            session.set_answers(int(argument) if argument.isascii() and argument.isdigit() else argument)
        except MtpError as error:
            say(str(error))
            return
    say("one answer to each message" if session.n == 1 else f"{session.n} answers to each message")
