"""A network that fails as told: a real listener that answers scripted bytes, or closes, and counts connections."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

from tests.sdk.listening import Listening

Act = Callable[[socket.socket], None]


def answer(status: int, body: bytes = b"", **headers: str) -> bytes:
    """The bytes of an HTTP answer."""
    lines = [f"HTTP/1.1 {status} Whatever"]
    fields = {"Content-Length": str(len(body)), "Connection": "close"}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines += [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def problem(status: int, code: str, detail: str = "as scripted", **headers: str) -> bytes:
    body = f'{{"code": "{code}", "detail": "{detail}", "status": {status}, "title": "t", "type": "u"}}'.encode()
    return answer(status, body, Content_Type="application/problem+json", **headers)


def json_answer(body: str, status: int = 200, **headers: str) -> bytes:
    return answer(status, body.encode(), Content_Type="application/json", **headers)


def hang_up(connection: socket.socket) -> None:
    """Close after the request, without a byte."""


def drip(data: bytes, pause: float) -> Act:
    """Send the head of an answer, and then its body one byte at a time."""
    head, end, body = data.partition(b"\r\n\r\n")

    def act(connection: socket.socket) -> None:
        connection.sendall(head + end)
        for byte in body:
            connection.sendall(bytes([byte]))
            time.sleep(pause)

    return act


class FaultyNetwork(Listening):
    """Each connection gets the next act, the last one for ever; `requests` holds what was received."""

    def __init__(self, *acts: bytes | Act) -> None:
        super().__init__()
        self._acts = list(acts)
        self.requests: list[bytes] = []

    @property
    def connections(self) -> int:
        return len(self.requests)

    def accept(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            number = len(self.requests)
            self.requests.append(b"")
            self.requests[number] = _read_request(connection)
            act = self._acts[min(number, len(self._acts) - 1)]
            if isinstance(act, bytes):
                connection.sendall(act)
            else:
                act(connection)
            connection.shutdown(socket.SHUT_WR)


def _read_request(connection: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        chunk = connection.recv(65536)
        if not chunk:
            return received
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body
