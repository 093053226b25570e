"""One face for both clients, so that a test of one is a test of the other."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gradient_blueprints import AsyncClient, Client, Scope
from tests.conftest import Server

Connect = Callable[..., Any]


class Either:
    """A Client or an AsyncClient, whose methods are awaited and whose listings answer lists."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.client, name)
        if not callable(attribute):
            return attribute

        async def call(*args: Any, **kwargs: Any) -> Any:
            if isinstance(self.client, Client):
                return await asyncio.to_thread(lambda: _drained(attribute(*args, **kwargs)))
            result = attribute(*args, **kwargs)
            return [item async for item in result] if inspect.isasyncgen(result) else await result

        return call


def _drained(result: Any) -> Any:
    return list(result) if isinstance(result, Iterator) else result


@pytest.fixture(params=["Client", "AsyncClient"])
async def connect(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Connect]:
    """Clients of any URL, with a cache of this test unless told otherwise."""
    made: list[Either] = []

    def make(url: str, **options: Any) -> Either:
        kind = Client if request.param == "Client" else AsyncClient
        either = Either(kind(url, **({"cache": tmp_path / "sdk-cache"} | options)))
        made.append(either)
        return either

    yield make
    for either in made:
        await either.close()


@pytest.fixture
def lab_a(connect: Connect, server: Server) -> Any:
    """A client of lab-a, which reads, publishes and submits."""
    return connect(server.url, api_key=server.key("lab-a", Scope.READ, Scope.PUBLISH, Scope.PROFILE))
