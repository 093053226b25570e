"""uvicorn's protocol, with a limit to the time that the head of a request may take: uvicorn itself waits for ever."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class HeadTimeLimit(HttpToolsProtocol):
    """A connection that dribbles, or sends nothing at all, is closed. Between requests uvicorn's own limit holds."""

    head_seconds = 20.0
    _timer: asyncio.TimerHandle | None = None
    _head_awaited = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.head_seconds, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_awaited and self._timer is None:  # a later request, whose head is not yet there as a whole
            self._timer = self.loop.call_later(self.head_seconds, self.transport.abort)

    def on_message_begin(self) -> None:
        self._head_awaited = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_awaited = False
        self._stop_timer()
        super().on_headers_complete()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
