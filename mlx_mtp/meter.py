"""What a chat template may spend: text and items made, processor time, and the size of single operations."""

import time
from collections.abc import Mapping

TIME_LIMIT_S = 5.0
EXTRA_TIME_S, EXTRA_PER_CHAR_S = 60.0, 1e-4  # Gemma's template is quadratic in the number of messages
BUDGET, BUDGET_PER_CHAR = 1 << 24, 128
MAX_INTEGER_BITS = 1 << 12
VALUE_COST = 8  # what an object counts for besides its characters
MAX_SMALL = 256  # characters to strip, columns to indent, length of a date format


class LimitExceeded(Exception):
    """The template did more than a chat template needs."""


class Meter:
    """Counts what one rendering of `input_chars` characters makes, and its processor time."""

    def __init__(self, input_chars: int) -> None:
        self.left = BUDGET + BUDGET_PER_CHAR * input_chars
        self._calls = 0
        self.seconds = TIME_LIMIT_S + min(EXTRA_TIME_S, EXTRA_PER_CHAR_S * input_chars)
        self._deadline = time.thread_time() + self.seconds

    def charge(self, amount: int) -> None:
        """Account for `amount` characters or items; raises LimitExceeded before they are made."""
        self.left -= amount
        if self.left < 0:
            raise LimitExceeded("it makes too much text")
        self._calls += 1
        if amount < 1000 and self._calls % 64:
            return  # reading the clock costs as much as most operations
        if time.thread_time() > self._deadline:
            raise LimitExceeded(f"it runs for more than {self.seconds:.0f} s")

    def charge_value(self, value: object) -> None:
        """Charge a value's size, a part as often as it occurs: nested lists can hold one 2^n times."""
        self.charge(VALUE_COST)
        if isinstance(value, str):
            self.charge(len(value))
        elif isinstance(value, int):
            self.charge(value.bit_length() // 3)
        elif isinstance(value, list | tuple):
            for item in value:
                self.charge_value(item)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self.charge_value(key)
                self.charge_value(item)


def check_integers(operator: str, left: int, right: int) -> None:
    bits = left.bit_length() * (max(right, 1) if operator == "**" else 1) + right.bit_length()
    if bits > MAX_INTEGER_BITS:
        raise LimitExceeded("it computes with huge numbers")


def check_small(number: int) -> None:
    if number > MAX_SMALL:
        raise LimitExceeded(f"it asks for {number:,} columns or characters where {MAX_SMALL} are allowed")
