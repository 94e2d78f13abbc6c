"""The server from its socket to its end: signals, a model that fails, a parent that ends, requests that still run."""

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn

from mlx_mtp.errors import ParameterError
from mlx_mtp.server.app import Service, make_app
from mlx_mtp.server.guards import LARGEST_HEADERS
from mlx_mtp.server.protocol import TimedProtocol

IDLE_S = 75  # that a connection is kept for a client's next request
MOST_CONNECTIONS = 512
CLOSE_WITHIN_S = 5  # after the last reply was cancelled
PARENT_EVERY = 10  # ticks of a tenth of a second


@dataclass(frozen=True, slots=True)
class Ending:
    """Why the server ended: a signal, the parent's end, or (False, None) a model that failed."""

    signal: int | None
    parent_ended: bool = False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one. Raises ParameterError where that cannot be."""
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        own = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError, OverflowError) as error:
        raise ParameterError(f"{host!r} is no address of this machine ({error}); try 127.0.0.1") from None
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        own.bind(address)
        own.listen(MOST_CONNECTIONS)
    except OSError as error:
        own.close()
        raise ParameterError(
            f"port {port} of {host} cannot be used: {error.strerror}; choose another with --port, or 0 for any free one"
        ) from None
    return own


class Server(uvicorn.Server):
    """uvicorn's server that also ends when the model fails or its parent has ended, and that ends requests in time.

    grace_s: how long requests that run may go on once it is to end. on_ready is called once the model is loaded.
    """

    def __init__(
        self,
        service: Service,
        *,
        grace_s: float = 10.0,
        with_parent: bool = False,
        on_ready: Callable[[], None] | None = None,
    ):
        super().__init__(
            uvicorn.Config(
                make_app(service),
                http=TimedProtocol,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=IDLE_S,
                timeout_graceful_shutdown=int(grace_s) + CLOSE_WITHIN_S,
                limit_concurrency=MOST_CONNECTIONS,
                h11_max_incomplete_event_size=2 * LARGEST_HEADERS,
            )
        )
        self.service, self.grace_s = service, grace_s
        self.ending = Ending(None)
        self._parent = os.getppid() if with_parent else None
        self._on_ready = on_ready

    async def on_tick(self, counter: int) -> bool:
        status = self.service.engine.status.status
        if status == "ready" and self._on_ready is not None:
            on_ready, self._on_ready = self._on_ready, None
            on_ready()
        if status in ("failed", "closed"):
            return True
        if self._parent is not None and counter % PARENT_EVERY == 0 and os.getppid() != self._parent:
            self.ending = Ending(None, parent_ended=True)
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.is_closing = True
        late = asyncio.get_running_loop().call_later(self.grace_s, self.service.live.cancel)
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()
            self.service.live.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for the end, a second one for an end at once; afterwards they are as they were."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
            self.service.live.cancel()
        self.ending = Ending(sig)
        self.should_exit = True
