"""Sections that are each bounded in time and each fail alone, and the document they fill."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

import mlx_mtp
from mlx_mtp.report.privacy import publishable
from mlx_mtp.report.setting import Setting

SCHEMA_VERSION = 1
TOTAL_SECONDS = 19 * 60.0  # of all sections; opening the model comes before

Found = dict[str, Any]


class OutOfTime(Exception):
    """A section has used up its seconds; what it found so far stays."""


class NotHere(Exception):
    """A section's question does not arise with this model or on this machine; the message says why."""


class Deadline:
    """A section's time: long work calls `check` between its steps, which is the only place where it can end."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        return self._end - self._clock()

    def check(self) -> None:
        """Raise OutOfTime once the time is used up."""
        if self.left <= 0:
            raise OutOfTime


@dataclass(frozen=True, slots=True)
class Section:
    """One question; `run` fills `found` as it goes, so that what is there survives an error."""

    name: str
    question: str
    seconds: float
    run: Callable[[Setting, Found, Deadline], None]
    needs_pair: bool = True


def run_protocol(
    setting: Setting,
    sections: Sequence[Section],
    *,
    seconds: float = TOTAL_SECONDS,
    on_section: Callable[[Section], None] = lambda section: None,
    keep: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Play `sections` within `seconds` altogether -> the document, free of paths that name a person.

    `keep` gets the document before and after each section: should the process die, the file names the section.
    """
    document: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "what": "mlx-mtp first-Mac protocol",
        "mlx_mtp": mlx_mtp.__version__,
        "model": setting.name,
        "device": str(mx.default_device()),
        "complete": False,
        "running": None,
        "sections": {},
    }
    total = Deadline(seconds)
    for section in sections:
        document["running"] = section.name
        keep(publishable(document))
        on_section(section)
        limit = min(section.seconds, max(total.left, 0.0))
        document["sections"][section.name] = run_section(section, setting, limit)
    document["running"] = None
    document["complete"] = True
    document = publishable(document)
    keep(document)
    return document


def run_section(section: Section, setting: Setting, seconds: float) -> dict[str, Any]:
    """The section's entry: its status, why it is not "ok" where it is not, and what was found until then."""
    found: Found = {}
    status, reason = "ok", None
    started = time.monotonic()
    try:
        if section.needs_pair and setting.pair is None:
            raise NotHere(f"no model is loaded: {setting.no_pair_because}")
        deadline = Deadline(seconds)
        deadline.check()
        section.run(setting, found, deadline)
    except OutOfTime:
        status, reason = "out of time", f"stopped after {seconds:.0f} s; what was found until then stands"
    except NotHere as error:
        status, reason = "skipped", str(error)
    except Exception as error:  # the section's answer is then this error; the others still run
        status, reason = "error", f"{type(error).__name__}: {error}"
    mx.clear_cache()
    entry: dict[str, Any] = {"question": section.question, "status": status}
    if reason is not None:
        entry["reason"] = reason
    return {**entry, "seconds": round(time.monotonic() - started, 2), "found": found}
