"""Markdown as it comes: finished blocks are printed for good, only the one that is still open is painted again."""

import re

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


class Blocks:
    """Cuts a growing text into blocks: a fenced listing, or lines up to an empty one."""

    def __init__(self) -> None:
        self.open = ""  # the block that may still change

    def push(self, text: str) -> list[str]:
        """More text -> the blocks that it finished, each as it stands in the text."""
        lines = (self.open + text).split("\n")
        closed: list[str] = []
        block: list[str] = []
        fence: str | None = None
        for line in lines[:-1]:  # the last line has no end yet
            found = _FENCE.match(line)
            if fence is not None:
                block.append(line)
                if found and found[1].startswith(fence) and not line.strip(" `~"):
                    fence = self._close(block, closed)
            elif found:
                if any(block):
                    self._close(block, closed)
                fence = found[1]
                block.append(line)
            elif line.strip():
                block.append(line)
            elif any(block):
                self._close(block, closed)
        self.open = "\n".join([*block, lines[-1]])
        return closed

    def finish(self) -> str:
        """What is left at the end, "" where nothing is."""
        left, self.open = self.open, ""
        return left if left.strip() else ""

    @staticmethod
    def _close(block: list[str], closed: list[str]) -> None:
        closed.append("\n".join(block))
        block.clear()
