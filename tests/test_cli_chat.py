"""`mlx-mtp chat` as a person at a terminal sees it, and from a pipe."""

import re
import resource
import signal
import time
from pathlib import Path

import pexpect
import pytest

from cli_runs import COMMAND, babble, environment, one_line, run_cli, run_main, write_chat_pair

PATIENCE_S = 180
SHORT = ("--max-tokens", "8", "--seed", "3", "--mtp", "off")
STATUS = r"(\d+) tok · [\d.]+ tok/s (?:\(plain [^)]*\) )?· [^\r\n]*ctx [\d.k]+/512[^\r\n]*\r\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_chat_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def endless(model) -> tuple[str, ...]:
    """Options under which a reply to "Why?" is long."""
    return babble(model)[1:]


class Terminal(pexpect.spawn):
    """A chat on a pseudo-terminal."""

    def __init__(
        self, model: Path | str, *words: str, term: str, columns: int = 100, env: dict[str, str] | None = None
    ) -> None:
        arguments = [*COMMAND[1:], "chat", str(model), *words]
        super().__init__(
            COMMAND[0],
            arguments,
            env=environment(TERM=term, **(env or {})),
            encoding="utf-8",
            timeout=PATIENCE_S,
            dimensions=(30, columns),
        )
        self.expect(r"/help\s+lists\s+the\s+commands")

    def ready(self) -> None:
        self.expect(r">( |\x08)")  # with line editing the blank after it is a movement of the cursor

    def left_with(self) -> int | None:
        self.expect(pexpect.EOF)
        self.close()
        return self.exitstatus


def test_a_session_with_every_command(model):
    chat = Terminal(model, *SHORT, term="dumb")
    chat.ready()
    chat.sendline("Why is the sky blue?")
    chat.expect(STATUS)
    assert "reused" not in chat.match[0]
    chat.sendline("And the sea?")
    chat.expect(STATUS)
    assert "reused" in chat.match[0]
    for typed, shown in (
        ("/stats", r"reused_tokens +\d+"),
        ("/help", r"/mtp auto\|off\|N"),
        ("/dance", r"there is no command /dance"),
        ("/mtp", r"MTP is off"),
        ("/mtp 99", r"num_draft_tokens must be"),
        ("/mtp sometimes", r"auto, off or a number"),
        ("/mtp auto", r"MTP is auto"),
        ("/mtp 2", r"MTP is 2 draft tokens a round"),
        ("//help", r"tok/round · accept"),
        ("/clear", r"the conversation is forgotten"),
    ):
        chat.sendline(typed)
        chat.expect(shown)
    chat.sendline("Why is the sky blue?")
    chat.expect(STATUS)
    assert "reused" not in chat.match[0]
    chat.sendline("/system Be brief.")
    chat.expect("a new conversation with this system prompt")
    chat.sendline("/exit")
    assert chat.left_with() == 0


def test_ctrl_d_leaves_with_0(model):
    chat = Terminal(model, *SHORT, term="xterm")
    chat.ready()
    chat.sendeof()
    assert chat.left_with() == 0


def test_ctrl_c_stops_the_reply_and_keeps_the_session():
    """With the demo pair, whose replies at a high temperature take many seconds."""
    hot = ("--temperature", "5", "--top-k", "0", "--top-p", "1", "--mtp", "off", "--seed", "1")
    chat = Terminal("demo", *hot, "--max-tokens", "8000", term="dumb")
    chat.ready()
    for question, reused in (("Why?", False), ("And now?", True)):
        chat.sendline(question)
        chat.expect(re.escape(question) + r"\r\n[^\r\n]")
        chat.sendintr()
        chat.expect_exact("(stopped)")
        chat.expect(r"(\d+) tok · [^\r\n]*\r\n")
        assert int(chat.match[1]) < 8000
        assert ("reused" in chat.match[0]) is reused
        chat.ready()
        time.sleep(2.1)  # a second Ctrl-C within two seconds would leave
    chat.sendline("/stats")
    chat.expect("generation_tokens")
    chat.sendeof()
    assert chat.left_with() == 0


def test_ctrl_c_twice_at_an_empty_prompt_leaves_with_130(model):
    chat = Terminal(model, *SHORT, term="xterm")
    chat.ready()
    chat.sendintr()
    chat.expect_exact("(Ctrl-C again or Ctrl-D leaves)")
    chat.ready()
    chat.sendintr()
    assert chat.left_with() == 130


def test_line_editing_on_a_terminal_of_20_columns(model):
    chat = Terminal(model, *SHORT, term="xterm", columns=20)
    chat.ready()
    chat.send("Why is tge\x7f\x7fhe sky blue today, and not green?\r")
    chat.expect(r"\d tok")
    chat.ready()
    chat.sendeof()
    assert chat.left_with() == 0


def test_nothing_the_model_says_commands_the_terminal(model, endless):
    """On a dumb terminal the program writes no escape of its own, so any would be the model's."""
    chat = Terminal(model, *endless, term="dumb")
    chat.ready()
    chat.sendline("Why?")
    chat.expect(STATUS)
    shown = chat.before
    assert len(shown) > 300
    assert not [char for char in shown if not char.isprintable() and char not in "\r\n\t\ufffd"]
    chat.sendeof()
    assert chat.left_with() == 0


def test_piped_lines_are_turns(model):
    lines = b"Why?\n\n   \nAnd then?\n/mtp\n"
    done = run_cli("chat", model, *SHORT, stdin=lines, TERM="xterm")
    assert done.returncode == 0
    said = done.stderr.decode()
    assert said.count(" tok/s") == 2
    assert "reused" in said
    assert "MTP is off" in said
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"tok/s" not in done.stdout


def test_piped_bytes_that_are_not_utf8_do_not_end_the_chat(model):
    done = run_cli("chat", model, *SHORT, stdin=b"A \xff fox\nWhy?\n")
    assert done.returncode == 0
    said = done.stderr.decode()
    assert said.count(" tok/s") == 2
    assert said.count("U+FFFD") == 1


def test_a_turn_that_does_not_fit_is_refused_and_the_chat_goes_on(model):
    done = run_main("chat", model, *SHORT, stdin=b"x " * 600 + b"\nWhy?\n")
    assert done.returncode == 0
    said = done.stderr.decode()
    assert "shorten the prompt" in said
    assert said.count(" tok/s") == 1


def test_without_a_model_it_says_what_to_type(tmp_path):
    done = run_main("chat", HOME=str(tmp_path), HF_HOME=str(tmp_path))
    assert done.returncode == 2
    assert "mlx-mtp chat demo" in one_line(done.stderr)


def test_the_demo_pair_says_what_it_is():
    done = run_main("chat", "demo", stdin=b"/exit\n")
    assert done.returncode == 0
    said = done.stderr.decode()
    assert "It is not Gemma" in said
    assert "It is no assistant" in said


def test_a_reply_stopped_while_the_prompt_is_read_is_taken_back(model):
    import mlx_mtp
    from mlx_mtp.cli.interrupts import Interrupts
    from mlx_mtp.cli.options import ReplyOptions
    from mlx_mtp.cli.session import Session
    from mlx_mtp.cli.talk import Talk

    interrupts = Interrupts()
    options = ReplyOptions(4, 0, (), None, {"temperature": 0.0})
    session = Session(mlx_mtp.load(model), Talk(str(model), options, "plain"), interrupts)
    whole = session._stop_if_asked

    def press(done: int, total: int) -> None:
        signal.raise_signal(signal.SIGINT)
        whole(done, total)

    session._stop_if_asked = press
    session.say("Why?")
    assert session.stats is None
    assert session.talk.messages == []
    session._stop_if_asked = whole
    session.say("Why?")
    assert session.stats is not None
    assert len(session.talk.messages) == 2


def test_the_prompt_comes_within_two_seconds():
    """Of processor time, so that a busy machine does not decide; on the wall: bench/start_time.py."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        chat = Terminal("demo", term="xterm-256color")
        chat.ready()
        chat.sendeof()
        assert chat.left_with() == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(2)) < 2.0
