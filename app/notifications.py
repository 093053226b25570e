"""Listening to NOTIFY on one connection that is made again whenever it is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import asyncpg
from sqlalchemy import make_url

logger = logging.getLogger(__name__)
RECONNECT_SECONDS = 2.0
CHECK_SECONDS = 30.0


async def listen(database_url: str, channel: str, heard: Callable[[str], None]) -> None:
    """Call `heard` with the payload of every notification on `channel`, until cancelled.

    It is also called with "" after each connection, because what was notified before went unheard. Listeners must poll
    at a slow pace all the same: through a pooler in transaction mode nothing is heard at all.
    """
    dsn = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    while True:
        try:
            connection = await asyncpg.connect(dsn, timeout=10)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError) as error:
            logger.warning("cannot listen on %s: %s", channel, error)
        else:
            try:
                await _hear(connection, channel, heard)
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError) as error:
                logger.warning("lost the connection that listens on %s: %s", channel, error)
            finally:
                connection.terminate()
        await asyncio.sleep(RECONNECT_SECONDS)


async def _hear(connection: Any, channel: str, heard: Callable[[str], None]) -> None:
    lost = asyncio.Event()
    connection.add_termination_listener(lambda _: lost.set())
    await connection.add_listener(channel, lambda _connection, _pid, _channel, payload: heard(payload))
    heard("")
    while not lost.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(lost.wait(), CHECK_SECONDS)
        await connection.fetchval("SELECT 1", timeout=10)  # a peer that vanished without a word is noticed here
