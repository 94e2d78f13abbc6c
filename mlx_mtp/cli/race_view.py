"""What a race looks like at a moment: two panes side by side, or one above the other where it is narrow."""

from collections.abc import Sequence
from io import StringIO

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mlx_mtp.clean import TerminalCleaner
from mlx_mtp.cli.race_record import Arm, Mark
from mlx_mtp.cli.trace_style import STYLES

SIDE_BY_SIDE = 72  # columns from which two panes stand beside each other
FRAME = 2  # lines and columns of a pane's border, on both sides together


class Panes:
    """Frames of a race on a screen of so many columns and lines; text is cleaned once, when it is made."""

    def __init__(self, arms: Sequence[Arm], title: str, columns: int, lines: int) -> None:
        self._arms, self._title = arms, title
        self._columns, self._lines = columns, lines
        self._beside = columns >= SIDE_BY_SIDE
        self._answers = max(len(arm.tokens) for arm in arms)
        self._marks = [_cleaned(arm.marks) for arm in arms]
        self._at = [0] * len(arms)  # marks shown so far
        self._texts = [[Text() for _ in range(self._answers)] for _ in arms]

    def at(self, seconds: float) -> RenderableType:
        """The frame so many seconds after the first tokens; moments are asked for in order."""
        panes = [self._pane(index, seconds) for index in range(len(self._arms))]
        if not self._beside:
            return Group(Text(self._title, overflow="ellipsis", no_wrap=True), *panes)
        grid = Table.grid(expand=True)
        for _ in panes:
            grid.add_column(ratio=1)
        grid.add_row(*panes)
        return Group(Text(self._title, overflow="ellipsis", no_wrap=True), grid)

    def _pane(self, index: int, seconds: float) -> Panel:
        arm, marks, texts = self._arms[index], self._marks[index], self._texts[index]
        while self._at[index] < len(marks) and marks[self._at[index]].at <= seconds:
            mark = marks[self._at[index]]
            texts[mark.row].append(mark.text, style=STYLES[mark.origin])
            self._at[index] += 1
        columns = (self._columns // 2 if self._beside else self._columns) - FRAME - 2
        share = self._lines - 2 if self._beside else (self._lines - 2) // len(self._arms)
        each = max(1, (share - FRAME) // self._answers - (1 if self._answers > 1 else 0))
        parts: list[RenderableType] = []
        for row, text in enumerate(texts):
            if self._answers > 1:
                parts.append(Text(f"answer {row + 1}", style="dim"))
            parts.append(_last_lines(text, columns, each))
        shown = self._at[index]
        figures = f"{arm.name}: {shown} tok"
        moment = min(seconds, arm.seconds)
        if shown > 1 and moment > 0:
            figures += f" · {(shown - 1) / moment:.1f} tok/s"
        end = Text(f"done in {arm.seconds:.1f} s") if shown == len(marks) else None
        return Panel(
            Group(*parts), title=Text(figures), title_align="left", subtitle=end, subtitle_align="right"
        )


def _cleaned(marks: Sequence[Mark]) -> list[Mark]:
    """Marks with text that no terminal obeys; each answer is one stream."""
    cleaners: dict[int, TerminalCleaner] = {}
    return [
        Mark(mark.at, mark.row, cleaners.setdefault(mark.row, TerminalCleaner()).push(mark.text), mark.origin)
        for mark in marks
    ]


def _last_lines(text: Text, columns: int, lines: int) -> Text:
    """The end of a text that fits, padded so that panes keep their height."""
    measure = Console(width=max(columns, 1), file=StringIO())
    # Far more than fits is not wrapped again at each frame.
    tail = text[-4 * columns * lines :] if len(text) > 4 * columns * lines else text
    wrapped = tail.wrap(measure, max(columns, 1), tab_size=4)
    kept = list(wrapped)[-lines:]
    return Text("\n").join([*kept, *(Text() for _ in range(lines - len(kept)))])
