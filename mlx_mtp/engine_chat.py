"""A chat on an engine: its messages, replies to them, and going back to change what was said."""

import threading
from typing import TYPE_CHECKING, Any

from mlx_mtp.errors import ParameterError
from mlx_mtp.reply import Generation

if TYPE_CHECKING:
    from mlx_mtp.engine import Engine
    from mlx_mtp.handles import Handle

Message = dict[str, Any]


class EngineConversation:
    """Messages that grow by one turn with each reply; the engine prefills only what is new, edits included.

    A turn is kept once its reply has ended with some text, cancelled or not; one that gave none, or failed, is taken
    back. One reply at a time; any thread.
    """

    def __init__(self, engine: "Engine", system: str | None, options: dict[str, Any]):
        self._engine, self._options = engine, options
        self._lock = threading.RLock()  # a reply may be over while it is submitted
        self._messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._is_replying = False

    @property
    def messages(self) -> list[Message]:
        """A copy of what was said so far."""
        with self._lock:
            return [dict(message) for message in self._messages]

    def say(self, text: str | Message, **options: Any) -> "Handle":
        """Say something -> the reply's handle; `options` as for `Engine.submit`, for this reply only."""
        with self._lock:
            return self._reply([*self._messages, _user(text)], options)

    def regenerate(self, **options: Any) -> "Handle":
        """Answer the last message again, for example with another seed; the old answer stays until this has text."""
        with self._lock:
            return self._reply(self._messages[: self._last_user() + 1], options)

    def edit(self, turn: int, text: str | Message, **options: Any) -> "Handle":
        """Change the user's message number `turn`, from 0, -1 being the last; what followed it is dropped."""
        with self._lock:
            places = [at for at, message in enumerate(self._messages) if message["role"] == "user"]
            if not -len(places) <= turn < len(places):
                raise ParameterError(
                    f"this conversation has {len(places)} messages of the user, got turn {turn}; "
                    "choose one of them"
                )
            return self._reply([*self._messages[: places[turn]], _user(text)], options)

    def undo(self) -> None:
        """Take back the last message and its answer."""
        with self._lock:
            self._check_idle()
            self._messages = self._messages[: self._last_user()]

    def _reply(self, messages: list[Message], options: dict[str, Any]) -> "Handle":
        self._check_idle()
        handle = self._engine.submit(messages, **(self._options | options))
        self._is_replying = True

        def over(result: Generation | None) -> None:
            with self._lock:
                self._is_replying = False
                if result is not None and result.text:
                    answer = {"role": "assistant", "content": result.text}
                    self._messages = [*messages, answer]

        handle.when_done(over)
        return handle

    def _check_idle(self) -> None:
        if self._is_replying:
            raise ParameterError("this conversation is replying already; wait for that reply, or cancel it")

    def _last_user(self) -> int:
        places = [at for at, message in enumerate(self._messages) if message["role"] == "user"]
        if not places:
            raise ParameterError("nothing was said in this conversation yet; say something first")
        return places[-1]


def _user(text: str | Message) -> Message:
    return {"role": "user", "content": text} if isinstance(text, str) else dict(text)
