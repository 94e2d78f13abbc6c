"""log_probs in OpenAI's words: an entry for each token of a text, sent beside the text that it is part of.

A stop string may be cut off, and a character may need several tokens, so a token counts once its text has begun to be
sent; one whose text never is, such as those of a stop string or an end, has no entry.
"""

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_mtp.log_probs import TokenLogProbs
from mlx_mtp.reply import Chunk, Written
from mlx_mtp.stream import Channel
from mlx_mtp.tokenizer import Tokenizer

LEAST = -9999.0  # what stands for a probability of nothing, which JSON's numbers have no logarithm of


@dataclass(frozen=True, slots=True)
class Entry:
    """One token of a text, and at which character of it the token begins."""

    id: int
    start: int
    log_probs: TokenLogProbs


class ShownTokens:
    """The tokens of one answer in the order of its text, let go of as that is sent."""

    def __init__(self, tokenizer: Tokenizer, channels: frozenset[Channel]):
        self._tokenizer, self._channels = tokenizer, channels
        self._waiting: deque[Entry] = deque()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._written = self._sent = 0  # characters

    def take(self, chunk: Chunk) -> list[Entry]:
        """A chunk whose whole text is sent -> the entries that belong to it."""
        self.wrote(chunk.written)
        pieces = [piece for one in chunk.written for piece in one.pieces] + list(chunk.tail)
        return self.sent("".join(piece.text for piece in pieces if piece.channel in self._channels))

    def wrote(self, written: Sequence[Written]) -> None:
        """The model wrote these; their text may be held back."""
        for one in written:
            is_control = one.id in self._tokenizer.special_ids
            if is_control or one.channel not in self._channels:
                self._drop_part()
            if one.channel not in self._channels:
                continue
            if one.log_probs is not None:
                self._waiting.append(Entry(one.id, self._written, one.log_probs))
            if is_control:
                self._written += len(self._tokenizer.token_text(one.id))
            else:
                self._written += len(self._decoder.decode(self._tokenizer.token_bytes(one.id)))

    def _drop_part(self) -> None:
        """Forget the tokens of a character that was begun and never will be whole."""
        if self._decoder.getstate()[0]:
            self._decoder.reset()
            while self._waiting and self._waiting[-1].start == self._written:
                self._waiting.pop()

    def sent(self, text: str) -> list[Entry]:
        """So much text is sent now -> the entries of the tokens that begin in it."""
        self._sent += len(text)
        entries = []
        while self._waiting and self._waiting[0].start < self._sent:
            entries.append(self._waiting.popleft())
        return entries


@dataclass(frozen=True, slots=True)
class LogProbsAsked:
    """How a request wants them: alternatives with each token, and whether as a chat's or a text completion's."""

    count: int
    is_chat: bool
    tokenizer: Tokenizer
    channels: frozenset[Channel]  # that are the text of its choices

    def shown_tokens(self) -> ShownTokens:
        """For one answer."""
        return ShownTokens(self.tokenizer, self.channels)

    def field(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """The `logprobs` of a choice, or of what an event adds to it."""
        return self._of_chat(entries) if self.is_chat else self._of_text(entries)

    def _of_chat(self, entries: Sequence[Entry]) -> dict[str, Any]:
        content = [
            self._token(one.id, one.log_probs.log_prob)
            | {"top_logprobs": [self._token(*other) for other in one.log_probs.best[: self.count]]}
            for one in entries
        ]
        return {"content": content, "refusal": None}

    def _of_text(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return {
            "tokens": [_shown(_bytes_of(self.tokenizer, one.id)) for one in entries],
            "token_logprobs": [max(one.log_probs.log_prob, LEAST) for one in entries],
            "top_logprobs": [self._likeliest(one) for one in entries] if self.count else None,
            "text_offset": [one.start for one in entries],
        }

    def _token(self, id: int, log_prob: float) -> dict[str, Any]:
        data = _bytes_of(self.tokenizer, id)
        return {"token": _shown(data), "logprob": max(log_prob, LEAST), "bytes": list(data)}

    def _likeliest(self, one: Entry) -> dict[str, float]:
        """The token itself is among them even where it was not among the likeliest."""
        pairs = [*one.log_probs.best[: self.count], (one.id, one.log_probs.log_prob)]
        return {_shown(_bytes_of(self.tokenizer, id)): max(value, LEAST) for id, value in pairs}


def _bytes_of(tokenizer: Tokenizer, id: int) -> bytes:
    return tokenizer.token_text(id).encode() if id in tokenizer.special_ids else tokenizer.token_bytes(id)


def _shown(data: bytes) -> str:
    """A token as text; a part of a character as OpenAI writes it: bytes:\\xe2\\x80."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
