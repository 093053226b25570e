"""What stands in the database at this moment, asked for many requests with one query."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Mapping
from typing import Any

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

# Of publications that are named by what never changes, such as a digest: whether a warning has come or gone.
YANKS = """
SELECT asked.place - 1 AS place, v.id, (SELECT y.reason FROM yanks y WHERE y.version_id = v.id) AS yanked
FROM unnest($1::bigint[]) WITH ORDINALITY AS asked (version, place)
JOIN versions v ON v.id = asked.version
"""

LIVE_KEYS = """
SELECT asked.place - 1 AS place, k.id, k.lab_id, k.prefix, k.scopes, l.name AS lab
FROM unnest($1::bytea[]) WITH ORDINALITY AS asked (hash, place)
JOIN keys k ON k.hash = asked.hash
JOIN labs l ON l.id = k.lab_id
WHERE k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > now())
"""

logger = logging.getLogger(__name__)

Name = tuple[Any, ...]
"""One value for each array that the query takes: a model and its checkpoint or alias, a version, the hash of a key."""
Row = Mapping[str, Any]


class NotFoundOut(Exception):
    """The database did not answer, or not in time."""


class CurrentRows:
    """One query at a time, for all that were asked since the last one began.

    Whoever asks waits for a query that begins afterwards, so that it sees every publication, yank, move and revocation
    that was acknowledged before, on whichever process. Under load one query serves many requests.

    `query` takes an array for each part of a name and answers at most one row a name, with its place among them.
    """

    def __init__(self, engine: AsyncEngine, query: str, patience: float) -> None:
        """`patience`: seconds that whoever asks may be kept waiting for a database that hangs."""
        self._engine = engine
        self._query = query
        self._patience = patience
        self._asked: dict[Name, list[asyncio.Future[Row | None]]] = {}
        self._wake = asyncio.Event()
        self._lost = False

    async def get(self, *name: Any) -> Row | None:
        """None where there is none. NotFoundOut, at once while the database is known to be out of reach."""
        self._wake.set()
        if self._lost:
            raise NotFoundOut
        future: asyncio.Future[Row | None] = asyncio.get_running_loop().create_future()
        self._asked.setdefault(name, []).append(future)
        return await future

    async def run(self) -> None:
        """Answer until cancelled, over one connection for as long as it lasts."""
        while True:
            await self._wake.wait()
            try:
                async with asyncio.timeout(self._patience):
                    connection = await self._engine.connect()
                try:
                    # The driver itself: each query is a transaction of its own, with a snapshot of its own.
                    driver = (await connection.get_raw_connection()).driver_connection
                    self._lost = False
                    while True:
                        await self._answer(driver)
                        await self._wake.wait()
                except Exception:
                    self._give_up()  # before the clean-up, which may wait for the same database
                    await connection.invalidate()
                    raise
                finally:
                    await connection.close()
            except Exception as error:  # whatever it is, the longer way meets it too and answers for it
                logger.info("cannot look up what is current: %r", error)
                self._give_up()

    def _give_up(self) -> None:
        self._lost = True
        self._wake.clear()
        asked, self._asked = self._asked, {}
        _refuse(asked)

    async def _answer(self, driver: Any) -> None:
        self._wake.clear()
        asked, self._asked = self._asked, {}
        if not asked:  # the one that asked after a loss went the longer way
            return
        try:
            # With a limit of our own: a connection whose other end has gone without a word would hold all of them up.
            rows = await driver.fetch(self._query, *zip(*asked, strict=True), timeout=self._patience)
        except BaseException:
            _refuse(asked)
            raise
        found: dict[int, Row] = {row["place"]: row for row in rows}
        for place, futures in enumerate(asked.values()):
            for future in futures:
                if not future.done():  # it is when its client has left
                    future.set_result(found.get(place))


def _refuse(asked: dict[Name, list[asyncio.Future[Row | None]]]) -> None:
    for future in itertools.chain.from_iterable(asked.values()):
        if not future.done():
            future.set_exception(NotFoundOut())
