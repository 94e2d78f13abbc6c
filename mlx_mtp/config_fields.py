"""Reading one number, flag or list out of a config dict, refusing anything that is not what it should be."""

from dataclasses import dataclass
from typing import Any, TypeGuard

from mlx_mtp.errors import CheckpointError

LARGEST = 2**31 - 1
REMEDY = "restore the published config.json or download the model again"


@dataclass(frozen=True, slots=True)
class Fields:
    """A config dict with the place it came from; a null entry counts as absent."""

    raw: dict[str, Any]
    source: str

    def refuse(self, name: str, rule: str, got: object) -> CheckpointError:
        """The error to raise: where, which field, the rule, what was got, what to do."""
        return CheckpointError(f"{self.source}: {name} must be {rule}, got {shown(got)}; {REMEDY}")

    def get(self, name: str, default: Any = None) -> Any:
        value = self.raw.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None, *, low: int = 1, high: int = LARGEST) -> int:
        """A whole number in low..high; `default` None makes the field obligatory."""
        value = self.get(name, default)
        if not is_integer(value) or not low <= value <= high:
            raise self.refuse(name, f"a whole number from {low} to {high}", value)
        return value

    def number(self, name: str, default: float, *, high: float = 1e12) -> float:
        """A finite number above 0 and at most `high`."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(name, "a number", value)
        if not 0 < value <= high:  # false for NaN too
            raise self.refuse(name, f"a number above 0 and at most {high:g}", value)
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false", value)
        return value

    def section(self, name: str) -> "Fields":
        """The object under `name`, empty where it is absent."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.refuse(name, "an object", value)
        return Fields(value, f"{self.source} [{name}]")

    def only(self, name: str, allowed: tuple[object, ...], default: object) -> None:
        """Refuse a setting whose other values would need code that is not here."""
        value = self.raw.get(name, default)
        if value not in allowed:
            rule = " or ".join("null" if option is None else shown(option) for option in allowed)
            raise self.refuse(name, f"{rule} (other values are not supported)", value)

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One id or a list of ids below `vocab_size`; empty where absent."""
        value = self.get(name, [])
        ids = value if isinstance(value, list) else [value]
        if not all(is_integer(token) and 0 <= token < vocab_size for token in ids):
            raise self.refuse(name, f"token ids from 0 to {vocab_size - 1}", value)
        return tuple(dict.fromkeys(ids))


def is_integer(value: object) -> TypeGuard[int]:
    """Whether `value` is an int and not a bool, which Python counts as one."""
    return isinstance(value, int) and not isinstance(value, bool)


def shown_name(name: str) -> str:
    """A name, or words that may quote one, as it is, or quoted and cut where it would not be one short line."""
    return name if name.isprintable() and len(name) <= 200 else f"{name!r:.100}"


def shown(value: object) -> str:
    """`value` on one short line."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
