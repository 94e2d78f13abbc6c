"""The parts of the command line that need no model: commands, options, status line, Ctrl-C, output."""

import inspect
import io
import sys
import time
from types import SimpleNamespace

import pytest

from mlx_mtp import Sampling
from mlx_mtp.cli import terminal
from mlx_mtp.cli.commands import Command, Message, Unknown, read_line
from mlx_mtp.cli.interrupts import Interrupts
from mlx_mtp.cli.option_groups import takes
from mlx_mtp.cli.options import parse_mtp, reply_options
from mlx_mtp.cli.patience import Patience
from mlx_mtp.cli.status import context_warning, short_count, status_line
from mlx_mtp.cli.terminal import ReplyWriter
from mlx_mtp.errors import ParameterError


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("line", "meaning"),
    [
        ("hello", Message("hello")),
        (" /help", Message(" /help")),
        ("//etc/passwd is what?", Message("/etc/passwd is what?")),
        ("/help", Command("help", "")),
        ("/system  Be brief. ", Command("system", "Be brief.")),
        ("/MTP off", Command("mtp", "off")),
        ("/Users/ann/notes", Unknown("users/ann/notes")),
        ("/", Unknown("")),
    ],
)
def test_lines_are_messages_or_commands(line, meaning):
    assert read_line(line) == meaning


@pytest.mark.parametrize(("word", "k"), [("auto", "auto"), ("OFF", 0), ("0", 0), ("4", 4), (" 15 ", 15)])
def test_mtp_words(word, k):
    assert parse_mtp(word) == k


@pytest.mark.parametrize("word", ["", "on", "-1", "4.0", "٤", "9" * 5000])
def test_other_mtp_words_are_refused_with_a_remedy(word):
    with pytest.raises(ParameterError, match="auto"):
        parse_mtp(word)


def test_command_line_sampling_changes_only_what_was_given():
    given = {"mtp": "off", "max_tokens": 9, "stop": ["END"], "thinking": None}
    typed = reply_options(**given, temperature=0.0, top_k=None, seed=3)
    pair = SimpleNamespace(sampling=Sampling(temperature=1.0, top_k=64, top_p=0.95))
    assert typed.request(pair) == {
        "max_tokens": 9,
        "num_draft_tokens": 0,
        "stop": ("END",),
        "thinking": None,
        "sampling": Sampling(temperature=0.0, top_k=64, top_p=0.95, seed=3),
    }


def test_a_reply_without_a_token_is_refused_before_a_model_is_opened():
    with pytest.raises(ParameterError, match="at least one token"):
        reply_options(mtp="auto", max_tokens=0)


def test_a_group_of_options_stands_where_its_value_is_taken():
    def size(*, wide: int = 3, high: int) -> tuple[int, int]:
        return wide, high

    told = []

    @takes(box=size)
    def command(*, first: str, box: tuple[int, int], last: bool = False) -> None:
        """What it does."""
        told.append((first, box, last))

    shown = inspect.signature(command).parameters
    assert list(shown) == ["first", "wide", "high", "last"] and shown["wide"].default == 3
    assert command.__doc__ == "What it does."
    command(first="a", wide=5, high=7, last=True)
    assert told == [("a", (5, 7), True)]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (3100, "3.1k"), (32000, "32k"), (131072, "131.1k"), (1.2e6, "1.2M")],
)
def test_short_counts(count, text):
    assert short_count(count) == text


def figures(**changes):
    values = {
        "prompt_tokens": 2688,
        "generation_tokens": 412,
        "generation_tps": 38.24,
        "drafted": 600,
        "tokens_per_round": 2.94,
        "draft_acceptance_rate": 0.708,
        "reused_tokens": 812,
        "peak_memory_bytes": 17_830_000_000,
        "reason": None,
    }
    return SimpleNamespace(**(values | changes))


def test_status_line_with_drafting():
    line = "412 tok · 38.2 tok/s · 2.9 tok/round · accept 71 % · ctx 3.1k/32k · reused 812 · 17.8 GB"
    assert status_line(figures(), 32000) == line


def test_plain_speed_stands_in_the_status_line_only_where_it_was_measured():
    assert "tok/s (plain 24.9, ×1.54) · " in status_line(figures(), 32000, plain_tps=24.9)
    assert "plain" not in status_line(figures(), 32000)
    assert "plain" not in status_line(
        figures(drafted=0), 32000, plain_tps=24.9
    )  # it would be compared with itself


@pytest.mark.parametrize(("tokens", "said"), [(22_000, None), (23_000, "80 %"), (28_000, "95 %")])
def test_a_context_that_comes_to_its_end_is_spoken_of(tokens, said):
    warning = context_warning(figures(prompt_tokens=tokens, generation_tokens=3000), 32000)
    assert (warning is None) if said is None else (said in warning)


def test_status_line_of_plain_decoding_claims_no_acceptance():
    stats = figures(drafted=0, reused_tokens=0, reason="parked: no drafter is loaded")
    line = "412 tok · 38.2 tok/s · ctx 3.1k/32k · 17.8 GB · parked: no drafter is loaded"
    assert status_line(stats, 32000) == line


def test_a_second_ctrl_c_within_two_seconds_leaves():
    now = [10.0]
    interrupts = Interrupts(clock=lambda: now[0])
    interrupts.note()
    assert interrupts.asked
    interrupts.settled()
    now[0] = 11.9
    with pytest.raises(KeyboardInterrupt):
        interrupts.note()


def test_a_second_ctrl_c_later_stops_the_next_reply_only():
    now = [10.0]
    interrupts = Interrupts(clock=lambda: now[0])
    interrupts.note()
    interrupts.settled()
    now[0] = 12.1
    interrupts.note()
    assert interrupts.asked


def test_a_second_ctrl_c_while_the_first_is_still_pending_always_leaves():
    now = [10.0]
    interrupts = Interrupts(clock=lambda: now[0])
    interrupts.note()
    now[0] = 60.0
    with pytest.raises(KeyboardInterrupt):
        interrupts.note()


def test_ctrl_c_reaches_the_old_handler_again_after_a_reply():
    import signal

    before = signal.getsignal(signal.SIGINT)
    interrupts = Interrupts()
    with interrupts.during_reply():
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked
    assert signal.getsignal(signal.SIGINT) is before


def written(monkeypatch, pieces, *, stream_type, term="xterm", no_color=None) -> tuple[str, str]:
    out, err = stream_type(), stream_type()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TERM", term)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    reply = ReplyWriter()
    for text, channel in pieces:
        reply.write(text, channel)
    reply.finish()
    terminal.say("done")
    return out.getvalue(), err.getvalue()


HOSTILE = "a\x1b[2J\x1b]52;c;cm0gLXJm\x07b\x9b31mc\x00\r\x08\x7f\u202ed\x1b"


@pytest.mark.parametrize("stream_type", [io.StringIO, Screen])
def test_no_control_byte_of_a_model_is_written(monkeypatch, stream_type):
    pieces = [(char, "answer") for char in HOSTILE] + [(HOSTILE, "thought")]
    out, err = written(monkeypatch, pieces, stream_type=stream_type, no_color="1")
    for text in (out, err):
        assert all(char == "\n" or (char.isprintable() and char != "\x9b") for char in text)
    assert out == "a[2J]52;c;cm0gLXJmb31mc⟨U+202E⟩d\n"


def test_thoughts_go_to_stderr_and_the_answer_alone_to_stdout(monkeypatch):
    pieces = [("hm", "thought"), ("m", "thought"), ("Yes", "answer"), (".", "answer")]
    assert written(monkeypatch, pieces, stream_type=io.StringIO) == ("Yes.\n", "[thought] hmm\ndone\n")


@pytest.mark.parametrize(("chunks", "explained"), [(3, True), (12, False)])
def test_a_reply_that_hardly_begins_is_explained_once(monkeypatch, chunks, explained):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    writer = ReplyWriter()
    writer.write("An", "answer")
    with Patience(writer, seconds=0.05) as patience:
        for _ in range(chunks):
            patience.heard()
        time.sleep(0.3)
    assert sys.stdout.getvalue() == "An"
    assert sys.stderr.getvalue().count("compiles") == int(explained)


def test_thoughts_are_dim_on_a_terminal_and_the_style_ends_before_the_answer(monkeypatch):
    out, err = written(monkeypatch, [("hm", "thought"), ("Yes\n", "answer")], stream_type=Screen)
    assert out == "Yes\n"
    assert err == "\x1b[2m[thought] hm\n\x1b[0m\x1b[2mdone\x1b[0m\n"


@pytest.mark.parametrize(("term", "no_color"), [("dumb", None), ("xterm", "1")])
def test_no_escape_where_none_is_wanted(monkeypatch, term, no_color):
    pieces = [("hm", "thought"), ("Yes", "answer")]
    out, err = written(monkeypatch, pieces, stream_type=Screen, term=term, no_color=no_color)
    assert "\x1b" not in out + err
