"""The app of examples/macos_app without AppKit: a window that keeps what it is shown, and a main thread to drive."""

import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

APP = Path(__file__).parent.parent / "examples" / "macos_app"
sys.path.insert(0, str(APP))

from chat_model import ChatModel  # noqa: E402
from model_list import ModelRow  # noqa: E402
from view import Can, Turn  # noqa: E402
from words import Problem  # noqa: E402

WITHIN_S = 60.0


class FakeMain:
    """A `MainThread` whose calls run where `until` is called: on the test's own thread."""

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._later: list[tuple[float, Callable[[], None]]] = []

    def soon(self, call: Callable[[], None]) -> None:
        self._calls.put(call)

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        assert threading.current_thread() is self.thread
        self._later.append((time.monotonic() + seconds, call))

    def until(self, is_so: Callable[[], bool]) -> None:
        """Run what is due until something is so."""
        began = time.monotonic()
        while not is_so():
            assert time.monotonic() - began < WITHIN_S, "it took too long"
            due = [entry for entry in self._later if entry[0] <= time.monotonic()]
            for entry in due:
                self._later.remove(entry)
                entry[1]()
            try:
                self._calls.get(timeout=0.005)()
            except queue.Empty:
                continue


class FakeView:
    """A `View` that keeps all; each call must come on the main thread."""

    def __init__(self, main: FakeMain):
        self._main = main
        self.rows: Sequence[ModelRow] = ()
        self.selected: int | None = None
        self.can = Can()
        self.turns: list[Turn] = []
        self.thoughts = self.input = self.status = ""
        self.progress: list[tuple[str | None, float | None]] = []
        self.problems: list[Problem] = []
        self.questions: list[tuple[str, str, Callable[[bool], None]]] = []
        self.added_at: list[float] = []
        self.statuses: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith(("show_", "add_", "give_", "ask")):
            assert threading.current_thread() is object.__getattribute__(self, "_main").thread, name
        return object.__getattribute__(self, name)

    def show_models(self, rows: Sequence[ModelRow], selected: int | None) -> None:
        self.rows, self.selected = rows, selected

    def show_can(self, can: Can) -> None:
        self.can = can

    def show_progress(self, text: str | None, share: float | None) -> None:
        self.progress.append((text, share))

    def show_status(self, text: str) -> None:
        self.status = text
        self.statuses.append(text)

    def show_turns(self, turns: Sequence[Turn]) -> None:
        self.turns = list(turns)

    def add_text(self, text: str, *, is_thought: bool) -> None:
        self.added_at.append(time.monotonic())
        if is_thought:
            self.thoughts += text
        else:
            self.turns[-1] = Turn("assistant", self.turns[-1].text + text)

    def show_input(self, text: str) -> None:
        self.input = text

    def give_back(self, text: str) -> None:
        self.input = text + self.input

    def show_problem(self, problem: Problem) -> None:
        self.problems.append(problem)

    def ask(self, title: str, text: str, button: str, then: Callable[[bool], None]) -> None:
        self.questions.append((title, text, then))


class Remembered:
    """What the app keeps between launches."""

    def __init__(self, last_model: str | None = None):
        self.last_model = last_model


class App:
    """The app as a person uses it."""

    def __init__(
        self,
        *,
        last: str | None = "demo",
        resources: Path | None = None,
        check: Callable[[], Any] | None = None,
    ):
        self.main = FakeMain()
        self.view = FakeView(self.main)
        self.remembered = Remembered(last)
        options = {} if check is None else {"check": check}
        self.model = ChatModel(self.view, self.main, self.remembered, resources, **options)

    def start(self, phase: str = "ready") -> "App":
        self.model.start()
        self.until_phase(phase)
        return self

    def until_phase(self, phase: str) -> None:
        self.main.until(lambda: self.model.phase == phase)

    def row(self, key: str) -> int:
        return next(at for at, row in enumerate(self.view.rows) if row.key == key)

    @property
    def chat(self) -> Any:
        assert self.model.chat is not None
        return self.model.chat

    @property
    def answer(self) -> str:
        assert self.view.turns[-1].role == "assistant"
        return self.view.turns[-1].text

    def until_text(self) -> None:
        self.main.until(
            lambda: bool(self.view.turns and self.view.turns[-1].role == "assistant" and self.answer)
        )

    def until_idle(self) -> None:
        self.main.until(lambda: not self.chat.is_replying)

    def quit(self) -> None:
        ends: list[bool] = []
        self.model.quit(lambda: ends.append(True))
        self.main.until(lambda: bool(ends))
        assert ends == [True] and self.model.phase == "closing"
