"""Errors of a real database: which of them say that trying again helps."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.database import create_engine
from app.database_errors import RAISED, passes
from app.settings import Settings

BACKEND = "SELECT pg_backend_pid()"


async def raised_by(engine: AsyncEngine, *before: str, last: str) -> DBAPIError:
    async with engine.connect() as connection:
        for statement in before:
            await connection.execute(text(statement))
        with pytest.raises(DBAPIError) as raised:
            await connection.execute(text(last))
        return raised.value


@pytest.mark.parametrize(
    ("statements", "helps"),
    [
        (["SELECT pg_terminate_backend(pg_backend_pid())"], True),
        (["SET statement_timeout = 20", "SELECT pg_sleep(5)"], True),
        (["SET lock_timeout = 20", "SELECT 1 / 0"], False),
        (["SELECT nothing FROM nowhere"], False),
        (["DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = 'cannot_connect_now'; END $$"], True),
        (["DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = 'too_many_connections'; END $$"], True),
        (["DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = 'disk_full'; END $$"], True),
        (["DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = 'deadlock_detected'; END $$"], True),
        (["DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = 'restrict_violation'; END $$"], False),
    ],
)
async def test_what_the_server_says_tells_whether_trying_again_helps(
    settings: Settings, statements: list[str], helps: bool
) -> None:
    engine = create_engine(settings)
    try:
        assert passes(await raised_by(engine, *statements[:-1], last=statements[-1])) is helps
    finally:
        await engine.dispose()


async def test_a_connection_lost_during_a_copy_passes_though_nobody_wraps_the_driver(database_url: str) -> None:
    other, doomed = await asyncio.gather(asyncpg.connect(database_url), asyncpg.connect(database_url))
    try:
        pid = await doomed.fetchval(BACKEND)
        await other.execute("SELECT pg_terminate_backend($1)", pid)
        with pytest.raises(RAISED) as raised:
            await doomed.copy_records_to_table("layers", records=[(1, 1)], columns=["document_id", "position"])
        assert passes(raised.value)
    finally:
        await other.close()
        doomed.terminate()
