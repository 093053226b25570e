"""A real TCP proxy that carries connections to one address, and cuts them in the middle of what they carry."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from dataclasses import dataclass

CHUNK = 16_384
_NO_LINGER = struct.pack("ii", 1, 0)  # closing then sends a reset


@dataclass(eq=False)
class _Connection:
    ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    carried: int = 0  # bytes in either direction since cutting began

    def abort(self, *, reset: bool) -> None:
        for end in self.ends:
            if reset:
                with contextlib.suppress(OSError):
                    end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            end.transport.abort()


class Proxy:
    """Listens on 127.0.0.1 in a thread of its own.

    >>> with Proxy(5432) as proxy:
    ...     proxy.cut(after=200)  # every connection, once it has carried 200 bytes more
    ...     proxy.mend()
    """

    def __init__(self, target_port: int) -> None:
        self._target = target_port
        self._connections: set[_Connection] = set()
        self._after: int | None = None
        self._reset = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self.cuts = 0
        self.port = 0

    def __enter__(self) -> Proxy:
        self._thread.start()
        listening = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._carry, "127.0.0.1", 0, backlog=512), self._loop
        )
        self._server = listening.result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self, *, after: int, reset: bool = False) -> None:
        """End every connection that carries `after` more bytes, old and new ones; all at once for 0."""
        self._loop.call_soon_threadsafe(self._begin, after, reset)

    def mend(self) -> None:
        self._loop.call_soon_threadsafe(self._begin, None, False)

    def _begin(self, after: int | None, reset: bool) -> None:
        self._after, self._reset = after, reset
        for connection in list(self._connections):
            connection.carried = 0
            if after == 0:
                self._end(connection)

    def _end(self, connection: _Connection) -> None:
        self.cuts += 1
        connection.abort(reset=self._reset)

    async def _close(self) -> None:
        self._server.close()
        for connection in list(self._connections):
            connection.abort(reset=False)
        if carrying := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(carrying, timeout=5)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:  # what is behind us is down: the caller sees its connection end
            writer.transport.abort()
            return
        connection = _Connection((writer, far_writer))
        self._connections.add(connection)
        try:
            await asyncio.gather(self._pump(connection, reader, far_writer), self._pump(connection, far_reader, writer))
        finally:
            self._connections.discard(connection)
            connection.abort(reset=False)

    async def _pump(self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(CHUNK):
                if self._after is not None and connection.carried + len(chunk) > self._after:
                    writer.write(chunk[: self._after - connection.carried])
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(writer.drain(), 1)
                    self._end(connection)
                    return
                connection.carried += len(chunk)
                writer.write(chunk)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
