"""What a reply looks like on a screen: Markdown by blocks, tokens by origin, and nothing that a terminal obeys."""

import io
import re

import pyte
import pytest
from rich.console import Console

from mlx_mtp.cli import reply_views
from mlx_mtp.cli.markdown_blocks import Blocks
from mlx_mtp.cli.reply_views import MarkdownView, TraceView
from mlx_mtp.reply import Chunk, Written
from mlx_mtp.stats import Stats
from mlx_mtp.stream import Piece

TEXT = """\
# Stacks

A *stack* has **two** ends,
only one of which is used.

```python
def push(self, item):

    self.items.append(item)
```

1. push
2. pop

Done."""
OUR_OWN = re.compile(r"\x1b\[(?:[0-9;]*m|\?25[lh]|[0-9]*[AK]|2K)")  # colours, cursor, lines painted again
HOSTILE = "\x1b]52;c;aGk=\x07a\x1b[2Jb\x9b2Jc\x1b]8;;http://x\x1b\\d\u202ee\x00f"


def in_pieces(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_blocks_are_the_same_however_the_text_is_cut(size):
    blocks, closed = Blocks(), []
    for piece in in_pieces(TEXT, size):
        closed += blocks.push(piece)
    assert closed == [
        "# Stacks",
        "A *stack* has **two** ends,\nonly one of which is used.",
        "```python\ndef push(self, item):\n\n    self.items.append(item)\n```",
        "1. push\n2. pop",
    ]
    assert blocks.finish() == "Done." and blocks.finish() == ""


def test_a_listing_ends_with_its_own_fence_only():
    blocks = Blocks()
    assert blocks.push("````\n```\nx\n```\n\n") == []
    assert blocks.push("````\n") == ["````\n```\nx\n```\n\n````"]


def chunk(text: str, origin: str = "accepted", *, channel: str = "answer", tokens: int = 1) -> Chunk:
    """A chunk of one token that made `text` certain."""
    pieces = (Piece(text=text, channel=channel),)
    said = {"answer": "text", "thought": "thought", "tool": "tool_call"}[channel]
    fields = {"text": "", "thought": "", "tool_call": "", said: text}
    written = tuple(Written(5, origin, pieces if i == 0 else ()) for i in range(tokens))
    return Chunk(**fields, tokens=(5,) * tokens, finish_reason=None, stats=Stats(), written=written)


def screen_of(data: str, columns: int, lines: int = 40) -> list[str]:
    """What a terminal shows after `data`."""
    screen = pyte.Screen(columns, lines)
    pyte.Stream(screen).feed(data.replace("\n", "\r\n"))
    return [line.rstrip() for line in screen.display]


@pytest.fixture
def console(monkeypatch):
    """-> a console of so many columns whose output is kept; every painting is made, however fast it comes."""
    monkeypatch.setattr(reply_views, "SECONDS_A_PAINTING", 0.0)

    def make(columns: int, lines: int = 40, **options) -> Console:
        out = io.StringIO()
        return Console(
            file=out, width=columns, height=lines, force_terminal=True, color_system="256", highlight=False,
            **options,
        )  # fmt: skip

    return make


@pytest.mark.parametrize("columns", [20, 40, 100])
def test_the_screen_after_a_reply_has_each_block_once(console, columns):
    shown = console(columns)
    view = MarkdownView(shown)
    for piece in in_pieces(TEXT, 3):
        view.take(chunk(piece))
    view.finish()
    lines = screen_of(shown.file.getvalue(), columns)
    text = "".join("".join(lines).split())  # a narrow screen breaks lines anywhere
    for word in ("Stacks", "stack", "defpush", "append(item)", "2pop", "Done."):
        assert text.count(word) == 1
    assert "```" not in text and "**" not in text
    assert max(map(len, lines)) <= columns


def test_a_listing_longer_than_the_screen_is_whole_when_it_is_over(console):
    shown = console(60, lines=10)
    view = MarkdownView(shown)
    listing = "\n".join(f"line{i} = {i}" for i in range(40))
    for piece in in_pieces(f"```python\n{listing}\n```\n\n", 9):
        view.take(chunk(piece))
    view.finish()
    text = "\n".join(screen_of(shown.file.getvalue(), 60, lines=400))
    assert [i for i in range(40) if text.count(f"line{i} = {i}\n".rstrip("\n")) == 0] == []


def test_thoughts_are_folded_into_a_line(console):
    shown = console(60)
    view = MarkdownView(shown)
    for _ in range(30):
        view.take(chunk("let me see ", channel="thought"))
    view.take(chunk("Yes."))
    view.finish()
    text = "\n".join(screen_of(shown.file.getvalue(), 60))
    assert "let me see" not in text and "Yes." in text
    assert re.search(r"\(thought for \d+ s, 30 tok; /thoughts shows it\)", text)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize("view", [MarkdownView, TraceView])
def test_nothing_hostile_reaches_the_terminal(console, view, size):
    shown = console(60)
    reply = view(shown)
    for piece in in_pieces(f"{HOSTILE}\n\n```\n{HOSTILE}\n```\n\n", size):
        reply.take(chunk(piece))
    reply.finish()
    left = OUR_OWN.sub("", shown.file.getvalue())
    assert not [char for char in left if not char.isprintable() and char not in "\r\n"]
    assert "⟨U+202E⟩" in left


def test_links_are_shown_in_words(console):
    shown = console(80)
    view = MarkdownView(shown)
    view.take(chunk("[bank](https://evil.example)\n\n"))
    view.finish()
    assert "\x1b]8" not in shown.file.getvalue() and "https://evil.example" in shown.file.getvalue()


def test_tokens_are_coloured_by_where_they_came_from(console):
    shown = console(60)
    view = TraceView(shown)
    for text, origin in (
        ("one ", "prefill"),
        ("two ", "accepted"),
        ("three ", "recovered"),
        ("four", "bonus"),
    ):
        view.take(chunk(text, origin))
    view.finish()
    screen = pyte.Screen(60, 5)
    pyte.Stream(screen).feed(shown.file.getvalue().replace("\n", "\r\n"))
    cells = {char: screen.buffer[0]["one two three four".index(char)] for char in ("n", "w", "h", "f")}
    assert (cells["n"].fg, cells["n"].bold) == ("default", False)
    assert (cells["w"].fg, cells["w"].bold) == ("green", True)
    assert (cells["h"].fg, cells["h"].underscore) == ("brown", True)  # pyte's name for yellow
    assert (cells["f"].fg, cells["f"].italics) == ("cyan", True)


def test_without_colours_origins_are_still_told_apart(console):
    shown = console(60, no_color=True)
    view = TraceView(shown)
    view.take(chunk("two", "accepted"))
    view.take(chunk("three", "recovered"))
    view.finish()
    text = shown.file.getvalue()
    assert "\x1b[1m" in text and "\x1b[4m" in text and "\x1b[32" not in text and "\x1b[1;32" not in text
