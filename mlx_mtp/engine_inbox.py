"""What any thread asks of an engine and sees of it: its requests from submission to end, and its status."""

import copy
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_mtp.conversation import Prompt, Request, make_request
from mlx_mtp.errors import BusyError, EngineError, MtpError
from mlx_mtp.mailbox import Mailbox
from mlx_mtp.pair import Pair
from mlx_mtp.row_start import Listener

Status = Literal["loading", "ready", "closed", "failed"]


@dataclass(slots=True)
class Job:
    """One submitted request; `request` is checked at once, or once the model is there."""

    mailbox: Mailbox
    prompt: Prompt
    options: dict[str, Any]
    request: Request | None = None

    def check(self, pair: Pair) -> Request:
        """Raises PromptError or ParameterError."""
        if self.request is None:
            self.request = make_request(pair, self.prompt, **self.options)
        return self.request


@dataclass(slots=True)
class Load:
    """Requests that are decoded and that wait, and bytes of kept prefixes, as the engine's thread last counted them."""

    running: int = 0
    waiting: int = 0
    cached_bytes: int = 0


class Inbox:
    """All requests that are not over, and the engine's status; `changed` guards what both sides write.

    is_served: whether the engine's thread computes, in this process: after a fork it does not.
    """

    def __init__(self, max_queue: int, is_served: Callable[[], bool]):
        self.changed = threading.Condition()
        self.status: Status = "loading"
        self.error: BaseException | None = None  # why it failed
        self.is_closing = False
        self.load = Load()
        self._new: deque[Job] = deque()
        self._live: list[Job] = []  # taken by the engine's thread, and not over
        self._max_queue, self._is_served = max_queue, is_served

    # Any thread

    @property
    def waiting(self) -> int:
        """Requests that are not prefilled yet."""
        return self.load.waiting + len(self._new)

    def submit(self, prompt: Prompt, options: dict[str, Any], pair: Pair | None) -> Mailbox:
        """Queue a request, checked at once if the pair is loaded. Raises EngineError, BusyError, or as `Job.check`."""
        self.check_open()
        job = Job(Mailbox(self._is_served), prompt, options)
        if pair is not None:
            job.check(pair)
        else:
            job.prompt = copy.deepcopy(prompt)
        with self.changed:
            self.check_open()
            if self.waiting >= self._max_queue:
                raise BusyError(
                    f"{self._max_queue} requests wait already; try again later, or raise max_queue"
                )
            self._new.append(job)
            self.changed.notify_all()
        return job.mailbox

    def check_open(self) -> None:
        """Raise EngineError, or why loading failed, where no request can be taken."""
        status, error = self.status, self.error
        if status == "failed" and isinstance(error, MtpError):
            raise error
        if status == "failed":
            raise EngineError(f"the engine's thread ended ({error!r}); make another engine") from error
        if status == "closed" or self.is_closing:
            raise EngineError("the engine is closed; make another one")
        if not self._is_served():
            raise EngineError("the engine does not run in this process; make one after a fork, not before")

    def wait_ready(self, timeout: float | None) -> None:
        """Until the model is loaded. Raises why it could not be, or TimeoutError."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.status != "loading", timeout):
                raise TimeoutError(f"the model was not loaded within {timeout:g} s; wait longer")
        self.check_open()

    def close(self) -> None:
        """Take no more requests and cancel those that are not over."""
        with self.changed:
            self.is_closing = True
            self.changed.notify_all()
        self.cancel_live()

    # The engine's thread

    @property
    def has_news(self) -> bool:
        """Whether there are new requests, or the engine is to close."""
        return bool(self._new) or self.is_closing

    def set_ready(self) -> None:
        """The model is loaded."""
        with self.changed:
            self.status = "ready"
            self.changed.notify_all()

    def take(self) -> list[Job]:
        """Requests that have come since the last look; where the engine is to close, all end."""
        self._live = [job for job in self._live if not job.mailbox.is_over]
        if self.is_closing:
            self.cancel_live()
            return []
        with self.changed:
            jobs = list(self._new)
            self._new.clear()
            self._live += jobs
        return jobs

    def cancel_live(self) -> None:
        """End within a round what was taken and is not over."""
        for job in list(self._live):
            job.mailbox.cancel()

    def fail_live(self, error: MtpError, *, but: Sequence[Listener | None]) -> None:
        """End with an error what was taken and is not over, but those."""
        for job in self._live:
            if all(job.mailbox is not listener for listener in but):
                job.mailbox.failed(error)

    def end(self, status: Status, error: BaseException | None) -> None:
        """The thread ends: leave nobody waiting."""
        with self.changed:
            self.status, self.error = status, error
            left = [*self._live, *self._new]
            self._new.clear()
            self.changed.notify_all()
        for job in left:
            job.mailbox.failed(
                EngineError("the engine was closed before this reply began; make another one")
                if status == "closed"
                else EngineError(f"the engine's thread ended ({error!r}); make another engine")
            )
