"""Where the fetching process connects to, asked of each way that its libraries open connections."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

from tests.sdk.listening import Listening
from worker.child import REPOSITORY

PROGRAM = """
import asyncio, json, socket, sys, urllib.request
import httpx2
from gradient_blueprints.addresses import AddressRefused, read_network
from worker.guard import ConnectionGuard

named, proxy, other = sys.argv[1:]
guard = ConnectionGuard([read_network("127.0.0.2/32")])
guard.allow(named)
guard.allow(proxy)
guard.put_up()
port = int(other.rpartition(":")[2])

def told(connect):
    try:
        connect()
    except AddressRefused as refused:
        return str(refused)
    except ExceptionGroup as several:  # of an asynchronous attempt at each address of a name
        return " ".join(map(str, several.exceptions))
    except Exception as error:
        return type(error).__name__
    return "connected"

async def streams():
    async with httpx2.AsyncClient(trust_env=False) as client:
        await client.get(other)

ways = {
    "named": lambda: socket.create_connection(("localhost", int(named.rpartition(":")[2]))).close(),
    "proxy": lambda: socket.create_connection(proxy.split(":")).close(),
    "allowed": lambda: socket.create_connection(("127.0.0.2", 9)),
    "socket": lambda: socket.create_connection(("localhost", port)),
    "unresolved": lambda: socket.socket().connect(("localhost", port)),
    "mapped": lambda: socket.create_connection(("::ffff:127.0.0.1", port)),
    "metadata": lambda: socket.create_connection(("169.254.169.254", 80)),
    "mapped metadata": lambda: socket.create_connection(("::ffff:169.254.169.254", 80)),
    "number": lambda: socket.create_connection(("2130706433", port)),
    "httpx2": lambda: httpx2.get(other, trust_env=False),
    "asyncio": lambda: asyncio.run(streams()),
}
print(json.dumps({way: told(connect) for way, connect in ways.items()} | {"first": str(guard.refused)}))
"""


class Counting(Listening):
    """Takes connections, and says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.connections = 0

    def accept(self, connection: socket.socket) -> None:
        self.connections += 1
        connection.close()


def test_only_public_and_named_addresses_are_connected_to_whoever_asks() -> None:
    with Counting() as named, Counting() as proxy, Counting() as other:
        urls = (named.url.replace("127.0.0.1", "localhost"), proxy.url.removeprefix("http://"), other.url)
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, *urls],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        assert other.connections == 0
    here = "127.0.0.1 is not a public address"
    assert json.loads(run.stdout) == {
        "named": "connected",
        "proxy": "connected",
        "allowed": "ConnectionRefusedError",
        "socket": here,
        "unresolved": "'localhost' is not an address",
        "mapped": "::ffff:127.0.0.1 is not a public address",
        "metadata": "169.254.169.254 is not a public address",
        "mapped metadata": "::ffff:169.254.169.254 is not a public address",
        "number": here,
        "httpx2": here,
        "asyncio": here,
        "first": here,
    }
