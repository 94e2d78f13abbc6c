"""The arguments of a tool call in Gemma 4's notation -> JSON, symbol by symbol."""

import json

QUOTE = '<|"|>'
_PLAIN_ESCAPES = frozenset('"\\/bfnrt')


class Arguments:
    """One call's arguments, from the opening brace on, symbol by symbol -> JSON text."""

    def __init__(self) -> None:
        self._open: list[str] = []  # "{" or "[", outermost first
        self._is_first = True  # nothing stands before the next entry of the innermost one
        self._state = "value"
        self._word = ""
        self._quote = QUOTE
        self._is_key = self._is_escaped = False

    @property
    def is_quoted(self) -> bool:
        """Whether what comes next is the text of a value or key in Gemma's quotes."""
        return self._state == "string" and self._quote == QUOTE

    def push(self, symbol: str) -> str:
        """-> JSON that `symbol` adds."""
        if self._state == "done":
            return ""
        if self._state == "string":
            return self._in_string(symbol)
        if self._state == "word":
            return self._in_word(symbol)
        if symbol.isspace():
            return ""
        if symbol in (QUOTE, '"') and self._state in ("key", "value"):
            return self._begin_string(symbol)
        if self._state == "key":
            return self._begin_entry(symbol)
        if self._state == "value":
            return self._begin_value(symbol)
        if self._state == "colon":
            return self._after_key(symbol)
        return self._after_value(symbol)

    def close(self) -> str:
        """-> whatever makes it one JSON object, wherever it ends."""
        out = ""
        if self._state == "string":
            out += "\\\\" * self._is_escaped + '"' + ":null" * self._is_key
        elif self._state == "word":
            out += self._end_word()
        elif self._state == "colon":
            out += ":null"
        elif self._state == "value" and self._open[-1:] == ["{"]:
            out += "null"
        while self._open:
            out += "}" if self._open.pop() == "{" else "]"
        self._state = "done"
        return out

    def _begin_string(self, quote: str) -> str:
        self._quote, self._is_key = quote, self._state == "key"
        self._state = "string"
        return self._comma() + '"'

    def _in_string(self, symbol: str) -> str:
        if self._is_escaped:
            self._is_escaped = False
            return "\\" + symbol if symbol in _PLAIN_ESCAPES else "\\\\" + json.dumps(symbol)[1:-1]
        if symbol == self._quote:
            self._state = "colon" if self._is_key else "after"
            return '"'
        if symbol == "\\" and self._quote == '"':
            self._is_escaped = True
            return ""
        return json.dumps(symbol)[1:-1]

    def _begin_entry(self, symbol: str) -> str:
        if symbol == "}":
            return self._shut("}")
        if symbol == ",":
            return ""
        self._state, self._word, self._is_key = "word", symbol, True
        return ""

    def _begin_value(self, symbol: str) -> str:
        self._is_key = False
        if symbol in ("{", "["):
            out = self._comma() + symbol
            self._open.append(symbol)
            self._is_first, self._state = True, "key" if symbol == "{" else "value"
            return out
        if symbol in (",", "}", "]"):
            if self._open[-1:] == ["["]:
                return "" if symbol == "," else self._after_value(symbol)
            return "null" + self._after_value(symbol)
        self._state, self._word = "word", symbol
        return ""

    def _in_word(self, symbol: str) -> str:
        ends = (":", ",", "}") if self._is_key else (",", "}", "]")
        if symbol not in ends:
            self._word += symbol
            return ""
        is_key = self._is_key
        out = self._end_word(with_null=symbol != ":")
        if is_key and symbol == ":":
            self._state = "value"
            return out
        return out + self._after_value(symbol)

    def _end_word(self, *, with_null: bool = True) -> str:
        word, self._word = self._word.strip(), ""
        if self._is_key:
            return self._comma() + json.dumps(word) + ":" + "null" * with_null
        return self._comma() + (word if _is_scalar(word) else json.dumps(word))

    def _after_key(self, symbol: str) -> str:
        if symbol == ":":
            self._state = "value"
            return ":"
        return ":null" + self._after_value(symbol) if symbol in (",", "}", "]") else ""

    def _after_value(self, symbol: str) -> str:
        self._state = "after"
        if symbol == ",":
            self._state = "key" if self._open[-1] == "{" else "value"
        elif symbol == "}":
            out = ""
            while self._open[-1] == "[":
                self._open.pop()
                out += "]"
            return out + self._shut("}")
        elif symbol == "]" and self._open[-1] == "[":
            return self._shut("]")
        return ""

    def _shut(self, bracket: str) -> str:
        """Close the innermost, which `bracket` fits."""
        self._open.pop()
        self._state, self._is_first = "after" if self._open else "done", False
        return bracket

    def _comma(self) -> str:
        """What stands before the next key of an object, or the next value of a list."""
        if not self._open or (self._open[-1] == "{" and not self._is_key):
            return ""
        is_first, self._is_first = self._is_first, False
        return "" if is_first else ","


def _is_scalar(word: str) -> bool:
    """Whether JSON has it as a number, true, false or null."""
    try:
        value = json.loads(word, parse_constant=lambda name: name)
    except (ValueError, RecursionError):
        return False
    return not isinstance(value, str | list | dict) and value == value
