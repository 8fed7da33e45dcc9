"""Limits on what comes before a request's body: HTTP servers are told none by themselves."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEAD = 64 * 1024
"""Bytes of a request's line and headers."""
HEAD_SECONDS = 30.0
"""For them to arrive in; connections on which nothing was asked are closed too."""


class Limited(HttpToolsProtocol):
    """uvicorn's protocol, for heads of a certain size that arrive within a certain time."""

    head_seconds = HEAD_SECONDS
    _head = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wait for a head."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Count what belongs to a head."""
        if self._timer is not None:
            self._head += len(data)
        super().data_received(data)
        if self._timer is not None and self._head > MOST_HEAD:
            self._close()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._stop()
        super().on_headers_complete()

    def on_message_begin(self) -> None:
        """The first byte of a head, if an answer was waited for before."""
        super().on_message_begin()
        if self._timer is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._head = 0
        self._timer = self.loop.call_later(self.head_seconds, self._close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._stop()
        if not self.transport.is_closing():
            self.transport.abort()
