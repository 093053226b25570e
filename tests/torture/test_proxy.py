"""The proxy that cuts: what comes through, and where it ends."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from torture.proxy import Proxy

SENT = bytes(range(256)) * 400


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """Before a server that sends SENT to whoever connects, then listens until they go."""
    with socket.create_server(("127.0.0.1", 0)) as listening, Proxy(listening.getsockname()[1]) as proxy:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection, suppress(OSError):
                        connection.sendall(SENT)
                        connection.shutdown(socket.SHUT_WR)
                        connection.recv(1)

        threading.Thread(target=serve, daemon=True).start()
        yield proxy
        listening.shutdown(socket.SHUT_RDWR)


def received(proxy: Proxy) -> bytes:
    got = b""
    with socket.create_connection(("127.0.0.1", proxy.port)) as connection, suppress(ConnectionResetError):
        while chunk := connection.recv(65_536):
            got += chunk
    return got


def test_a_connection_carries_everything_unless_it_is_cut(proxy: Proxy) -> None:
    assert received(proxy) == SENT
    proxy.cut(after=5_000)
    assert received(proxy) == SENT[:5_000]
    proxy.mend()
    assert received(proxy) == SENT
    assert proxy.cuts == 1


def test_a_cut_with_a_reset_loses_what_was_on_its_way(proxy: Proxy) -> None:
    proxy.cut(after=5_000, reset=True)
    assert len(received(proxy)) <= 5_000
