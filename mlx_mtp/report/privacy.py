"""What a person can publish: no home folder, no user name in a path, and no number that JSON does not have."""

import math
import os
import re
from pathlib import Path
from typing import Any

HOMES = re.compile(r"/(?:Users|home)/[^/\s'\"]+")


def publishable(value: Any, *, home: str | None = None) -> Any:
    """The same value with home folders written as `~`, the user's name in paths as `USER`, and NaN or Inf as text."""
    return _clean(value, home or str(Path("~").expanduser()))


def _clean(value: Any, home: str) -> Any:
    if isinstance(value, dict):
        return {_clean(str(name), home): _clean(entry, home) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(entry, home) for entry in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return _clean_text(value, home)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _clean_text(text: str, home: str) -> str:
    if len(home) > 1 and home.startswith("/"):
        text = re.sub(re.escape(home) + r"(?=[/\s'\":;,)]|$)", "~", text)
        user = re.escape(Path(home).name)
        text = re.sub(rf"(?<=/){user}(?=[/\s'\":;,)]|$)", "USER", text)
    return HOMES.sub("~", text)
