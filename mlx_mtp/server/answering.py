"""One checked request from the engine's queue to its last byte; whoever leaves earlier ends it within a round."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from starlette.types import Receive, Send

from mlx_mtp.engine import Engine
from mlx_mtp.errors import MtpError
from mlx_mtp.handles import Handle
from mlx_mtp.reply import Chunk, Generation
from mlx_mtp.server.asks import Ask
from mlx_mtp.server.events import ALIVE, Events
from mlx_mtp.server.log_probs import Entry
from mlx_mtp.server.refusals import Refusal, refusal_of
from mlx_mtp.server.replies import Answer, as_bytes, heading_of, reply_object
from mlx_mtp.server.tool_calls import Ended, ToolCallReader

HEADERS_WITHIN_S = 5.0  # an error that is known by then has a status of its own
ALIVE_EVERY_S = 15.0  # while a prompt is read nothing else says that the connection lives
SEND_WITHIN_S = 120.0  # a reader who takes nothing for so long has left

Arrival = tuple[int, Chunk | Generation]  # the number of an answer, and what came of it


@dataclass(slots=True)
class Outcome:
    """What became of a request, for the access log."""

    tokens: int = 0
    has_left: bool = False
    is_sent: bool = False


class Live:
    """The handles of all requests that run, so that a server that closes can end them."""

    def __init__(self) -> None:
        self.handles: set[Handle] = set()

    def cancel(self) -> None:
        for handle in list(self.handles):
            handle.cancel()


async def answer(
    engine: Engine, live: Live, ask: Ask, model: str, receive: Receive, send: Send, outcome: Outcome
) -> None:
    """Submit, wait, send. Raises Refusal as long as nothing was sent."""
    handles = await anyio.to_thread.run_sync(_submit, engine, ask)
    live.handles.update(handles)
    try:
        async with _while_there(receive, outcome):
            if ask.is_stream:
                await _stream(ask, model, handles, send, outcome)
            else:
                await _whole(ask, model, handles, send, outcome)
    finally:
        for handle in handles:
            handle.cancel()  # changes nothing where it has ended
        live.handles.difference_update(handles)
        outcome.tokens = sum(handle.stats.generation_tokens for handle in handles if handle.stats)


def _submit(engine: Engine, ask: Ask) -> list[Handle]:
    """All answers are queued or none; on a thread of its own, because long prompts take a while to encode."""
    handles: list[Handle] = []
    try:
        for prompt, options in ask.submissions():
            handles.append(engine.submit(prompt, **options))
    except MtpError as error:
        for handle in handles:
            handle.cancel()
        raise refusal_of(error) from None
    return handles


@asynccontextmanager
async def _while_there(receive: Receive, outcome: Outcome) -> AsyncIterator[None]:
    """The block is cancelled as soon as the client leaves."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        outcome.has_left = not outcome.is_sent
        group.cancel_scope.cancel()

    refusal: Refusal | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        try:
            yield
        except Refusal as raised:  # which a task group would wrap
            refusal = raised
        group.cancel_scope.cancel()
    if refusal is not None:
        raise refusal


async def _whole(ask: Ask, model: str, handles: list[Handle], send: Send, outcome: Outcome) -> None:
    answers = [await _read_whole(ask, handle) for handle in handles]
    body = as_bytes(reply_object(ask, heading_of(ask, model), answers))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    try:
        await _send(send, {"type": "http.response.start", "status": 200, "headers": headers + _ignored(ask)})
        await _send(send, {"type": "http.response.body", "body": body})
        outcome.is_sent = True
    except TimeoutError:
        outcome.has_left = True


async def _read_whole(ask: Ask, handle: Handle) -> Answer:
    """An answer to its end, or to that of its first complete call where one is all that is wanted."""
    is_one = ask.has_tools and not ask.parallel_calls
    try:
        if not is_one and ask.log_probs is None:
            return Answer(await handle)
        reader, is_cut = ToolCallReader(), False
        shown = None if ask.log_probs is None else ask.log_probs.shown_tokens()
        entries: list[Entry] = []
        async for chunk in handle:
            if shown is not None:
                entries += shown.take(chunk)
            if is_one and not is_cut:
                has_ended = any(isinstance(part, Ended) for part in reader.push(chunk.tool_call))
                if has_ended:
                    is_cut = chunk.finish_reason is None
                    handle.cancel()
        return Answer(await handle, is_cut, entries)
    except MtpError as error:
        raise refusal_of(error) from None


async def _stream(ask: Ask, model: str, handles: list[Handle], send: Send, outcome: Outcome) -> None:
    events = Events(ask, heading_of(ask, model))
    into, out = anyio.create_memory_object_stream[Arrival | Refusal](1)
    async with anyio.create_task_group() as readers:
        for at, handle in enumerate(handles):
            readers.start_soon(_read, at, handle, into.clone())
        into.close()
        with out:
            first = await _first(out)
            if isinstance(first, Refusal):
                readers.cancel_scope.cancel()
            else:
                try:
                    await _start_stream(ask, send)
                    await _events(events, handles, first, out, send)
                    outcome.is_sent = True
                except TimeoutError:
                    outcome.has_left = True
                readers.cancel_scope.cancel()
    if isinstance(first, Refusal):
        raise first


async def _first(out: MemoryObjectReceiveStream[Arrival | Refusal]) -> Arrival | Refusal | None:
    """What comes first, None if that takes longer than clients should wait for headers."""
    with anyio.move_on_after(HEADERS_WITHIN_S):
        return await out.receive()
    return None


async def _start_stream(ask: Ask, send: Send) -> None:
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ]
    await _send(send, {"type": "http.response.start", "status": 200, "headers": headers + _ignored(ask)})


async def _events(
    events: Events,
    handles: list[Handle],
    first: Arrival | None,
    out: MemoryObjectReceiveStream[Arrival | Refusal],
    send: Send,
) -> None:
    """Everything after the headers; what fails now is an event."""

    async def write(data: bytes, *, more: bool = True) -> None:
        if data or not more:
            await _send(send, {"type": "http.response.body", "body": data, "more_body": more})

    await write(events.begin())
    arrival: Arrival | Refusal | None = first
    while True:
        if isinstance(arrival, Refusal):
            await write(events.failed(arrival), more=False)
            return
        if arrival is not None:
            at, what = arrival
            try:
                data = events.chunk(at, what) if isinstance(what, Chunk) else events.end(at, what)
            except Refusal as refusal:
                await write(events.failed(refusal), more=False)
                return
            await write(data)
            if events.cut[at]:
                handles[at].cancel()
        try:
            arrival = await _next(out)
        except anyio.EndOfStream:
            await write(events.close(), more=False)
            return
        if arrival is None:
            await write(ALIVE)


async def _next(out: MemoryObjectReceiveStream[Arrival | Refusal]) -> Arrival | Refusal | None:
    with anyio.move_on_after(ALIVE_EVERY_S):
        return await out.receive()
    return None


async def _read(at: int, handle: Handle, into: MemoryObjectSendStream[Arrival | Refusal]) -> None:
    """One answer's chunks, then its result."""
    with into:
        try:
            try:
                async for chunk in handle:
                    await into.send((at, chunk))
                await into.send((at, handle.result(0)))
            except MtpError as error:
                await into.send(refusal_of(error))
        except anyio.BrokenResourceError:  # nobody reads any more
            handle.cancel()


async def _send(send: Send, message: dict[str, object]) -> None:
    with anyio.fail_after(SEND_WITHIN_S):
        await send(message)


def _ignored(ask: Ask) -> list[tuple[bytes, bytes]]:
    """Fields that were not looked at are named, so that a misspelt one can be found."""
    if not ask.ignored:
        return []
    names = ",".join(name for name in ask.ignored if name.isascii() and name.isidentifier())
    return [(b"x-mlx-mtp-ignored", names[:500].encode())] if names else []
