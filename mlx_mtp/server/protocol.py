"""HTTP/1.1 as uvicorn speaks it on h11, with a limit on how long a client may take to say what it wants.

uvicorn waits for ever for the first byte of a connection, for the rest of its headers, and for a body that nobody asks
for any more. Here all of these end after HEADERS_WITHIN_S.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_WITHIN_S = 15.0


class TimedProtocol(H11Protocol):
    """A connection that is closed if it holds no request that is being answered for too long after it had to."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.access_log = False  # ours is app.py's, which knows what became of a request
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering:
            self._disarm()
        else:
            self._arm()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        has_begun = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        if has_begun and not self._is_answering:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _arm(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEADERS_WITHIN_S, self._close)

    def _disarm(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close(self) -> None:
        self._late = None
        self.transport.close()
