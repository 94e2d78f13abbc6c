"""A long text of our own that does not repeat itself: a harbour's log, the same on every machine."""

import json
from importlib.resources import files
from typing import Any

MODULUS, FACTOR, STEP = 2**31, 1_103_515_245, 12_345  # the linear congruence of the C standard's example
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class _Dice:
    """Numbers that depend on nothing but how many were drawn: Python's own may change with its version."""

    def __init__(self) -> None:
        self._state = 20_26

    def below(self, n: int) -> int:
        self._state = (self._state * FACTOR + STEP) % MODULUS
        return (self._state >> 8) % n

    def pick(self, names: list[str]) -> str:
        return names[self.below(len(names))]


def harbour_log(words: int) -> str:
    """The first `words` words of the log; one entry a paragraph."""
    data = json.loads((files("mlx_mtp.measure") / "prompts/harbour_log.json").read_text(encoding="utf-8"))
    dice, parts, written, number = _Dice(), [], 0, 0
    while written < words:
        entry = _entry(data, dice, number).split(" ")
        parts.append(" ".join(entry[: words - written]))
        written += len(entry)
        number += 1
    return "\n\n".join(parts)


def _entry(data: dict[str, Any], dice: _Dice, number: int) -> str:
    boat, goods, clerk = dice.pick(data["boats"]), dice.pick(data["goods"]), dice.pick(data["clerks"])
    came, left = f"{5 + dice.below(9):02}:{dice.below(60):02}", f"{14 + dice.below(8)}:{dice.below(60):02}"
    trouble = dice.pick(data["troubles"]).format(a=2 + dice.below(11), b=12 + dice.below(60))
    remark = dice.pick(data["remarks"]).format(
        clerk=clerk[0].upper() + clerk[1:],
        place=dice.pick(data["places"]),
        boat=dice.pick(data["boats"]),
        n=2 + dice.below(28),
        h=17 + dice.below(5),
        m=10 + dice.below(50),
    )
    day, week = DAYS[number % 7], number // 7 + 1
    return (
        f"{day} of week {week}: the {boat} came in from {dice.pick(data['places'])} at {came} with "
        f"{20 + dice.below(400)} {goods}; {dice.pick(data['weather'])}. On that day {trouble}. She left for "
        f"{dice.pick(data['places'])} at {left}. {remark}"
    )
