"""What a line typed into chat is: something for the model, or one of a few commands."""

from dataclasses import dataclass

HELP = """\
/help             this list
/clear            forget the conversation
/system TEXT      start over with this system prompt; without TEXT: none
/regen            answer the last message again, with the next seed
/undo             take back the last message and its answer
/edit             change the last message in your editor and answer it again
/n N              N answers to each message; without a number: how many now
/pick I           go on with answer I of the last ones instead of the first
/set NAME VALUE   temperature, top_k, max_tokens, ...; without words: what they are
/model MODEL      go on with another model; without a name: which it is
/mtp auto|off|N   draft tokens a round; without a word: what it is now
/why              what MTP does with this text, and why
/trace            colours for accepted, recovered and bonus tokens, on and off
/thoughts         what the model thought before its last answer
/stats            figures of the last reply
/save [NAME]      keep the conversation under a name or path; with --kv also what was
                  computed of it, so that going on with it reads nothing again
/load NAME        go on with one that was kept
/resume [I]       list the conversations of this computer, or go on with number I
/exit             leave (Ctrl-D too)
//TEXT            send a line that begins with a slash
Alt-Enter         a new line in a message; lines between \"\"\" and \"\"\" are one, too
Ctrl-G            write the message in your editor
Ctrl-C            stop the reply; twice within 2 s leaves"""

NAMES = (
    "help", "clear", "system", "regen", "undo", "edit", "n", "pick", "set", "model", "mtp", "why", "trace",
    "thoughts", "stats", "save", "load", "resume", "image", "exit",
)  # fmt: skip


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
