"""Text that is piped in or typed as an argument, whatever its bytes are."""

import sys

from mlx_mtp.cli.terminal import say
from mlx_mtp.errors import PromptError

MAX_BYTES = 32 << 20  # beyond what any context holds


def piped_text() -> str:
    """All of stdin where it is not a terminal, else ""; invalid UTF-8 becomes U+FFFD, said once on stderr."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise PromptError(f"stdin holds more than {MAX_BYTES >> 20} MiB; pipe in less")
    return decoded(data, "stdin")


def argument_text(text: str) -> str:
    """An argument as the shell gave it; bytes that are not UTF-8 become U+FFFD, said once on stderr."""
    return decoded(text.encode("utf-8", "surrogateescape"), "the prompt")


def decoded(data: bytes, what: str) -> str:
    """UTF-8 as text; what is none becomes U+FFFD, and that is said on stderr."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        say(f"note: {what} is not all UTF-8; what cannot be read is replaced by U+FFFD")
        return data.decode("utf-8", "replace")
