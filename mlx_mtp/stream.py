"""Tokens -> text as they come: whole characters only, channels told apart, stop strings cut off exactly."""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_mtp.errors import ParameterError
from mlx_mtp.tokenizer import Tokenizer

Channel = Literal["answer", "thought", "tool"]
MAX_STOPS = 16
MAX_STOP_CHARS = 1000


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of one channel: the answer, the model's thoughts, or a tool call as the model wrote it."""

    text: str
    channel: Channel


@dataclass(frozen=True, slots=True)
class Pushed:
    """What tokens became: `used` of them belong to the result; `finish_reason` is None while it goes on."""

    pieces: tuple[Piece, ...]
    used: int
    finish_reason: str | None


def check_stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """-> the stop strings as a tuple; raises ParameterError for anything else than non-empty strings."""
    if stop is None:
        return ()
    if not isinstance(stop, str | list | tuple):
        raise ParameterError(
            f"stop must be a string or a list of strings, got {type(stop).__name__}; give one of these"
        )
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise ParameterError(f"at most {MAX_STOPS} stop strings are allowed, got {len(stops)}; give fewer")
    for one in stops:
        if not isinstance(one, str):
            raise ParameterError(f"a stop must be a string, got {type(one).__name__}; put its text in quotes")
        if not one or len(one) > MAX_STOP_CHARS:
            raise ParameterError(
                f"a stop string has 1 to {MAX_STOP_CHARS} characters, got {len(one)}; remove or shorten it"
            )
    return stops


class StopFinder:
    """Finds the stop string that completes first, letting through only text that cannot be part of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """-> text that is certain, and whether a stop (if two complete together, the longer) follows it."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        certain = len(text) - self._may_begin(text)
        self._held = text[certain:]
        return text[:certain], False

    def flush(self) -> str:
        """-> the text held back, which turned out to begin no stop string."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, text: str) -> int:
        """-> the length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), max(map(len, self._stops), default=1) - 1), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


class TextStream:
    """One reply's tokens turned into text, which does not depend on how the tokens are grouped into pushes.

    Text is sorted into channels. <|channel>NAME\\n ... <channel|> is "thought", its first line swallowed,
    unless `thought_channel` is off: then its text is part of the answer. <|tool_call> ... <tool_call|> is
    "tool", verbatim, its markers included, so that calls can be told apart and parsed. No other control token
    gives text. Stop strings count in the answer only, and do not reach across a change of channel.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: tuple[str, ...] = (),
        eos_ids: Iterable[int],
        thought_channel: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = StopFinder(check_stops(stop))
        self._eos_ids = frozenset(eos_ids)
        opens: dict[str, Channel] = {"<|tool_call>": "tool"}
        closes: dict[str, Channel] = {"<tool_call|>": "tool"}
        if thought_channel:
            opens["<|channel>"] = closes["<channel|>"] = "thought"
        self._opens = {tokenizer.token_id(text): channel for text, channel in opens.items()}
        self._closes = {tokenizer.token_id(text): channel for text, channel in closes.items()}
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._channel: Channel = "answer"
        self._in_name = False
        self._ready: list[Piece] = []
        self.finish_reason: str | None = None
        self.token_channel: Channel | None = None  # of the token pushed last; None: one that gives no text

    def push(self, tokens: Sequence[int]) -> Pushed:
        """-> the text that `tokens` make certain. After the end nothing more is used."""
        used = 0
        for token in tokens:
            if self.finish_reason is not None:
                break
            used += 1
            self.token_channel = None
            if token in self._eos_ids:
                self._end("stop")
            elif token in self._tokenizer.special_ids:
                self._control(token)
            else:
                self._add(self._characters.decode(self._tokenizer.token_bytes(token)))
        return Pushed(self._take(), used, self.finish_reason)

    def finish(self, reason: str) -> Pushed:
        """-> the text held back, when the reply ends for another `reason` than EOS or a stop string."""
        if self.finish_reason is None:
            self._end(reason)
        return Pushed(self._take(), 0, self.finish_reason)

    def _end(self, reason: str) -> None:
        self._close_text()
        self.finish_reason = reason

    def _control(self, token: int) -> None:
        """A control token ends any text held back and may change the channel."""
        self._close_text()
        if token in self._opens:
            self._channel = self._opens[token]
            self._in_name = self._channel == "thought"
        if self._channel == "tool":
            self.token_channel = "tool"
            self._put(self._tokenizer.token_text(token))
        if self._closes.get(token) == self._channel:
            self._channel = "answer"
            self._in_name = False

    def _add(self, text: str) -> None:
        """Text of ordinary tokens goes to the current channel, the answer's through the stop strings."""
        self.token_channel = self._channel
        if self._in_name:
            _, newline, text = text.partition("\n")
            self._in_name = not newline
        if self._channel != "answer":
            self._put(text)
            return
        text, stopped = self._stops.push(text)
        self._put(text)
        if stopped:
            self.finish_reason = "stop"

    def _close_text(self) -> None:
        """Drop bytes of an unfinished character; let go of text that might have become a stop string."""
        self._characters.reset()
        self._put(self._stops.flush())

    def _put(self, text: str) -> None:
        if not text:
            return
        if self._ready and self._ready[-1].channel == self._channel:
            text = self._ready.pop().text + text
        self._ready.append(Piece(text, self._channel))

    def _take(self) -> tuple[Piece, ...]:
        pieces, self._ready = tuple(self._ready), []
        return pieces
