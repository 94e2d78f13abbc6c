"""`mlx-mtp race`: two arms recorded, compared, replayed and written down."""

import io
import json

import pyte
import pytest
from rich.console import Console

from cli_runs import one_line, run_main, write_chat_pair
from mlx_mtp.cli.cast import write_cast
from mlx_mtp.cli.race import verdict
from mlx_mtp.cli.race_record import Arm, Mark, first_difference
from mlx_mtp.cli.race_view import Panes
from mlx_mtp.stats import Stats


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_pair(tmp_path_factory.mktemp("pair"))


def arm(name: str, tokens: list[list[int]], seconds: float, **stats) -> Arm:
    """An arm whose tokens come evenly; its words are w0, w1, .."""
    marks = []
    most = max(map(len, tokens))
    for i in range(most):
        for row, own in enumerate(tokens):
            if i < len(own):
                at = seconds * i / (most - 1)
                marks.append(Mark(at, row, f"w{i} ", "accepted" if i % 2 else "bonus"))
    return Arm(name, tuple(marks), tuple(map(tuple, tokens)), (Stats(**stats),) * len(tokens))


def shown(panes: Panes, seconds: float, columns: int, lines: int) -> str:
    out = io.StringIO()
    Console(file=out, width=columns, height=lines, force_terminal=True).print(panes.at(seconds))
    screen = pyte.Screen(columns, lines)
    pyte.Stream(screen).feed(out.getvalue().replace("\n", "\r\n"))
    return "\n".join(line.rstrip() for line in screen.display)


PLAIN, MTP = arm("plain", [list(range(21))], 4.0), arm("MTP", [list(range(21))], 2.0)


def test_the_verdict_on_equal_texts():
    text = verdict(PLAIN, MTP)
    assert text.startswith("21 tokens identical, ×2.00 (5.0 -> 10.0 tok/s); recorded one after the other")


def test_the_verdict_on_different_texts_names_the_place():
    other = arm("MTP", [[*range(9), 99, *range(10, 21)]], 2.0)
    assert first_difference(PLAIN, other) == (0, 9)
    assert "differ from token 10 on" in verdict(PLAIN, other)
    shorter = arm("MTP", [list(range(20))], 2.0)
    assert first_difference(PLAIN, shorter) == (0, 20)


def test_the_verdict_says_why_drafting_is_parked():
    assert verdict(PLAIN, arm("MTP", [list(range(21))], 4.0, reason="parked: why")).endswith("; parked: why")


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_both_arms_are_shown_as_far_as_they_were(columns):
    panes = Panes((PLAIN, MTP), "title", columns, 24)
    text = shown(panes, 1.0, columns, 24)
    assert text.count("w5") == 2 and "w10" in text  # plain has 6 words by then, MTP 11
    assert text.count("w10") == 1 and "w11" not in text
    assert "plain: 6 tok · 5.0 tok/s" in text and "MTP: 11 tok · 10.0 tok/s" in text
    text = shown(panes, 4.0, columns, 24)
    assert "done in 4.0 s" in text and "done in 2.0 s" in text


def test_several_answers_have_their_own_lines():
    arms = (
        arm("plain", [list(range(5)), list(range(7))], 1.0),
        arm("MTP", [list(range(5)), list(range(7))], 1.0),
    )
    text = shown(Panes(arms, "t", 100, 20), 1.0, 100, 20)
    assert text.count("answer 2") == 2 and "w6" in text


def test_a_long_text_shows_its_end():
    long = arm("plain", [list(range(2000))], 1.0)
    text = shown(Panes((long, long), "t", 80, 12), 1.0, 80, 12)
    assert text.count("w1999") == 2 and "w100 " not in text


def test_words_of_a_model_command_no_terminal():
    evil = Arm(
        "plain",
        (Mark(0.0, 0, "a\x1b]52;c;x\x07", "plain"), Mark(1.0, 0, "\x9bb", "plain")),
        ((1, 2),),
        (Stats(),),
    )
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=True).print(Panes((evil, evil), "t", 80, 10).at(1.0))
    assert "\x1b]" not in out.getvalue() and "\x9b" not in out.getvalue() and "\x07" not in out.getvalue()


def test_a_recording_is_a_cast_that_a_terminal_can_play(tmp_path):
    panes = Panes((PLAIN, MTP), "title", 100, 20)
    path = tmp_path / "race.cast"
    write_cast(path, [(t / 10, panes.at(t / 10)) for t in range(41)], columns=100, lines=20, title="race")
    header, *events = [json.loads(line) for line in path.read_text().splitlines()]
    assert header["version"] == 2 and (header["width"], header["height"]) == (100, 20)
    times = [event[0] for event in events]
    assert times == sorted(times) and {event[1] for event in events} == {"o"}
    screen = pyte.Screen(100, 20)
    stream = pyte.Stream(screen)
    for event in events:
        stream.feed(event[2])
    text = "\n".join(screen.display)
    assert "w20" in text and "done in 4.0 s" in text


def test_a_race_of_a_pair(model, tmp_path):
    cast = tmp_path / "race.cast"
    done = run_main("race", model, "--max-tokens", "40", "--mtp", "2", "-n", "2", "--json", "--cast", cast)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["identical"] and found["first_difference"] is None
    assert found["arms"]["plain"]["tokens"] == found["arms"]["MTP"]["tokens"]
    assert all(stats["drafted"] == 0 for stats in found["arms"]["plain"]["stats"])
    assert all(stats["drafted"] > 0 for stats in found["arms"]["MTP"]["stats"])
    assert cast.stat().st_size > 1000


def test_a_race_off_the_terminal_gives_one_line(model):
    done = run_main("race", model, "--max-tokens", "12")
    assert done.returncode == 0
    assert done.stdout.decode().count("\n") == 1 and b"identical" in done.stdout
    assert b"\x1b" not in done.stdout + done.stderr


def test_a_race_without_drafts_is_refused(model):
    done = run_main("race", model, "--mtp", "off")
    assert done.returncode == 2 and "one arm" in one_line(done.stderr)


def test_a_recording_that_cannot_be_written_is_one_clear_line(model, tmp_path):
    done = run_main("race", model, "--max-tokens", "4", "--cast", tmp_path / "missing" / "race.cast")
    assert done.returncode != 0 and "cannot be written" in done.stderr.decode()
