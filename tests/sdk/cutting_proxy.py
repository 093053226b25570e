"""A real TCP proxy before a server: it counts what clients send, and closes connections after so many bytes of it."""

from __future__ import annotations

import contextlib
import socket
import threading
from urllib.parse import urlsplit

from tests.sdk.listening import Listening


class CuttingProxy(Listening):
    """The nth of `cuts` ends the connection on which that many further bytes have gone to the server."""

    def __init__(self, url: str, *cuts: int) -> None:
        super().__init__()
        parts = urlsplit(url)
        assert parts.port
        self._target = (parts.hostname, parts.port)
        self._cuts = list(cuts)
        self._lock = threading.Lock()
        self.sent = 0  # bytes from clients to the server
        self.cut = 0

    def accept(self, connection: socket.socket) -> None:
        server = socket.create_connection(self._target)
        threading.Thread(target=self._bring_back, args=(server, connection), daemon=True).start()
        self._carry(connection, server)

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := client.recv(16_384):
                cut = self._count(len(chunk))
                server.sendall(chunk)
                if cut:
                    break
        for connection in (client, server):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _count(self, size: int) -> bool:
        with self._lock:
            self.sent += size
            if not self._cuts:
                return False
            self._cuts[0] -= size
            if self._cuts[0] > 0:
                return False
            self._cuts.pop(0)
            self.cut += 1
            return True

    def _bring_back(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := server.recv(65_536):
                client.sendall(chunk)
