"""What the app does, without a window: its start, its models, the chat and its end. Plain Python, on the main thread.

Everything here returns at once. What takes long runs on threads that report through `MainThread`; the window is a
`View`, and the tests have one of their own.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from chat import Chat
from model_list import ModelRow, first_choice, gigabytes, list_models
from opening import Load, Opener
from paced import MainThread, Paced, Work
from view import Can, Remembered, View
from words import Problem, ProgressWords, problem_of, problem_of_checks

if TYPE_CHECKING:
    from mlx_mtp import Engine, MtpError, Progress
    from mlx_mtp.self_check import SelfCheck

QUIT_WITHIN_S = 10.0  # a download that stalls must not keep the app from quitting
HARMLESS = ("Metal sources", "demo pair")  # without them models still run
CANCELLED = "Cancelled. What was downloaded is kept: choosing the model again goes on from there."

Phase = Literal["starting", "broken", "idle", "loading", "stopping", "ready", "closing"]


def check_bundle() -> "SelfCheck":
    """Whether this copy is complete; imports MLX on whichever thread asks."""
    from mlx_mtp import selfcheck

    return selfcheck()


class ChatModel:
    """Commands of the window and the menu; results go to the view."""

    def __init__(
        self,
        view: View,
        main: MainThread,
        remembered: Remembered,
        resources: Path | None = None,
        check: "Callable[[], SelfCheck]" = check_bundle,
    ):
        self.phase: Phase = "starting"
        self.rows: list[ModelRow] = []
        self.chat: Chat | None = None
        self._view, self._main, self._remembered, self._resources = view, main, remembered, resources
        self._check = check
        self._work = Work(main, self._broke)
        self._opener = Opener(main, self._work, self._opened)
        self._selected: int | None = None
        self._load: Load | None = None
        self._engine: Engine | None = None
        self._progress: Paced[tuple[Load, Progress]] = Paced(main, self._show_load)
        self._words = ProgressWords()

    @property
    def can(self) -> Can:
        """What can be done now."""
        phase, chat = self.phase, self.chat
        is_replying = chat is not None and chat.is_replying
        has_said = chat is not None and not is_replying and chat.last_user is not None
        return Can(
            choose=phase in ("idle", "ready"),
            cancel_load=phase == "loading",
            send=chat is not None and not is_replying,
            stop=is_replying or phase == "loading",
            regenerate=has_said,
            edit=has_said,
            new_chat=chat is not None,
        )

    # Starting and ending

    def start(self) -> None:
        """Look at this copy of the app and at the models; then open the one used last, if it is here."""
        self._view.show_progress("Looking at this Mac…", None)
        self._set("starting")
        self._work.do(self._look)

    def _look(self) -> None:
        """On the work thread."""
        problems = self._check().problems
        is_broken = any(problem.name not in HARMLESS for problem in problems)
        # What is broken may end the process when MLX is imported, so nothing more is asked of it.
        rows = [] if is_broken else list_models(self._resources)
        choice = first_choice(rows, self._remembered.last_model) if rows else None
        problem = problem_of_checks(problems) if problems else None
        self._main.soon(partial(self._looked, rows, choice, problem))

    def _looked(self, rows: list[ModelRow], choice: int | None, problem: Problem | None) -> None:
        if self.phase == "closing":
            return
        self.rows, self._selected = rows, choice
        self._view.show_progress(None, None)
        self._view.show_models(rows, choice)
        if problem is not None:
            self._view.show_problem(problem)
        self._view.show_status("Choose a model." if rows else "This copy of the app is not complete.")
        self._set("idle" if rows else "broken")
        if choice is not None and rows[choice].is_here and rows[choice].fits:
            self._open(rows[choice])

    def quit(self, then: Callable[[], None]) -> None:
        """End what runs; `then` is called once, at the latest after some seconds. A reply ends within a round."""
        self._leave_chat()
        self._set("closing")
        is_told = False

        def once() -> None:
            nonlocal is_told
            if not is_told:
                is_told = True
                then()

        self._opener.close(once)
        self._main.after(QUIT_WITHIN_S, once)

    def _broke(self, error: Exception) -> None:
        """A mistake in what was done in the background."""
        if self.phase != "closing":
            self._load = None
            self._view.show_progress(None, None)
            self._view.show_problem(problem_of(error))
            self._set("idle" if self.rows else "broken")

    # Models

    def choose(self, at: int) -> None:
        """Open a row of the list, asking first where it has to be downloaded."""
        row = self.rows[at]
        if not self.can.choose or (at == self._selected and self.phase == "ready"):
            return
        if row.is_here or not row.fits:  # the library refuses what does not fit before it downloads anything
            self._selected = at
            self._open(row)
            return
        size = "an unknown number of GB"
        if row.download_bytes is not None:
            size = gigabytes(row.download_bytes, 1e9)
        text = f"{size} to download; {row.memory}. You can cancel and go on later."
        self._view.ask(f"Download {row.title}?", text, "Download", partial(self._answered, at))

    def _answered(self, at: int, is_yes: bool) -> None:
        if is_yes and self.can.choose:
            self._selected = at
            self._open(self.rows[at])
        else:
            self._view.show_models(self.rows, self._selected)

    def cancel_load(self) -> None:
        """Give up a download or a load; what was downloaded is kept."""
        if self.can.cancel_load and self._load is not None:
            self._view.show_progress("Cancelling…", None)
            self._set("stopping")
            self._opener.cancel(self._load)

    def _open(self, row: ModelRow) -> None:
        self._leave_chat()
        self._engine = None
        self._view.show_turns([])
        self._words = ProgressWords()
        self._view.show_progress(f"Opening {row.title}…", None)
        self._view.show_status("")
        self._load = self._opener.open(row, self._report)
        self._set("loading")

    def _report(self, load: Load, progress: "Progress") -> None:
        """On the engine's thread."""
        self._progress.put((load, progress))

    def _show_load(self, items: "list[tuple[Load, Progress]]") -> None:
        news = [progress for load, progress in items if load is self._load]
        if news and self.phase == "loading":
            self._view.show_progress(*self._words.line(news[-1]))

    def _opened(self, load: Load, engine: "Engine | None", error: "MtpError | None") -> None:
        if load is not self._load or self.phase == "closing":
            return
        self._progress.flush()
        self._view.show_progress(None, None)
        if engine is None or load.is_cancelled:
            self._load = None
            self._view.show_status(CANCELLED if error is None else "No model is open.")
            self._set("idle")
            if error is not None:
                self._view.show_problem(problem_of(error))
            return
        self._engine = engine
        self._remembered.last_model = load.row.key
        if not load.row.is_here:  # its row says from now on that it is
            self._work.do(self._list)
        self.new_chat()
        self._view.show_status(" ".join(engine.pair.warnings) or f"{load.row.title} is ready.")

    def _list(self) -> None:
        """On the work thread."""
        self._main.soon(partial(self._listed, list_models(self._resources)))

    def _listed(self, rows: list[ModelRow]) -> None:
        self.rows = rows
        self._view.show_models(rows, self._selected)

    # The chat

    def new_chat(self) -> None:
        """Forget the messages; the model stays."""
        if self._engine is not None:
            self._leave_chat()
            self._view.show_progress(None, None)
            self._view.show_status("")
            self.chat = Chat(self._engine, self._view, self._main, self._show_can)
            self._set("ready")

    def stop(self) -> None:
        """End the reply, which keeps what it has, or give up the load."""
        if self.chat is not None:
            self.chat.stop()
        else:
            self.cancel_load()

    def _leave_chat(self) -> None:
        chat, self.chat = self.chat, None
        if chat is not None:
            chat.leave()

    def _set(self, phase: Phase) -> None:
        self.phase = phase
        self._show_can()

    def _show_can(self) -> None:
        self._view.show_can(self.can)
