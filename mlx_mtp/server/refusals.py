"""What a client is told when a request is refused: a status and OpenAI's error body, never a traceback."""

from dataclasses import dataclass, field
from typing import Any

from mlx_mtp.errors import (
    BusyError,
    ContextError,
    EngineError,
    GenerationError,
    MemoryRefusal,
    MtpError,
    ParameterError,
    PromptError,
)

INVALID, SERVER = "invalid_request_error", "server_error"
KEY, LIMIT = "authentication_error", "rate_limit_error"
RETRY_AFTER_S = 2  # what a client is told to wait where nothing better is known


@dataclass(slots=True)
class Refusal(Exception):
    """An answer other than 200; `param` is the field of the request that it is about."""

    status: int
    message: str
    type: str = INVALID
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def bad(param: str, message: str, code: str = "invalid_value") -> Refusal:
    """400 about one field."""
    return Refusal(400, message, INVALID, param, code)


def unsupported(param: str, message: str) -> Refusal:
    """400 for a field that would change the answer and that this server cannot honour."""
    return bad(param, message, "unsupported_parameter")


def busy(message: str) -> Refusal:
    return Refusal(429, message, LIMIT, code="busy", headers={"retry-after": str(RETRY_AFTER_S)})


def unavailable(message: str, code: str) -> Refusal:
    return Refusal(503, message, SERVER, code=code, headers={"retry-after": str(RETRY_AFTER_S)})


def refusal_of(error: MtpError) -> Refusal:
    """What the library refused, as a client is told."""
    words = str(error)
    if isinstance(error, PromptError):
        if isinstance(error, ContextError):
            # Clients know it by these words, or by the code, and shorten the conversation.
            words = f"This model's maximum context length is exceeded: {words}"
            return Refusal(400, words, param="messages", code="context_length_exceeded")
        return Refusal(400, words, param="messages", code=error.code)
    if isinstance(error, ParameterError):
        return Refusal(400, words, param=_first_word(words), code="invalid_value")
    if isinstance(error, BusyError):
        return busy(words)
    if isinstance(error, MemoryRefusal):
        return unavailable(words, error.code)
    if isinstance(error, EngineError):
        return unavailable(words, error.code)
    if isinstance(error, GenerationError):
        return Refusal(500, words, SERVER, code=error.code)
    return unavailable(words, error.code)


def _first_word(words: str) -> str | None:
    """The parameter that a message of ParameterError begins with."""
    word = words.split(" ", 1)[0]
    return word if word.isidentifier() else None
