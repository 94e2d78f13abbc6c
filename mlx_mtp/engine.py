"""One inference thread, many callers: submit from any thread, several requests decoded together."""

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mlx_mtp.batch_width import check_batch
from mlx_mtp.conversation import Prompt
from mlx_mtp.engine_chat import EngineConversation
from mlx_mtp.engine_inbox import Status
from mlx_mtp.engine_loop import Settings, Worker
from mlx_mtp.errors import EngineError, ParameterError
from mlx_mtp.events import Event
from mlx_mtp.handles import Handle, call_with_events
from mlx_mtp.pair import Pair, load
from mlx_mtp.profiles import kept_times
from mlx_mtp.progress import OnProgress
from mlx_mtp.round import Rounds
from mlx_mtp.round_times import RoundTimes
from mlx_mtp.sampling import Sampling

logging.getLogger("mlx_mtp").addHandler(logging.NullHandler())

MAX_QUEUE = 256  # requests that wait unless told otherwise


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What an engine does now: "loading", "ready", "closed" or "failed", and its requests; bytes of kept prefixes."""

    status: Status
    running: int
    waiting: int
    cached_bytes: int


class Engine:
    """Loads a pair, or takes one, and answers requests on a thread of its own until it is closed.

    pair: what `load` gave, or a name that is loaded there (`load_options` as for `load`); the constructor waits for it
    unless `wait` is False. max_batch: requests decoded together ("auto": as many as pay here, at most 16); max_queue:
    that may wait beyond. memory_budget: bytes that the process may take (None: what models may on this machine);
    prefix_budget: of these, for K/V of earlier requests, so that one which begins alike prefills only what is new
    (None: a quarter of what the model leaves, at most 8 GB; 0: none). set_memory_limits: also set MLX's process-wide
    wired and cache limits while it is open. keep_times: take over how long rounds took in earlier runs with this model,
    and keep it for the next in this user's data folder, so that "auto" need not try again what pays.

    Nothing is printed; no signal handler, environment variable or limit is changed otherwise. Raises what `load`
    raises, and ParameterError.
    """

    def __init__(
        self,
        pair: Pair | str | Path,
        *,
        max_batch: int | Literal["auto"] = "auto",
        max_queue: int = MAX_QUEUE,
        memory_budget: int | None = None,
        prefix_budget: int | None = None,
        set_memory_limits: bool = False,
        keep_times: bool = True,
        wait: bool = True,
        on_progress: OnProgress | None = None,
        **load_options: Any,
    ):
        if max_batch != "auto":
            check_batch(max_batch)
        for name, value, least in (
            ("max_queue", max_queue, 1),
            ("memory_budget", memory_budget, 1),
            ("prefix_budget", prefix_budget, 0),
        ):
            _check_count(name, value, least)
        settings = Settings(max_batch, max_queue, memory_budget, prefix_budget, set_memory_limits)
        if isinstance(pair, Pair):
            if load_options:
                raise ParameterError(
                    f"{', '.join(load_options)} belong to a model that the engine loads, but a loaded pair was given; "
                    "give its name instead, or leave them out"
                )
            find: Callable[[OnProgress], Pair] = partial(_given, pair)
        else:
            find = partial(_loaded, pair, load_options)
        self._worker = Worker(partial(_ready, find, keep_times), on_progress, settings)
        # Also at the interpreter's exit: what is being generated then ends within a round.
        self._closed = weakref.finalize(self, self._worker.stop)
        if wait:
            self.wait_ready()

    def submit(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        num_draft_tokens: int | str = "auto",
        stop: str | Sequence[str] = (),
        tools: list[dict[str, Any]] | None = None,
        thinking: bool | None = None,
        log_probs: int | None = None,
        begin_with: Sequence[int] = (),
        on_event: Callable[[Event], None] | None = None,
    ) -> Handle:
        """Queue a request from any thread; arguments as for `generate`, checked before this returns.

        While the model is being loaded they are checked later, and what is wrong is raised by the handle. on_event is
        given all events on a thread of the request's own. Raises PromptError, ParameterError, BusyError where too many
        wait, or EngineError where the engine is closed or has failed.
        """
        options = {
            "max_tokens": max_tokens,
            "sampling": sampling,
            "num_draft_tokens": num_draft_tokens,
            "stop": stop,
            "tools": tools,
            "thinking": thinking,
            "log_probs": log_probs,
            "begin_with": begin_with,
        }
        handle = Handle(self._worker.submit(prompt, options), self)
        if on_event is not None:
            call_with_events(handle, on_event)
        return handle

    def conversation(self, system: str | None = None, **options: Any) -> EngineConversation:
        """A chat whose messages are kept; `options` are `submit`'s for every reply."""
        return EngineConversation(self, system, options)

    @property
    def pair(self) -> Pair:
        """The loaded pair with the engine's own rounds; for a look, not to compute with on another thread."""
        self._worker.inbox.check_open()
        pair = self._worker.pair
        if pair is None:
            raise EngineError("the model is still being loaded; call wait_ready() first")
        return pair

    @property
    def status(self) -> EngineStatus:
        """A look without waiting; the thread of an engine that was forked has ended in the child."""
        inbox = self._worker.inbox
        status = inbox.status
        if status in ("loading", "ready") and not self._worker.is_alive:
            status = "failed"
        return EngineStatus(status, inbox.load.running, inbox.waiting, inbox.load.cached_bytes)

    def wait_ready(self, timeout: float | None = None) -> None:
        """Until the model is loaded. Raises why it could not be, or TimeoutError."""
        self._worker.inbox.wait_ready(timeout)

    def close(self) -> None:
        """Cancel what runs, free the model and end the thread; may be called again, from any thread."""
        self._closed.detach()
        self._worker.stop(None)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _given(pair: Pair, on_progress: OnProgress) -> Pair:
    return pair


def _loaded(name: str | Path, options: dict[str, Any], on_progress: OnProgress) -> Pair:
    return load(name, on_progress=on_progress, **options)


@contextmanager
def _ready(find: Callable[[OnProgress], Pair], keep_times: bool, on_progress: OnProgress) -> Iterator[Pair]:
    """The pair with rounds of its own: times, counts and compiled functions belong to one thread."""
    pair = find(on_progress)
    times = RoundTimes(pair.rounds.times.prior)
    rounds = Rounds(pair.target, pair.drafter, compiled=pair.rounds.compiled, times=times)
    rounds.exactness, rounds.tax = pair.rounds.exactness, pair.rounds.tax
    pair = replace(pair, rounds=rounds)
    with kept_times(pair) if keep_times else nullcontext() as warning:
        yield pair if warning is None else replace(pair, warnings=(*pair.warnings, warning))


def _check_count(name: str, value: int | None, least: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ParameterError(f"{name} must be a whole number >= {least}, got {value!r}; choose one")
