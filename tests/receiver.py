"""Somebody's server that webhooks are sent to: keeps every request, and answers what it is told to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from standardwebhooks import Webhook

from tests.http_server import QuietHandler, serving_http


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    def verified(self, secret: str) -> Any:
        """The content, as a receiver with the secret reads it."""
        return Webhook(secret).verify(self.body, self.headers)


@dataclass
class Receiver:
    """`answers` are given one after the other, then 204 for ever. While `open` is not set, nothing is answered."""

    url: str
    received: list[Received] = field(default_factory=list)
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)
    connections: int = 0
    arrived: threading.Event = field(default_factory=threading.Event)


@contextmanager
def receiving() -> Iterator[Receiver]:
    class Handler(QuietHandler):
        def setup(self) -> None:
            receiver.connections += 1
            super().setup()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received = Received(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
            receiver.received.append(received)
            receiver.arrived.set()
            receiver.open.wait()
            status, headers = receiver.answers.pop(0) if receiver.answers else (204, {})
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
            except OSError:
                """The sender was killed while it waited."""

    with serving_http(Handler) as url:
        receiver = Receiver(f"{url}/hook?secret=of-the-url")
        receiver.open.set()
        try:
            yield receiver
        finally:
            receiver.open.set()
