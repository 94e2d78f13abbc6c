"""One chat on one engine: a reply at a time, streamed to the view in batches; stop, regenerate, edit. Main thread."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from paced import MainThread, Paced
from view import Turn, View
from words import Problem, ProgressWords, problem_of, status_words

if TYPE_CHECKING:
    from mlx_mtp import Engine, Handle
    from mlx_mtp.events import Event
    from mlx_mtp.reply import Generation

LOG = logging.getLogger(__name__)
REPLY_TOKENS = 4096  # a longer reply ends there; the context may end it earlier


@dataclass(slots=True, eq=False)
class Reply:
    """The reply that is being written; events of an older one are not shown any more. `said`: what it answers.

    is_edit: `said` replaced the last message; is_again: it is another answer to that.
    """

    said: str
    is_edit: bool = False
    is_again: bool = False
    handle: "Handle | None" = None  # once it was submitted
    is_stopped: bool = False

    def stop(self) -> None:
        self.is_stopped = True
        if self.handle is not None:
            self.handle.cancel()


class Chat:
    """The messages of a chat; `on_change` is called where it begins or ends a reply."""

    def __init__(self, engine: "Engine", view: View, main: MainThread, on_change: Callable[[], None]):
        self.turns: list[Turn] = []
        self._view, self._main, self._on_change = view, main, on_change
        self._context = engine.pair.max_context
        self._conversation = engine.conversation(max_tokens=REPLY_TOKENS)
        self._reply: Reply | None = None
        self._is_editing = False
        self._words = ProgressWords()
        self._events: Paced[tuple[Reply, Event]] = Paced(main, self._show_events)
        self._show([])

    @property
    def is_replying(self) -> bool:
        return self._reply is not None

    @property
    def last_user(self) -> str | None:
        """What the user said last."""
        return next((turn.text for turn in reversed(self.turns) if turn.role == "user"), None)

    def send(self, text: str) -> None:
        """Say something; while the last message is edited, this replaces it."""
        if self.is_replying or not text.strip():
            return
        before = self._before_last_user() if self._is_editing else self.turns
        self._view.show_input("")
        self._begin(Reply(text, is_edit=self._is_editing), before)

    def regenerate(self) -> None:
        """Another answer to the last message; the old one is gone once this has some text."""
        if not self.is_replying and self.last_user is not None:
            self._begin(Reply(self.last_user, is_again=True), self._before_last_user())

    def edit_last(self) -> None:
        """Put the last message back into the input."""
        last = self.last_user
        if last is not None and not self.is_replying:
            self._is_editing = True
            self._view.show_input(last)
            self._view.show_status("Sending replaces your last message; Escape leaves it as it was.")

    def leave_edit(self) -> None:
        """Escape: the last message stays."""
        if self._is_editing:
            self._is_editing = False
            self._view.show_input("")
            self._view.show_status("")

    def stop(self) -> None:
        """End the reply within a round; it keeps what it has."""
        if self._reply is not None:
            self._reply.stop()

    def leave(self) -> None:
        """Another chat follows: what this one still gives is not shown."""
        self.stop()
        self._reply = None

    def _begin(self, reply: Reply, before: list[Turn]) -> None:
        self._reply, self._is_editing = reply, False
        self._show([*before, Turn("user", reply.said), Turn("assistant", "")])
        self._view.show_status("")
        self._on_change()
        threading.Thread(target=self._run, args=(reply,), name="reply", daemon=True).start()

    def _run(self, reply: Reply) -> None:
        """On a thread of the reply's own, because checking a long message takes a while too."""
        try:
            handle = reply.handle = self._submit(reply)
            if reply.is_stopped:
                handle.cancel()
            for event in handle.events():
                self._events.put((reply, event))
        except Exception as error:  # refused, failed, or a mistake of ours: the chat goes on after each
            LOG.info("a reply ended: %r", error)
            self._main.soon(partial(self._ended, reply, None, error))
        else:
            self._main.soon(partial(self._ended, reply, handle.result(), None))

    def _submit(self, reply: Reply) -> "Handle":
        if reply.is_again:
            return self._conversation.regenerate()
        return (
            self._conversation.edit(-1, reply.said) if reply.is_edit else self._conversation.say(reply.said)
        )

    def _show_events(self, items: "list[tuple[Reply, Event]]") -> None:
        """What came since the last time, at once: one change of the text for each run of answer or thought."""
        from mlx_mtp.events import Done, Progress, Token

        runs: list[tuple[bool, str]] = []
        for reply, event in items:
            if reply is not self._reply:
                continue
            if isinstance(event, Progress):
                self._view.show_progress(*self._words.line(event))
            elif isinstance(event, Token | Done):
                for piece in event.pieces if isinstance(event, Token) else event.tail:
                    is_thought = piece.channel == "thought"  # no tools are offered, so there are no calls
                    text = runs.pop()[1] if runs and runs[-1][0] == is_thought else ""
                    runs.append((is_thought, text + piece.text))
        if not runs or self._reply is None:
            return
        self._view.show_progress(None, None)
        for is_thought, text in runs:
            self._view.add_text(text, is_thought=is_thought)
        answer = "".join(text for is_thought, text in runs if not is_thought)
        self.turns[-1] = Turn("assistant", self.turns[-1].text + answer)
        handle = self._reply.handle
        stats = None if handle is None else handle.stats
        if stats is not None:
            self._view.show_status(status_words(stats, self._context))

    def _ended(self, reply: Reply, result: "Generation | None", error: Exception | None) -> None:
        if reply is not self._reply:
            return
        self._events.flush()
        self._reply = None
        self._view.show_progress(None, None)
        if (
            result is None or not result.text
        ):  # then nothing was kept: an old answer stands, a message goes back
            self._show([Turn(one["role"], one["content"]) for one in self._conversation.messages])
            if not reply.is_again:
                self._view.give_back(reply.said)
                self._is_editing = reply.is_edit
        self._on_change()
        if error is not None:
            self._view.show_problem(problem_of(error))
        elif result is not None:
            self._view.show_status(status_words(result.stats, self._context, result.finish_reason))
            if result.note is not None:
                self._view.show_problem(Problem("The reply ended early", result.note, ""))

    def _before_last_user(self) -> list[Turn]:
        places = [at for at, turn in enumerate(self.turns) if turn.role == "user"]
        return self.turns[: places[-1]] if places else []

    def _show(self, turns: list[Turn]) -> None:
        self.turns = turns
        self._view.show_turns(turns)
