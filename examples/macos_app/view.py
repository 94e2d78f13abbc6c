"""What the logic and the window know of each other: plain values, and the calls that the window takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from model_list import ModelRow
from words import Problem


@dataclass(frozen=True, slots=True)
class Turn:
    """One message as it is shown."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Can:
    """What can be done now: buttons and menu items are enabled by it."""

    choose: bool = False
    cancel_load: bool = False
    send: bool = False
    stop: bool = False
    regenerate: bool = False
    edit: bool = False
    new_chat: bool = False


class View(Protocol):
    """The window, as the logic sees it."""

    def show_models(self, rows: Sequence[ModelRow], selected: int | None) -> None: ...
    def show_can(self, can: Can) -> None: ...
    def show_progress(self, text: str | None, share: float | None) -> None:
        """text None: there is nothing to wait for. share None: not known."""

    def show_status(self, text: str) -> None: ...
    def show_turns(self, turns: Sequence[Turn]) -> None: ...
    def add_text(self, text: str, *, is_thought: bool) -> None:
        """More of the reply that is shown last."""

    def show_input(self, text: str) -> None: ...
    def give_back(self, text: str) -> None:
        """A message that was not answered goes back into the input, before what was typed since."""

    def show_problem(self, problem: Problem) -> None: ...
    def ask(self, title: str, text: str, button: str, then: Callable[[bool], None]) -> None: ...


class Remembered(Protocol):
    """What the app remembers from one launch to the next: in the app, the user's defaults."""

    last_model: str | None
