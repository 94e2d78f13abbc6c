"""How a reply looks while it comes: plain text, Markdown, or tokens coloured by where they came from."""

import sys
import time
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from mlx_mtp.clean import TerminalCleaner
from mlx_mtp.cli.markdown_blocks import Blocks
from mlx_mtp.cli.terminal import ReplyWriter, has_style, say
from mlx_mtp.cli.trace_style import STYLES

if TYPE_CHECKING:
    from mlx_mtp.reply import Chunk

SECONDS_A_PAINTING = 0.05
CODE_THEME = "ansi_dark"  # the terminal's own colours, whatever its background is


class ReplyView(Protocol):
    """Shows one reply; a new reply needs a new view."""

    def take(self, chunk: "Chunk") -> None: ...

    def note(self, text: str) -> None: ...

    def finish(self) -> None: ...


class PlainView:
    """Text as it comes: the answer on stdout, thoughts and tool calls on stderr."""

    def __init__(self) -> None:
        self._writer = ReplyWriter()

    def take(self, chunk: "Chunk") -> None:
        self._writer.write(chunk.thought, "thought")
        self._writer.write(chunk.tool_call, "tool call")
        self._writer.write(chunk.text, "answer")

    def note(self, text: str) -> None:
        self._writer.note(text)

    def finish(self) -> None:
        self._writer.finish()


class Folded:
    """Thoughts that are not shown: how many tokens and seconds they take, and what they were."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens = 0
        self._began: float | None = None
        self._seconds = 0.0

    def take(self, chunk: "Chunk") -> bool:
        """-> whether the chunk is of thoughts alone."""
        if not chunk.thought:
            return False
        if self._began is None:
            self._began = time.monotonic()
        self._seconds = time.monotonic() - self._began
        self.text += chunk.thought
        self.tokens += len(chunk.tokens)
        return not chunk.text

    @property
    def line(self) -> str:
        return f"{self._seconds:.0f} s, {self.tokens} tok"


class MarkdownView:
    """Markdown on a terminal: finished blocks are printed once, only the open one is painted again.

    Thoughts are folded into a line that counts, unless they are to be shown.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or answer_console()
        self._blocks, self._cleaner = Blocks(), TerminalCleaner()
        self._tool_cleaner = TerminalCleaner()
        self.folded = Folded()
        self._is_thinking = False
        self._painted_at = 0.0
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._live.start()

    def take(self, chunk: "Chunk") -> None:
        if self.folded.take(chunk):
            self._is_thinking = True
            self._paint(Text(f"thinking ... {self.folded.line}", style="dim"))
            return
        if self._is_thinking:
            self._is_thinking = False
            self._print(Text(f"(thought for {self.folded.line}; /thoughts shows it)", style="dim"))
        if chunk.tool_call:
            self._print(Text(f"[tool call] {self._tool_cleaner.push(chunk.tool_call)}", style="dim"))
        for block in self._blocks.push(self._cleaner.push(chunk.text)):
            self._print_block(block)
        if self._blocks.open.strip():
            self._paint(self._open_block())

    def note(self, text: str) -> None:
        self._print(Text(text, style="dim"))

    def finish(self) -> None:
        self._live.update("", refresh=True)
        self._live.stop()
        left = self._blocks.finish()
        if left:
            self._print_block(left)

    def _open_block(self) -> RenderableType:
        """The end of the open block that fits on the screen."""
        lines = self._console.render_lines(_markdown(self._blocks.open), pad=False)
        most = max(self._console.height - 2, 1)
        if len(lines) <= most:
            return _markdown(self._blocks.open)
        tail = Text()
        for line in lines[-most:]:
            for segment in line:
                tail.append(segment.text, style=segment.style or "")
            tail.append("\n")
        return tail

    def _paint(self, frame: RenderableType) -> None:
        now = time.monotonic()
        if now - self._painted_at >= SECONDS_A_PAINTING:
            self._painted_at = now
            self._live.update(frame, refresh=True)

    def _print_block(self, block: str) -> None:
        self._print(_markdown(block))
        self._console.print()

    def _print(self, part: RenderableType) -> None:
        """For good, above what is painted again."""
        self._live.update("", refresh=True)
        self._console.print(part)


class TraceView:
    """Tokens as they come, coloured by where they came from; thoughts among them, dim."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or answer_console()
        self._cleaner = TerminalCleaner()
        self._at_line_start = True

    def take(self, chunk: "Chunk") -> None:
        for one in chunk.written:
            for piece in one.pieces:
                style = STYLES[one.origin] + ("" if piece.channel == "answer" else " dim")
                self._write(piece.text, style.strip())
        for piece in chunk.tail:
            self._write(piece.text, "")

    def note(self, text: str) -> None:
        if not self._at_line_start:
            self._write("\n", "")
        say(text)

    def finish(self) -> None:
        if not self._at_line_start:
            self._write("\n", "")

    def _write(self, text: str, style: str) -> None:
        text = self._cleaner.push(text)
        if text:
            self._console.print(Text(text, style=style), end="", soft_wrap=True)
            self._at_line_start = text.endswith("\n")


def _markdown(text: str) -> Markdown:
    # Links are shown in words: a terminal would hide where they lead.
    return Markdown(text, code_theme=CODE_THEME, hyperlinks=False)


def answer_console() -> Console:
    """stdout as it is; `rich` asks the terminal for its size and colours."""
    return Console(
        file=sys.stdout, highlight=False, no_color=not has_style(sys.stdout), markup=False, emoji=False
    )
