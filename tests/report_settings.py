"""What the protocol's sections are given in tests: golden pairs, short replies, few repeats."""

import functools
from typing import Any

from goldens import golden
from mlx_mtp.machine import this_machine
from mlx_mtp.pair import Pair
from mlx_mtp.report.protocol import Deadline
from mlx_mtp.report.setting import Setting
from pairs import GOLDEN, golden_pair

pair_of = functools.cache(golden_pair)


def long() -> Deadline:
    """Time enough, from now on."""
    return Deadline(600)


def setting_of(variant: str, pair: Pair | None = None, **changes: Any) -> Setting:
    """A golden pair on this machine with its two golden prompts, short replies and few repeats."""
    folder = GOLDEN / variant
    values: dict[str, Any] = {
        "name": variant,
        "machine": this_machine(),
        "pair": pair or pair_of(variant),
        "target_folder": folder / "target",
        "drafter_folder": folder / "drafter",
        "offline": True,
        "prompts": {name: golden(variant, name).prompt for name in ("short", "long")},
        "tokens": 24,
        "repeats": 2,
    }
    return Setting(**values | changes)


def found_by(section: Any, setting: Setting) -> dict[str, Any]:
    found: dict[str, Any] = {}
    section(setting, found, long())
    return found
