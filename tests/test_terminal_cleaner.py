"""What reaches the terminal: no byte that it obeys, nothing that hides or reorders text, however it is cut."""

import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mtp.clean import TerminalCleaner, clean_for_terminal

HOSTILE = [
    "\x1b]0;title\x07",
    "\x1b]52;c;ZXZpbA==\x1b\\",
    "\x1b[2J\x1b[H",
    "\x1b]8;;http://evil\x07link\x1b]8;;\x07",
    "\x9b31m",
    "\x9d52;c;x\x9c",
    "\x1bP1$r\x1b\\",
    "\r\b\x7f\x00\x0e\x0f",
    "\u202etxt.exe\u202c",
    "\u2066a\u2069\u200b\ufeff\u2028",
    "\U000e0041\U000e007f",
    "\ud800",
]


@given(
    st.lists(st.one_of(st.text(max_size=5), st.sampled_from(HOSTILE)), max_size=8).map("".join),
    st.lists(st.integers(0, 60), max_size=8),
)
@settings(max_examples=250, deadline=None)
def test_nothing_active_is_left_and_cuts_change_nothing(text: str, cuts: list[int]) -> None:
    whole = clean_for_terminal(text)
    kinds = {unicodedata.category(char) for char in whole if char not in "\n\t"}
    assert "Cc" not in kinds
    assert "Cs" not in kinds
    assert not re.search(
        "[\u200b\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ufeff\U000e0000-\U000e007f]", whole
    )
    whole.encode()
    cleaner = TerminalCleaner()
    ends = sorted(cuts)
    assert (
        "".join(cleaner.push(text[a:b]) for a, b in zip([0, *ends], [*ends, len(text)], strict=True)) == whole
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("line\r\nline", "line\nline"),
        ("\x1b]52;c;ZXZpbA==\x07", "]52;c;ZXZpbA=="),
        ("\x1b[31mred\x1b[0m", "[31mred[0m"),
        ("\x9b31m", "31m"),
        ("a\u202eb", "a⟨U+202E⟩b"),
        ("a\u200bb\u2028\ufeff", "a⟨U+200B⟩b⟨U+2028⟩⟨U+FEFF⟩"),
        ("\U000e0041", "⟨U+E0041⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("a\u200db \u200d\u200d^\u200d", "a⟨U+200D⟩b ⟨U+200D⟩⟨U+200D⟩^⟨U+200D⟩"),
        ("👩\u200c", "👩⟨U+200C⟩"),
        ("naïve 中文 🐢 \xa0 \ue000", "naïve 中文 🐢 \xa0 \ue000"),
        ("👩\u200d💻 ❤\ufe0f\u200d🔥 👩🏽\u200d🔬", "👩\u200d💻 ❤\ufe0f\u200d🔥 👩🏽\u200d🔬"),
        ("می\u200cخواهم क्\u200dष", "می\u200cخواهم क्\u200dष"),
        ("\u0661\u0600", "\u0661\u0600"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert clean_for_terminal(text) == shown
    cleaner = TerminalCleaner()
    assert "".join(map(cleaner.push, text)) == shown
