"""Reading a JSON object's fields by name and type, and which of them nobody asked for."""

import math
from collections.abc import Iterable
from typing import Any

from mlx_mtp.server.refusals import bad

LARGEST_WHOLE = 2**63  # beyond it no count means anything; seeds are folded from there


class Fields:
    """A request's fields; a missing one and null are the same. Each reader raises a 400 that names the field."""

    def __init__(self, body: dict[str, Any]):
        self._body = body
        self._asked: set[str] = set()

    def value(self, name: str) -> Any:
        """Whatever it is, None where it is missing."""
        self._asked.add(name)
        return self._body.get(name)

    def number(self, name: str) -> float | None:
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise bad(name, f"{name} must be a number, got {_kind(value)}; give a number", "invalid_type")
        if isinstance(value, float) and not math.isfinite(value):
            raise bad(name, f"{name} must be a finite number; give another")
        return value

    def whole(self, name: str, least: int | None = None, most: int | None = None) -> int | None:
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad(name, f"{name} must be a whole number, got {_kind(value)}; give one", "invalid_type")
        low, high = -LARGEST_WHOLE if least is None else least, LARGEST_WHOLE if most is None else most
        if not low <= value <= high:
            limits = f"at least {low}" if most is None else f"{low} to {high}"
            raise bad(name, f"{name} must be {limits}; choose a value in that range")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool | None:
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise bad(name, f"{name} must be true or false, got {_kind(value)}", "invalid_type")
        return value

    def text(self, name: str) -> str | None:
        value = self.value(name)
        if value is not None and not isinstance(value, str):
            raise bad(name, f"{name} must be a text, got {_kind(value)}", "invalid_type")
        return value

    def object(self, name: str) -> dict[str, Any] | None:
        value = self.value(name)
        if value is not None and not isinstance(value, dict):
            raise bad(name, f"{name} must be an object, got {_kind(value)}", "invalid_type")
        return value

    def items(self, name: str, most: int) -> list[Any] | None:
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise bad(name, f"{name} must be a list, got {_kind(value)}", "invalid_type")
        if len(value) > most:
            raise bad(name, f"{name} has at most {most} entries, got {len(value)}; give fewer")
        return value

    def unread(self, harmless: Iterable[str] = ()) -> tuple[str, ...]:
        """Names that no reader asked for, without those that are known to change nothing."""
        known = self._asked | set(harmless)
        return tuple(
            sorted(name for name, value in self._body.items() if name not in known and value is not None)
        )


def _kind(value: Any) -> str:
    """A value's type in JSON's words."""
    if value is None:
        return "null"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
