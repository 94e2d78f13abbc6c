"""A submitted request as its caller sees it: chunks or events, plain or asynchronous; the result; cancel."""

import asyncio
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

from mlx_mtp.errors import MtpError
from mlx_mtp.events import Done, Event, EventMaker
from mlx_mtp.mailbox import LOOK_EVERY_S, Mailbox
from mlx_mtp.progress import Progress
from mlx_mtp.reply import Chunk, Generation
from mlx_mtp.stats import Stats

LOG = logging.getLogger(__name__)


class Handle:
    """One request: iterate it for chunks, `events()` for events, `await` it or call `result()` for the whole reply.

    There is one stream: what one iterator has taken no other gets, but `result()` always has all. An iterator that is
    dropped before the end cancels the request, and so does dropping the handle itself, unless it has an `on_event`.
    """

    def __init__(self, mailbox: Mailbox, engine: object):
        self._mailbox = mailbox
        self._engine = engine  # which lives as long as anybody waits for it
        self._dropped = weakref.finalize(self, mailbox.cancel)
        self._dropped.atexit = False

    def cancel(self) -> None:
        """End the reply within a round, or within a chunk of its prefill; what it has is kept."""
        self._mailbox.cancel()

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._mailbox.is_over

    @property
    def stats(self) -> Stats | None:
        """The figures so far; None before the first token."""
        last = self._mailbox.so_far
        return None if last is None else last.stats

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the whole reply. Raises the request's MtpError, or TimeoutError, after which it still goes on."""
        return self._mailbox.result(timeout)

    def when_done(self, call: Callable[[Generation | None], None]) -> None:
        """Call with the result, None after an error, once it has ended, before any reader sees the end.

        On the engine's thread, so briefly.
        """
        self._mailbox.when_over(call)

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks as they come; several rounds' in one where the reader is slow."""
        for item in self._items():
            if isinstance(item, Chunk):
                yield item

    def events(self) -> Iterator[Event]:
        """Events as they come, the last one Done."""
        maker = EventMaker()
        for item in self._items():
            yield from self._events_of(maker, item)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        async for item in self._items_async():
            if isinstance(item, Chunk):
                yield item

    async def events_async(self) -> AsyncIterator[Event]:
        """`events` for asyncio."""
        maker = EventMaker()
        async for item in self._items_async():
            for event in self._events_of(maker, item):
                yield event

    def __await__(self) -> Generator[Any, None, Generation]:
        return self._result_async().__await__()

    async def _result_async(self) -> Generation:
        try:
            await self._until(lambda: self._mailbox.is_over)
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self._mailbox.result(0)

    def _events_of(self, maker: EventMaker, item: Progress | Chunk) -> Iterator[Event]:
        if isinstance(item, Progress):
            yield item
            return
        yield from maker.events(item)
        if item.finish_reason is not None:
            yield Done(self._mailbox.result(0), item.tail)

    def _items(self) -> Generator[Progress | Chunk, None, None]:
        try:
            while (item := self._mailbox.next()) is not None:
                yield item
        finally:
            self._mailbox.cancel()  # changes nothing at the end, and ends what is not read to it

    async def _items_async(self) -> AsyncIterator[Progress | Chunk]:
        try:
            while True:
                is_there, item = self._mailbox.take()
                if not is_there:
                    await self._until(lambda: self._mailbox.has_news)
                elif item is None:
                    return
                else:
                    yield item
        finally:
            self._mailbox.cancel()

    async def _until(self, is_there: Callable[[], bool]) -> None:
        """Wait without holding up the event loop; raises EngineError if nobody computes any more."""
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def waker() -> None:
            loop.call_soon_threadsafe(woken.set)

        self._mailbox.add_waker(waker)
        try:
            while not is_there():
                self._mailbox.check_served()
                # No `asyncio.wait_for`: before Python 3.12 it loses a cancel that comes with the wake-up.
                timer = loop.call_later(LOOK_EVERY_S, woken.set)
                try:
                    await woken.wait()
                finally:
                    timer.cancel()
                woken.clear()
        finally:
            self._mailbox.remove_waker(waker)


def call_with_events(handle: Handle, on_event: Callable[[Event], None]) -> None:
    """Give `on_event` the handle's events, in order, on a thread of their own; what it raises cancels the request."""

    def run() -> None:
        try:
            for event in handle.events():
                on_event(event)
        except MtpError:
            return  # which `result` raises
        except Exception:
            LOG.exception("on_event raised, so its request was cancelled")

    threading.Thread(target=run, name="mlx-mtp events", daemon=True).start()
