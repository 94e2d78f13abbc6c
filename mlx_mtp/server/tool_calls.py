"""Tool calls as Gemma 4 writes them, turned into OpenAI's as they come.

<|tool_call>call:NAME{key:<|"|>text<|"|>,n:3,on:true,list:[1,{a:null}]}<tool_call|>

A name is known once its brace opens; arguments are translated to JSON character by character. Whatever a model writes
inside the braces, what comes out by the end of the call is one JSON object: a word without quotes becomes a text, a
missing value null, what is left open is closed. A call without a name that can be read is no call, but text.
"""

import re
import secrets
from dataclasses import dataclass

from mlx_mtp.server.tool_arguments import QUOTE, Arguments

OPEN, CLOSE = "<|tool_call>", "<tool_call|>"
_MARKS = (OPEN, CLOSE, QUOTE)
_HEADER = re.compile(r"\s*call:\s*([\w.:/-]{1,128})\s*")
_LONGEST_HEADER = 200  # characters; without a brace by then it is no call


@dataclass(frozen=True, slots=True)
class Begun:
    """Call number `index`, from 0, has a name."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Argued:
    """More of the JSON text of call `index`'s arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """Call `index` is complete."""

    index: int


@dataclass(frozen=True, slots=True)
class NoCall:
    """Text that looked like a call and is none, as the model wrote it."""

    text: str


Part = Begun | Argued | Ended | NoCall


class ToolCallReader:
    """The text of a reply's tool channel -> parts of calls; how it is cut into pieces makes no difference."""

    def __init__(self) -> None:
        self.count = 0  # calls with a name
        self.complete = 0  # of these, whose end the model wrote
        self._held = ""
        self._header: str | None = None  # of the call that has no name yet
        self._arguments: Arguments | None = None
        self._is_text = self._may_be_closed = False

    def push(self, text: str) -> list[Part]:
        """-> what `text` makes certain."""
        parts: list[Part] = []
        text = self._held + text
        at = 0
        while at < len(text):
            mark = next((mark for mark in _MARKS if text.startswith(mark, at)), None)
            if mark is None and text[at] == "<" and any(mark.startswith(text[at:]) for mark in _MARKS):
                break
            symbol = mark or text[at]
            self._take(symbol, parts)
            at += len(symbol)
        self._held = text[at:]
        return _joined(parts)

    def finish(self, *, is_whole: bool) -> list[Part]:
        """-> the rest. `is_whole`: the model ended by itself, so that an open call is closed; else it stays cut."""
        parts: list[Part] = []
        for symbol in self._held:
            self._take(symbol, parts)
        self._held = ""
        if self._arguments is not None and (is_whole or self._may_be_closed):
            self.complete += self._may_be_closed
            self._close(parts)
        elif self._header is not None:
            parts.append(NoCall(OPEN + self._header))
        self._header = None
        return _joined(parts)

    def _take(self, symbol: str, parts: list[Part]) -> None:
        if self._may_be_closed:
            self._may_be_closed = False
            if symbol != OPEN and self._arguments is not None:
                self._argue(self._arguments.push(CLOSE), parts)
        elif self._arguments is not None and self._arguments.is_quoted and symbol in (OPEN, CLOSE):
            # After a call's end the channel goes on with another call or not at all; else it is the text of a value.
            self._may_be_closed = symbol == CLOSE
            if symbol == OPEN:
                self._argue(self._arguments.push(symbol), parts)
            return
        if symbol == OPEN:
            self._end_call(parts)
            self._header = ""
        elif symbol == CLOSE:
            self._end_call(parts)
        elif self._arguments is not None:
            self._argue(self._arguments.push(symbol), parts)
        elif self._header is not None:
            self._header_symbol(symbol, parts)
        else:
            parts.append(NoCall(symbol))

    def _header_symbol(self, symbol: str, parts: list[Part]) -> None:
        assert self._header is not None
        found = _HEADER.fullmatch(self._header) if symbol == "{" else None
        if found is not None:
            parts.append(Begun(self.count, f"call_{secrets.token_hex(12)}", found[1]))
            self.count += 1
            self._header, self._arguments = None, Arguments()
            self._argue(self._arguments.push(symbol), parts)
        elif symbol == "{" or len(self._header) > _LONGEST_HEADER:
            parts.append(NoCall(OPEN + self._header + symbol))
            self._header, self._is_text = None, True
        else:
            self._header += symbol

    def _end_call(self, parts: list[Part]) -> None:
        if self._arguments is not None:
            self.complete += 1
            self._close(parts)
        elif self._header is not None:
            parts.append(NoCall(OPEN + self._header + CLOSE))
        elif self._is_text:
            parts.append(NoCall(CLOSE))
        self._header, self._is_text = None, False

    def _close(self, parts: list[Part]) -> None:
        assert self._arguments is not None
        self._argue(self._arguments.close(), parts)
        parts.append(Ended(self.count - 1))
        self._arguments = None

    def _argue(self, text: str, parts: list[Part]) -> None:
        if text:
            parts.append(Argued(self.count - 1, text))


def _joined(parts: list[Part]) -> list[Part]:
    """Neighbours of one kind as one."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, NoCall) and isinstance(last, NoCall):
            joined[-1] = NoCall(last.text + part.text)
        elif isinstance(part, Argued) and isinstance(last, Argued) and part.index == last.index:
            joined[-1] = Argued(part.index, last.text + part.text)
        else:
            joined.append(part)
    return joined
