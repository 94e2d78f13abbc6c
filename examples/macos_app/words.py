"""What the app says: progress with bytes and time left, figures of a reply, and problems with their remedy."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_mtp import Progress
    from mlx_mtp.self_check import Checked
    from mlx_mtp.stats import Stats

SPEED_S = 10.0  # seconds of which the speed of a download is the mean
TITLES = {
    "memory": "Not enough memory",
    "hub": "The model could not be downloaded",
    "storage": "The disk is full or cannot be written",
    "checkpoint": "The model cannot be used",
    "pair": "The model and its drafter do not fit",
    "machine": "This computer cannot run the model",
    "context": "The conversation is too long",
    "prompt": "This message cannot be sent",
    "busy": "Too many replies are waiting",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """For a sheet: what is wrong, and what to do about it."""

    title: str
    text: str
    remedy: str

    @property
    def message(self) -> str:
        return "\n\n".join(part for part in (self.text, self.remedy) if part)


def problem_of(error: Exception) -> Problem:
    """The library's messages state the rule and what was got; what follows the last semicolon is the remedy."""
    from mlx_mtp import MtpError

    if not isinstance(error, MtpError):
        return Problem(
            "Something went wrong in this app", repr(error), "Try again; if that does not help, restart it."
        )
    text, _, remedy = str(error).rpartition("; ")
    if not text:
        text, remedy = remedy, ""
    return Problem(TITLES.get(error.code, "Something went wrong"), _sentence(text), _sentence(remedy))


def problem_of_checks(problems: "tuple[Checked, ...]") -> Problem:
    """What `selfcheck` found in this copy of the app."""
    text = "\n".join(f"{problem.name}: {problem.found}" for problem in problems)
    remedies = dict.fromkeys(problem.remedy for problem in problems if problem.remedy)
    return Problem("This copy of the app is not complete", text, "\n".join(map(_sentence, remedies)))


def status_words(stats: "Stats", context: int, finish_reason: str | None = None) -> str:
    """Speed, what MTP does for it, how full the context is, and why the reply ended early."""
    parts = [f"{stats.generation_tps:.1f} tokens/s"]
    if stats.drafted:
        parts.append(f"{stats.tokens_per_round:.1f} tokens a round")
        parts.append(f"{100 * stats.draft_acceptance_rate:.0f} % of drafts accepted")
    if stats.parked:
        parts.append(f"MTP is parked: {stats.reason or 'drafting does not pay here'}")
    parts.append(f"context {stats.prompt_tokens + stats.generation_tokens:,} of {context:,}")
    ends = {"cancelled": "stopped", "length": "ended at the limit"}
    if finish_reason in ends:
        parts.append(ends[finish_reason])
    return " · ".join(parts)


class ProgressWords:
    """Reports of one load -> a line and a share; the speed is that of the last ten seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque()
        self._total: int | None = None

    def line(self, progress: "Progress") -> tuple[str, float | None]:
        """-> the words, and how far it is from 0 to 1; None where that is not known."""
        done, total = progress.done, progress.total
        if done is None or not total:
            return _capital(progress.message), None
        share = min(1.0, done / total)
        if progress.stage == "prefill":
            return f"Reading the prompt: {done:,} of {total:,} tokens", share
        if progress.stage == "calibrate":
            return f"{_capital(progress.message)} · {done:,} of {total:,}", share
        parts = [_capital(progress.message), f"{done / 1e9:.2f} of {total / 1e9:.2f} GB"]
        speed = self._speed(done, total)
        if speed is not None and done < total:
            parts.append(f"{speed / 1e6:.1f} MB/s, {_time(max(1.0, (total - done) / speed))} left")
        return " · ".join(parts), share

    def _speed(self, done: int, total: int) -> float | None:
        """Bytes a second; None in the first second, and while nothing comes."""
        now = self._clock()
        if total != self._total or (self._samples and done < self._samples[-1][1]):
            self._samples.clear()  # another file set, or an attempt that began again
            self._total = total
        self._samples.append((now, done))
        while len(self._samples) > 2 and self._samples[1][0] <= now - SPEED_S:
            self._samples.popleft()
        began, first = self._samples[0]
        return (done - first) / (now - began) if now - began >= 1 and done > first else None


def _time(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence(text: str | None) -> str:
    """With a capital and a full stop."""
    if not text:
        return ""
    return _capital(text) + ("" if text[-1] in ".!?:…" else ".")
