"""Which version a name stands for at this moment, asked for many requests with one query."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from decimal import Decimal

from sqlalchemy.ext.asyncio import AsyncEngine

NEWEST_OF_OWNER = """
SELECT asked.place - 1 AS place, newest.id
FROM unnest($1::text[], $2::numeric[]) WITH ORDINALITY AS asked (model, fraction, place)
JOIN models m ON m.name = asked.model
JOIN checkpoints c ON c.model_id = m.id AND c.fraction = asked.fraction
CROSS JOIN LATERAL (
    SELECT v.id FROM versions v
    WHERE v.checkpoint_id = c.id AND v.lab_id = m.lab_id
      AND NOT EXISTS (SELECT FROM yanks y WHERE y.version_id = v.id)
    ORDER BY v.number DESC LIMIT 1
) newest
"""

# A yanked version is fetched by its alias with a warning that this query does not tell of.
ALIASED = """
SELECT asked.place - 1 AS place, a.version_id AS id
FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS asked (model, alias, place)
JOIN models m ON m.name = asked.model
JOIN aliases a ON a.model_id = m.id AND a.name = asked.alias
WHERE NOT EXISTS (SELECT FROM yanks y WHERE y.version_id = a.version_id)
"""

logger = logging.getLogger(__name__)

Name = tuple[str, Decimal | str]
"""A model, and its checkpoint or alias."""


class CurrentVersions:
    """One query at a time, for all that were asked since the last one began.

    Whoever asks waits for a query that begins afterwards, so that it sees every publication, yank and move that was
    acknowledged before, on whichever process. Under load one query serves many requests.
    """

    def __init__(self, engine: AsyncEngine, query: str) -> None:
        self._engine = engine
        self._query = query
        self._waiting: dict[Name, asyncio.Future[int | None]] = {}
        self._task: asyncio.Task[None] | None = None

    async def version_id(self, name: Name) -> int | None:
        """None where there is none, or where it could not be found out: whoever asks then goes the longer way."""
        future = self._waiting.get(name)
        if future is None:
            future = self._waiting[name] = asyncio.get_running_loop().create_future()
            if self._task is None:
                self._task = asyncio.create_task(self._answer())
        return await asyncio.shield(future)  # one client's leaving is not the others' end

    async def _answer(self) -> None:
        try:
            async with self._engine.connect() as connection:
                # The driver itself: each query is a transaction of its own, with a snapshot of its own.
                driver = (await connection.get_raw_connection()).driver_connection
                assert driver is not None
                while self._waiting:
                    asked, self._waiting = self._waiting, {}
                    try:
                        rows = await driver.fetch(self._query, *_columns(list(asked)))
                    except BaseException:
                        _give(asked, {})
                        raise
                    _give(asked, {row["place"]: row["id"] for row in rows})
        except Exception as error:
            logger.info("cannot look up current versions: %s", error)
        finally:
            self._task = None
            _give(self._waiting, {})
            self._waiting = {}


def _columns(names: Sequence[Name]) -> tuple[list[str], list[Decimal | str]]:
    return [model for model, _ in names], [name for _, name in names]


def _give(asked: dict[Name, asyncio.Future[int | None]], found: dict[int, int]) -> None:
    for place, future in enumerate(asked.values()):
        if not future.done():
            future.set_result(found.get(place))
