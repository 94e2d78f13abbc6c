"""What may reach a terminal: text from models, files and errors without anything a terminal obeys."""

import unicodedata

# Prepended marks of Arabic, Syriac and Kaithi: format characters by category, but they are drawn.
_DRAWN = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
_JOINERS = frozenset("\u200c\u200d")
_JOINING_SCRIPTS = (("\u0600", "\u08ff"), ("\u0900", "\u0dff"), ("\u1000", "\u109f"), ("\u1780", "\u18af"))
_EMOJI_STYLE = "\ufe0f"
_SKIN_TONES = "🏻🏼🏽🏾🏿"


class TerminalCleaner:
    """Cleans one stream of text, however it is cut into pieces; a new stream needs a new cleaner.

    Control bytes are dropped, ESC and C1 among them, so the rest of an escape sequence becomes visible,
    harmless text. Invisible characters that reorder or hide text are shown as ⟨U+202E⟩.
    """

    def __init__(self) -> None:
        self._before = ""

    def push(self, text: str) -> str:
        """-> `text` with newlines and tabs as its only control characters."""
        out = []
        for char in text:
            if not (char.isprintable() or char in "\n\t"):
                char = self._inert(char)
            if char:
                self._before = char[-1]
                out.append(char)
        return "".join(out)

    def _inert(self, char: str) -> str:
        """-> what stands for an unprintable character."""
        kind = unicodedata.category(char)
        if kind == "Cc":
            return ""
        if kind in ("Cf", "Cs", "Zl", "Zp") and char not in _DRAWN and not self._joins(char):
            return f"⟨U+{ord(char):04X}⟩"
        return char  # other spaces, private use, and characters newer than this Python

    def _joins(self, char: str) -> bool:
        """Whether a zero-width joiner stands where writing needs it: in an emoji or a joining script."""
        before = self._before
        if char not in _JOINERS or not before:
            return False
        if any(first <= before <= last for first, last in _JOINING_SCRIPTS):
            return True
        emoji = before == _EMOJI_STYLE or before in _SKIN_TONES or unicodedata.category(before) == "So"
        return emoji and char == "\u200d"


def clean_for_terminal(text: str) -> str:
    """-> a whole text made safe to show, such as an error message or a model's name."""
    return TerminalCleaner().push(text)
