"""A request's answers as server-sent events: chunk after chunk, then usage if it was asked for, then [DONE]."""

from typing import Any

from mlx_mtp.reply import Chunk, Generation
from mlx_mtp.server.asks import Ask
from mlx_mtp.server.refusals import Refusal
from mlx_mtp.server.replies import Heading, as_bytes, finish_reason, usage_of
from mlx_mtp.server.tool_calls import Argued, Begun, Ended, Part, ToolCallReader
from mlx_mtp.server.tool_choice import check_call, check_name
from mlx_mtp.stream import Piece

DONE = b"data: [DONE]\n\n"
ALIVE = b": alive\n\n"  # a comment, which clients leave out


class Events:
    """Turns chunks of all answers of a request into events."""

    def __init__(self, ask: Ask, heading: Heading):
        self._ask, self._heading = ask, heading
        self._readers = [ToolCallReader() for _ in range(ask.count)]
        asked = ask.log_probs
        self._shown = None if asked is None else [asked.shown_tokens() for _ in range(ask.count)]
        self.cut = [False] * ask.count  # answers that are to end behind their first call
        self.results: dict[int, Generation] = {}

    def begin(self) -> bytes:
        """The events before any text: clients take the role from here."""
        if self._ask.kind != "chat":
            return b""
        delta = {"role": "assistant", "content": ""}
        return b"".join(self._choice(at, delta) for at in range(self._ask.count))

    def chunk(self, at: int, chunk: Chunk) -> bytes:
        """What a chunk adds to answer `at`, its pieces in the order in which they were written.

        Raises Refusal for a call of a function that tool_choice does not allow.
        """
        if self._shown is not None:
            self._shown[at].wrote(chunk.written)
        pieces = [piece for one in chunk.written for piece in one.pieces] + list(chunk.tail)
        out = b""
        for piece in _joined(pieces):
            if self.cut[at]:
                break
            if piece.channel == "tool" and self._ask.has_tools:
                out += self._parts(at, self._readers[at].push(piece.text))
            elif piece.channel == "thought":
                out += self._text(at, piece.text, "reasoning_content")
            else:
                out += self._text(at, piece.text, "content", self._log_probs(at, piece.text))
        return out

    def end(self, at: int, result: Generation) -> bytes:
        """The last event of answer `at`. Raises Refusal where it failed."""
        self.results[at] = result
        out = b""
        if not self.cut[at]:
            is_whole = result.finish_reason != "length"
            out = self._parts(at, self._readers[at].finish(is_whole=is_whole))
            check_call(self._ask.must_call, self._readers[at].complete, result.finish_reason)
        reason = finish_reason(result, self._readers[at].count, is_cut=self.cut[at])
        return out + self._choice(at, {}, reason)

    def close(self) -> bytes:
        """After all answers."""
        if not self._ask.with_usage:
            return DONE
        stats = [self.results[at].stats for at in range(self._ask.count)]
        return self._event(choices=[], usage=usage_of(self._ask, stats)) + DONE

    @staticmethod
    def failed(refusal: Refusal) -> bytes:
        """What went wrong after the status was sent."""
        return b"data: " + as_bytes(refusal.body) + b"\n\n" + DONE

    def _parts(self, at: int, parts: list[Part]) -> bytes:
        out = b""
        for part in parts:
            if isinstance(part, Begun):
                check_name(self._ask.must_call, part.name)
                function = {"name": part.name, "arguments": ""}
                call = {"index": part.index, "id": part.id, "type": "function", "function": function}
                out += self._choice(at, {"tool_calls": [call]})
            elif isinstance(part, Argued):
                call = {"index": part.index, "function": {"arguments": part.text}}
                out += self._choice(at, {"tool_calls": [call]})
            elif isinstance(part, Ended):
                if not self._ask.parallel_calls:
                    self.cut[at] = True
                    return out
            else:
                out += self._text(at, part.text, "content")
        return out

    def _log_probs(self, at: int, text: str) -> dict[str, Any] | None:
        """Those of the tokens that begin in a text of answer `at`, which is sent now."""
        if self._shown is None or self._ask.log_probs is None:
            return None
        return self._ask.log_probs.field(self._shown[at].sent(text))

    def _text(self, at: int, text: str, name: str, log_probs: dict[str, Any] | None = None) -> bytes:
        if not text:
            return b""
        return self._choice(at, {name: text}, log_probs=log_probs)

    def _choice(
        self,
        at: int,
        delta: dict[str, Any],
        reason: str | None = None,
        log_probs: dict[str, Any] | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {"index": at}
        if self._ask.kind == "chat":
            choice["delta"] = delta
        else:
            choice["text"] = delta.pop("content", "")
            choice |= delta
        return self._event(choices=[choice | {"logprobs": log_probs, "finish_reason": reason}])

    def _event(self, **rest: Any) -> bytes:
        return b"data: " + as_bytes(self._heading.object(chunk=True, **rest)) + b"\n\n"


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one channel as one."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].channel == piece.channel:
            piece = Piece(joined.pop().text + piece.text, piece.channel)
        joined.append(piece)
    return joined
