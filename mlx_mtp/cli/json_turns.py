"""A chat for programs: each turn as one JSON object on stdout, or the whole conversation at the end."""

import json
from typing import TYPE_CHECKING, Any

from mlx_mtp.cli.status import figures
from mlx_mtp.cli.terminal import write_answer

if TYPE_CHECKING:
    from mlx_mtp.reply import Chunk


class _Silent:
    """Shows nothing of a reply while it comes."""

    def __init__(self) -> None:
        self.thought, self.tool_call = "", ""

    def take(self, chunk: "Chunk") -> None:
        self.thought += chunk.thought
        self.tool_call += chunk.tool_call

    def note(self, text: str) -> None:
        return

    def finish(self) -> None:
        return


class JsonTurns:
    """Writes turns as they end (`--jsonl`), or all of them at the end (`--json`)."""

    def __init__(self, *, at_once: bool) -> None:
        self._at_once = at_once
        self._turns: list[dict[str, Any]] = []
        self._view = _Silent()

    def view(self) -> _Silent:
        self._view = _Silent()
        return self._view

    def write(self, question: str, answer: str, last: "Chunk") -> None:
        """A turn has ended; a finish_reason of null says that it was stopped."""
        turn = {
            "question": question,
            "text": answer,
            "thought": self._view.thought,
            "tool_call": self._view.tool_call,
            "finish_reason": last.finish_reason,
            "note": last.note,
            "stats": figures(last.stats),
        }
        self._turns.append(turn)
        if self._at_once:
            write_answer(json.dumps(turn) + "\n")

    def finish(self, model: str) -> None:
        if not self._at_once:
            write_answer(json.dumps({"model": model, "turns": self._turns}) + "\n")
