"""A chat on an engine: its messages, replies to them, and going back to change what was said."""

import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_mtp.errors import MtpError, ParameterError
from mlx_mtp.reply import Generation

if TYPE_CHECKING:
    from mlx_mtp.engine import Engine
    from mlx_mtp.handles import Handle

Message = dict[str, Any]
REPLYING = "this conversation is replying already; wait for that reply, or cancel it"


@dataclass(slots=True, eq=False)
class Pending:
    """The reply that is being written, and what it answers."""

    messages: list[Message]
    handle: "weakref.ref[Handle]"


class EngineConversation:
    """Messages that grow by one turn with each reply; the engine prefills only what is new, edits included.

    A turn is kept once its reply has ended with some text, cancelled or not; one that gave none, or failed, is taken
    back. One reply at a time; any thread.
    """

    def __init__(self, engine: "Engine", system: str | None, options: dict[str, Any]):
        self._engine, self._options = engine, options
        self._lock = threading.RLock()  # a reply may be over while it is submitted
        self._messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._pending: Pending | None = None

    @property
    def messages(self) -> list[Message]:
        """A copy of what was said so far."""
        with self._lock:
            self._settle()
            return [dict(message) for message in self._messages]

    def say(self, text: str | Message, **options: Any) -> "Handle":
        """Say something -> the reply's handle; `options` as for `Engine.submit`, for this reply only."""
        with self._lock:
            self._settle()
            return self._reply([*self._messages, _user(text)], options)

    def regenerate(self, **options: Any) -> "Handle":
        """Answer the last message again, for example with another seed; the old answer stays until this has text."""
        with self._lock:
            self._settle()
            return self._reply(self._messages[: self._last_user() + 1], options)

    def edit(self, turn: int, text: str | Message, **options: Any) -> "Handle":
        """Change the user's message number `turn`, from 0, -1 being the last; what followed it is dropped."""
        with self._lock:
            self._settle()
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
            self._settle()
            if self._pending is not None:
                raise ParameterError(REPLYING)
            self._messages = self._messages[: self._last_user()]

    def _reply(self, messages: list[Message], options: dict[str, Any]) -> "Handle":
        if self._pending is not None:
            raise ParameterError(REPLYING)
        handle = self._engine.submit(messages, **(self._options | options))
        pending = self._pending = Pending(messages, weakref.ref(handle))
        handle.when_done(lambda result: self._take(pending, result))
        return handle

    def _take(self, pending: Pending, result: Generation | None) -> None:
        """The end of a reply, once: from the engine's thread, or from a reader who was told of it before."""
        with self._lock:
            if pending is not self._pending:
                return
            self._pending = None
            if result is not None and result.text:
                self._messages = [*pending.messages, {"role": "assistant", "content": result.text}]

    def _settle(self) -> None:
        """A reader of a handle may be here before the engine's thread is: take in what it has read."""
        pending = self._pending
        handle = None if pending is None else pending.handle()
        if pending is None or handle is None or not handle.is_done:
            return
        try:
            result = handle.result(0)
        except MtpError:
            result = None
        self._take(pending, result)

    def _last_user(self) -> int:
        places = [at for at, message in enumerate(self._messages) if message["role"] == "user"]
        if not places:
            raise ParameterError("nothing was said in this conversation yet; say something first")
        return places[-1]


def _user(text: str | Message) -> Message:
    return {"role": "user", "content": text} if isinstance(text, str) else dict(text)
