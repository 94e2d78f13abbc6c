"""What a line typed into chat is: something for the model, or one of a few commands."""

from dataclasses import dataclass

HELP = """\
/help             this list
/clear            forget the conversation
/system TEXT      start over with this system prompt; without TEXT: none
/stats            figures of the last reply
/mtp auto|off|N   draft tokens a round; without a word: what it is now
/n N              N answers to each message; without a number: how many now
/pick I           go on with answer I of the last ones instead of the first
/exit             leave (Ctrl-D too)
//TEXT            send a line that begins with a slash
Ctrl-C            stop the reply; twice within 2 s leaves"""

NAMES = ("help", "clear", "system", "stats", "mtp", "n", "pick", "exit")


@dataclass(frozen=True, slots=True)
class Message:
    """Text for the model."""

    text: str


@dataclass(frozen=True, slots=True)
class Command:
    """A known command and what follows it, stripped."""

    name: str
    argument: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """A line that looks like a command and is none."""

    name: str


def read_line(line: str) -> Message | Command | Unknown:
    """One typed line, without its newline -> what it asks for."""
    if line.startswith("//"):
        return Message(line[1:])
    if not line.startswith("/"):
        return Message(line)
    name, _, argument = line[1:].partition(" ")
    name = name.strip().lower()
    return Command(name, argument.strip()) if name in NAMES else Unknown(name)
