"""The thread on which an engine loads, computes and lets go; everything that MLX does for it happens here."""

import logging
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

from mlx_mtp.admission import GIB
from mlx_mtp.batch import Batch
from mlx_mtp.batch_choice import WidthChooser, make_chooser
from mlx_mtp.batch_watch import Watch
from mlx_mtp.conversation import Prompt
from mlx_mtp.engine_inbox import Inbox, Load, Status
from mlx_mtp.errors import EngineError, GenerationError, MtpError
from mlx_mtp.limits import memory_limits
from mlx_mtp.machine import footprint_bytes, this_machine
from mlx_mtp.mailbox import Mailbox
from mlx_mtp.pair import Pair
from mlx_mtp.prefix_cache import PrefixCache
from mlx_mtp.pressure import Guard, out_of_memory_refused
from mlx_mtp.progress import OnProgress, Progress, silent
from mlx_mtp.prompt import TURN
from mlx_mtp.row_start import Row
from mlx_mtp.shared_policy import SharedPolicy

LOG = logging.getLogger(__name__)
PREFIX_SHARE, PREFIX_AT_MOST = 0.25, 8 * GIB  # of what is left of the budget once the model is loaded
LOOK_EVERY_S = 5.0  # how often an engine that has nothing to do looks whether memory is short
EXIT_WITHIN_S = 30.0  # for which the process's end waits: a round or a chunk of a prefill may be running

Source = Callable[[OnProgress], AbstractContextManager[Pair]]  # entered, and left, on the engine's thread


@dataclass(frozen=True, slots=True)
class Settings:
    """What an engine was asked to be; bytes None: what suits the machine."""

    max_batch: int | Literal["auto"]
    max_queue: int
    memory_budget: int | None
    prefix_budget: int | None
    set_memory_limits: bool


class Worker:
    """An engine's thread and what is asked of it."""

    def __init__(self, source: Source, on_progress: OnProgress | None, settings: Settings):
        self.pair: Pair | None = None
        self._source: Source | None = source
        self._on_progress = on_progress or silent
        self._settings = settings
        self._batch: Batch | None = None
        self._thread = threading.Thread(target=self._run, name="mlx-mtp engine", daemon=True)
        self.inbox = Inbox(settings.max_queue, self._thread.is_alive)
        self._thread.start()

    # Any thread

    @property
    def is_alive(self) -> bool:
        """Whether it computes, in this process: after a fork it does not."""
        return self._thread.is_alive()

    def submit(self, prompt: Prompt, options: dict[str, Any]) -> Mailbox:
        """Queue a request. Raises EngineError, BusyError, PromptError or ParameterError."""
        return self.inbox.submit(prompt, options, self.pair)

    def stop(self, timeout: float | None = EXIT_WITHIN_S) -> None:
        """Cancel everything and wait for the thread, unless this is it."""
        if not self.is_alive:  # after a fork the lock may be held by nobody
            return
        self.inbox.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    # The thread

    def _run(self) -> None:
        status: Status = "failed"
        error: BaseException | None = None
        try:
            source, self._source = self._source, None
            assert source is not None, "the thread runs once"
            with self._limits(), source(self._report) as self.pair:
                del source
                self.inbox.set_ready()
                self._serve()
            status = "closed"
        except MtpError as failure:
            status, error = "closed" if self.inbox.is_closing else "failed", failure
        except BaseException as failure:
            error = failure
            LOG.exception("the engine's thread ended")
        finally:
            self._let_go(status, error)

    def _limits(self) -> AbstractContextManager[None]:
        return memory_limits(this_machine()) if self._settings.set_memory_limits else nullcontext()

    def _report(self, progress: Progress) -> None:
        """Also where a load is given up, because the engine was closed meanwhile."""
        if self.inbox.is_closing:
            raise EngineError("the engine was closed while its model was loaded; make another one")
        self._on_progress(progress)

    def _serve(self) -> None:
        assert self.pair is not None
        guard = Guard(budget=self._settings.memory_budget)
        turn = self.pair.prompt_format.tokenizer.token_id(TURN)
        cache = PrefixCache(self.pair.target, budget=self._prefix_budget(guard), turn_id=turn)
        rows: Sequence[Row] = ()
        while rows or self._wait_for_jobs(guard, cache):
            rows = self._run_batch(self.pair, rows, guard, cache)

    def _prefix_budget(self, guard: Guard) -> int:
        if self._settings.prefix_budget is not None:
            return self._settings.prefix_budget
        return max(0, min(int(PREFIX_SHARE * (guard.budget - footprint_bytes())), PREFIX_AT_MOST))

    def _wait_for_jobs(self, guard: Guard, cache: PrefixCache) -> bool:
        """Until there is a request; False if the engine is to close. Prefixes are let go of where memory gets short."""
        with self.inbox.changed:
            while not self.inbox.has_news:
                self.inbox.changed.wait(LOOK_EVERY_S if len(cache) else None)
                if guard.relief() != "none" and cache.shrink():
                    mx.clear_cache()
                    self._count(cache)
            return not self.inbox.is_closing

    def _run_batch(self, pair: Pair, rows: Sequence[Row], guard: Guard, cache: PrefixCache) -> list[Row]:
        """Decode until nothing is left to do -> rows that had not begun when something went wrong for the others."""
        policy = SharedPolicy(pair, self._asked)

        def on_progress(done: int, total: int) -> None:
            policy.forget_time()
            self._count_rows(being_read=1)

        watch = Watch(on_progress=on_progress)
        batch = self._batch = Batch(
            pair,
            rows,
            policy,
            guard,
            cache,
            watch=watch,
            max_batch=self._width(pair),
            arrivals=self._arrivals,
        )
        try:
            with out_of_memory_refused(cache.clear):
                batch.run()
        except MtpError as error:
            return self._abandon(batch, cache, error)
        except Exception as error:
            LOG.exception("a batch failed")
            words = f"this reply cannot go on ({error!r}); the engine goes on with other requests"
            return self._abandon(batch, cache, GenerationError(words))
        finally:
            self._batch = None
            self._count(cache)
        return []

    def _abandon(self, batch: Batch, cache: PrefixCache, error: MtpError) -> list[Row]:
        """End what ran with an error -> the rows that were still to begin; nothing that was computed is trusted."""
        cache.clear()
        left = batch.abandon()
        self.inbox.fail_live(error, but=[row.listener for row in left])
        return left

    def _width(self, pair: Pair) -> int | WidthChooser:
        if self._settings.max_batch == "auto":
            return make_chooser(pair.rounds.times, pair.rounds.fit, "auto")
        return self._settings.max_batch

    def _asked(self) -> list[int | str]:
        """The numbers of drafts that running requests ask for."""
        batch = self._batch
        return [] if batch is None else [row.request.num_draft_tokens for row in batch.running]

    def _arrivals(self) -> Sequence[Row]:
        """Rows of the requests that have come since the last look."""
        pair, batch = self.pair, self._batch
        assert pair is not None and batch is not None, "asked by the batch that runs"
        self._count_rows()
        rows = []
        for job in self.inbox.take():
            try:
                rows.append(Row(0, job.check(pair), job.mailbox))
            except MtpError as error:
                job.mailbox.failed(error)
            except Exception as error:
                LOG.exception("a request could not be checked")
                words = f"this request could not be checked ({error!r}); others are not affected"
                job.mailbox.failed(GenerationError(words))
        return rows

    def _count_rows(self, being_read: int = 0) -> None:
        """Say how many requests run and wait; a row whose prompt is being read stands among those that wait still."""
        batch, load = self._batch, self.inbox.load
        if batch is not None:
            load.running, load.waiting = len(batch.running), len(batch.waiting) - being_read

    def _count(self, cache: PrefixCache) -> None:
        self.inbox.load = Load(cached_bytes=cache.nbytes)

    def _let_go(self, status: Status, error: BaseException | None) -> None:
        """Free what MLX holds, and leave nobody waiting."""
        self.pair = None
        if error is not None:
            traceback.clear_frames(error.__traceback__)  # their variables hold the model
        try:
            # Streams that outlive their thread can abort the process at its end: MLX asks for this (mlx pull 3395).
            mx.synchronize()
            mx.clear_streams()
            mx.clear_cache()
        finally:
            self.inbox.end(status, error)
