"""Progress on stderr: one line painted over on a terminal, a plain line now and then elsewhere."""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

from mlx_mtp.clean import clean_for_terminal
from mlx_mtp.cli.sizes import bytes_text, columns_of, cut, share_text, time_text
from mlx_mtp.cli.status import short_count
from mlx_mtp.cli.terminal import is_smart, say, write_aside
from mlx_mtp.progress import Progress

PAINT_S = 0.1  # between paintings on a terminal
TICK_S = 1.0  # painted again without news, so that a stalled download does not keep showing its old speed
PLAIN_S = 10.0
SPEED_S = 10.0  # the speed is that of the last ten seconds
DONE = {"download": "downloaded", "quantize": "quantised"}  # announced and summed up; the others only show
SMALLEST_MESSAGE = 8


class Meter:
    """How far one stage is and how fast it goes; what was there when it began counts for neither."""

    def __init__(self, now: float, progress: Progress) -> None:
        self.began = now
        self.first = progress
        self.progress = progress
        self._samples = deque([(now, progress.done or 0)])

    def update(self, now: float, progress: Progress) -> None:
        done = progress.done or 0
        if done < self._samples[-1][1]:
            self._samples.clear()
        self._samples.append((now, done))
        while len(self._samples) > 2 and self._samples[1][0] <= now - SPEED_S:
            self._samples.popleft()
        self.progress = progress

    def includes(self, progress: Progress) -> bool:
        """Whether a report is about the same work; a download that waits for its connection is the same download."""
        stages = {self.progress.stage, progress.stage}
        is_same = len(stages) == 1 or stages == {"download", "wait"}
        return is_same and self.progress.total == progress.total

    @property
    def percent(self) -> int | None:
        done, total = self.progress.done, self.progress.total
        return None if done is None or not total else min(100, 100 * done // total)

    def speed(self, now: float) -> float | None:
        """Units a second over the last ten, None in the first second."""
        while len(self._samples) > 1 and self._samples[1][0] <= now - SPEED_S:
            self._samples.popleft()
        began, done = self._samples[0]
        if now - began < 1:
            return None
        return (self._samples[-1][1] - done) / (now - began)

    def figures(self, now: float) -> list[str]:
        """The most important first: percent, amount, speed, time left."""
        done, total = self.progress.done, self.progress.total
        if done is None or not total:
            seconds = now - self.began
            return [] if seconds < 2 else [time_text(seconds)]
        parts = [f"{self.percent} %"]
        if self.progress.stage == "prefill":
            return [*parts, f"{short_count(done)}/{short_count(total)} tokens"]
        if self.progress.stage == "calibrate":
            return [*parts, f"{done}/{total} rounds"]
        parts.append(share_text(done, total))
        speed = self.speed(now)
        if speed is not None and done < total:
            parts.append(f"{bytes_text(speed)}/s")
            if speed > 0:
                parts.append(f"{time_text(max(1.0, (total - done) / speed))} left")
        return parts


class ProgressLine:
    """Takes `Progress` reports from any thread and shows them; leave the `with` block to end the line."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, ticks: bool = True) -> None:
        self._clock = clock
        self._repaints = is_smart(sys.stderr)
        self._lock = threading.RLock()
        self._meter: Meter | None = None
        self.last_stage: str | None = None  # of the newest report, None before the first
        self._shown = 0  # columns now on the line
        self._spoke = float("-inf")
        self._spoke_percent = 0
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True) if ticks and self._repaints else None

    def __enter__(self) -> "ProgressLine":
        if self._ticker is not None:
            self._ticker.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        with self._lock:
            self._close_stage()

    def __call__(self, progress: Progress) -> None:
        with self._lock:
            now = self._clock()
            meter = self._meter
            self.last_stage = progress.stage
            if meter is None or not meter.includes(progress):
                self._close_stage()
                self._begin_stage(now, progress)
                return
            has_news = meter.progress.stage != progress.stage
            meter.update(now, progress)
            if not self._repaints:
                self._speak(now, at_once=has_news and progress.stage == "wait")
            elif has_news or now - self._spoke >= PAINT_S or progress.done == progress.total:
                self._paint(now)

    def _begin_stage(self, now: float, progress: Progress) -> None:
        self._meter = Meter(now, progress)
        self._spoke, self._spoke_percent = now, self._meter.percent or 0
        if self._repaints:
            self._paint(now)
        elif progress.stage in DONE:
            say(self._line(now, None))

    def _close_stage(self) -> None:
        """Clear the line; a long stage that was seen through leaves one that sums it up."""
        meter, self._meter = self._meter, None
        if meter is None:
            return
        self._clear()
        now, last = self._clock(), meter.progress
        moved = (last.done or 0) - (meter.first.done or 0)
        if last.stage in DONE and last.total and last.done == last.total and moved:
            say(f"{DONE[last.stage]} {bytes_text(moved)} in {time_text(max(1.0, now - meter.began))}")

    def _speak(self, now: float, *, at_once: bool) -> None:
        """A plain line after each ten seconds, and at each tenth of a long stage."""
        meter = self._meter
        assert meter is not None
        percent = meter.percent
        tenth = percent is not None and percent // 10 > self._spoke_percent // 10 and percent < 100
        is_long = meter.progress.stage in DONE
        if at_once or now - self._spoke >= PLAIN_S or (tenth and is_long):
            say(self._line(now, None))
            self._spoke, self._spoke_percent = now, percent or 0

    def _paint(self, now: float) -> None:
        columns = self._columns()
        line = self._line(now, columns)
        width = columns_of(line)
        write_aside("\r" + line + " " * (min(self._shown, columns) - width))
        self._shown, self._spoke = width, now

    def _clear(self) -> None:
        if self._shown:
            write_aside("\r" + " " * min(self._shown, self._columns()) + "\r")
            self._shown = 0

    def _line(self, now: float, columns: int | None) -> str:
        """The message and as many figures as fit into `columns` (None: any number)."""
        assert self._meter is not None
        message = clean_for_terminal(self._meter.progress.message).replace("\n", " ").replace("\t", " ")
        figures = self._meter.figures(now)
        if columns is None:
            return "  ".join([message, *figures])
        while figures and columns_of("  ".join(figures)) > columns:
            figures.pop()
        shown = "  ".join(figures)
        if not figures:
            return cut(message, columns)
        room = columns - columns_of(shown) - 2
        return f"{cut(message, room)}  {shown}" if room >= SMALLEST_MESSAGE else shown

    def _columns(self) -> int:
        """Columns that may be written to without reaching the last, where some terminals wrap."""
        try:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
        except OSError:
            columns = 0
        return (columns or 80) - 1

    def _tick(self) -> None:
        while not self._ended.wait(TICK_S):
            with self._lock:
                now = self._clock()
                if self._meter is not None and not self._ended.is_set() and now - self._spoke >= TICK_S:
                    self._paint(now)
