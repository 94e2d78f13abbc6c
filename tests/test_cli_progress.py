"""Progress on stderr: what is on the screen of a terminal, and the lines a log gets."""

import io
import re
import sys

import pytest

from mlx_mtp.cli import progress_line
from mlx_mtp.cli.progress_line import ProgressLine
from mlx_mtp.cli.sizes import bytes_text, columns_of, cut, share_text, time_text
from mlx_mtp.progress import Progress

GB = 10**9


class Screen(io.StringIO):
    """A terminal that knows carriage return and newline, as every one does."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        shown: list[str] = []
        for row in self.getvalue().split("\n"):
            line: list[str] = []
            for piece in row.split("\r"):
                line[: len(piece)] = piece
            shown.append("".join(line).rstrip())
        return shown


@pytest.fixture
def show(monkeypatch):
    """(reports as (seconds, Progress), columns or None for no terminal, TERM) -> the lines on stderr's screen."""

    def shown(reports, *, columns=None, term="xterm", no_color="1", stay=False):
        stream = Screen() if columns else io.StringIO()
        now = [0.0]
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", term)
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr(ProgressLine, "_columns", lambda self: columns - 1)
        line = ProgressLine(lambda: now[0], ticks=False)
        with line:
            for now[0], progress in reports:
                line(progress)
            if stay:
                return Screen.lines(stream)
        return Screen.lines(stream) if columns else stream.getvalue().splitlines()

    return shown


def download(seconds: int, *, done: int = GB // 10, total: int = 4 * GB, message: str = "downloading e4b"):
    """A report each second, at `done` bytes a second."""
    return [(second, Progress("download", message, done * second, total)) for second in range(seconds + 1)]


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (100, "downloading e4b  30 %  1.2/4.0 GB  100 MB/s  28 s left"),
        (40, "30 %  1.2/4.0 GB  100 MB/s  28 s left"),
        (34, "30 %  1.2/4.0 GB  100 MB/s"),
        (20, "30 %  1.2/4.0 GB"),
        (8, "30 %"),
    ],
)
def test_a_terminal_shows_one_line_that_fits(show, columns, line):
    assert show(download(12), columns=columns, stay=True) == [line]


def test_a_long_message_is_cut_in_its_middle_before_figures_are_dropped(show):
    message = "downloading mlx-community/gemma-4-26b-a4b-it-qat-4bit"
    (line,) = show(download(12, message=message), columns=80, stay=True)
    assert re.fullmatch(r"downloading mlx-co\S*…\S*-qat-4bit  30 %  1\.2/4\.0 GB  100 MB/s  28 s left", line)
    assert len(line) == 79


def test_nothing_stale_is_left_where_a_line_gets_shorter(show):
    reports = [*download(1, message="a message of many words"), (2, Progress("read", "reading"))]
    assert show(reports, columns=80, stay=True) == ["reading"]


def test_a_finished_download_leaves_one_line_and_a_broken_one_none(show):
    assert show(download(40), columns=80) == ["downloaded 4.0 GB in 40 s", ""]
    assert show(download(39), columns=80) == [""]


def test_what_was_there_before_counts_for_neither_speed_nor_sum(show):
    resumed = [(second, Progress("download", "d", (30 + second) * GB // 10, 4 * GB)) for second in range(11)]
    assert show(resumed[:-1], columns=80, stay=True) == ["d  97 %  3.9/4.0 GB  100 MB/s  1 s left"]
    assert show(resumed, columns=80) == ["downloaded 1.0 GB in 10 s", ""]


def test_a_download_of_nothing_is_not_announced_as_done(show):
    assert show([(0, Progress("download", "d", GB, GB))], columns=80) == [""]


def test_the_speed_is_that_of_the_last_ten_seconds(show):
    slow = [
        (second, Progress("download", "d", 20 * GB // 10 + second * GB // 100, 4 * GB))
        for second in range(21, 40)
    ]
    (line,) = show([*download(20), *slow], columns=80, stay=True)
    assert "10.0 MB/s" in line


def test_a_log_gets_a_line_at_each_tenth_and_each_ten_seconds(show):
    lines = show(download(40))
    assert lines[0] == "downloading e4b  0 %  0.0/4.0 GB"
    assert lines[-1] == "downloaded 4.0 GB in 40 s"
    assert [line.split("  ")[1] for line in lines[:-1]] == [f"{tenth} %" for tenth in range(0, 100, 10)]
    lines = show(download(40, total=400 * GB))
    assert [line.split("  ")[2] for line in lines] == [
        f"{second // 10}.0/400 GB" for second in range(0, 41, 10)
    ]


def test_a_dumb_terminal_is_a_log(show):
    assert show(download(40), columns=80, term="dumb") == [*show(download(40)), ""]


def test_short_stages_say_nothing_to_a_log_unless_they_last(show):
    quick = [(0, Progress("read", "reading x")), (3, Progress("prefill", "reading the prompt", 512, 4096))]
    assert show(quick) == []
    assert show([(0, Progress("wait", "waiting for y")), (10, Progress("wait", "waiting for y"))]) == [
        "waiting for y  10 s"
    ]


def test_a_download_that_waits_for_its_connection_is_still_one_download(show):
    cut = Progress("wait", "the connection broke; it goes on in 4 s", 2 * GB, 4 * GB)
    after = [
        (24 + second, Progress("download", "d", (20 + second) * GB // 10, 4 * GB)) for second in range(21)
    ]
    reports = [*download(20), (20, cut), *after]
    assert show(reports, columns=80) == ["downloaded 4.0 GB in 44 s", ""]
    assert show(reports[:22], columns=80, stay=True)[-1].startswith(
        "the connection broke; it goes on in 4 s  50 %"
    )
    assert [line for line in show(reports) if "broke" in line] == [
        "the connection broke; it goes on in 4 s  50 %  2.0/4.0 GB  100 MB/s  20 s left"
    ]


def test_a_file_that_is_fetched_again_gives_no_negative_speed(show):
    again = [(21 + second, Progress("download", "d", second * GB // 10, 4 * GB)) for second in range(5)]
    (line,) = show([*download(20), *again], columns=80, stay=True)
    assert line == "d  10 %  0.4/4.0 GB  100 MB/s  36 s left"


def test_a_prefill_counts_tokens(show):
    reports = [(0, Progress("prefill", "reading the prompt", 512, 4096))]
    assert show(reports, columns=80, stay=True) == ["reading the prompt  12 %  512/4.1k tokens"]


def test_hostile_names_move_no_cursor(show):
    (line,) = show([(0, Progress("read", "reading \x1b[2J\nx\ty"))], columns=80, stay=True)
    assert line == "reading [2J x y"


def test_no_escape_is_written_under_no_color(monkeypatch):
    stream = Screen()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    with ProgressLine(ticks=False) as line:
        for _, progress in download(40):
            line(progress)
    assert "\x1b" not in stream.getvalue()


def test_a_stalled_download_does_not_keep_its_old_speed(monkeypatch):
    """Without news the line is painted again, with the speed since then."""
    stream = Screen()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress_line, "TICK_S", 0.05)
    monkeypatch.setattr(ProgressLine, "_columns", lambda self: 79)
    now = [0.0]
    with ProgressLine(lambda: now[0]) as line:
        for now[0], progress in download(10):
            line(progress)
        assert "100 MB/s" in stream.lines()[-1]
        now[0] = 60.0
        for _ in range(200):
            if "0 B/s" in stream.lines()[-1]:
                break
            line._ended.wait(0.02)
        assert "0 B/s" in stream.lines()[-1]
        assert "left" not in stream.lines()[-1]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_400, "999 kB"),
        (999_500, "1.0 MB"),
        (15_234_000_000, "15.2 GB"),
        (99_960_000_000, "100 GB"),
        (2.5e12, "2.5 TB"),
    ],
)
def test_bytes_in_decimal_units(count, text):
    assert bytes_text(count) == text


def test_shares_and_times():
    assert share_text(50_000_000, 4 * GB) == "0.1/4.0 GB"
    assert [time_text(seconds) for seconds in (0.2, 42, 99.4, 100, 720, 5999, 7800, 86_400)] == [
        "0 s",
        "42 s",
        "99 s",
        "2 min",
        "12 min",
        "1 h 40 min",
        "2 h 10 min",
        "24 h 00 min",
    ]


@pytest.mark.parametrize("columns", range(12))
def test_cut_text_never_takes_more_columns(columns):
    for text in ("gemma-4-e4b", "模型资料夹一二三四", "e\u0301" * 20, "a模b型c"):
        shown = cut(text, columns)
        assert columns_of(shown) <= columns
        assert shown == text or columns < 1 or "…" in shown
