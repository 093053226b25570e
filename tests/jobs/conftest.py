"""What tests of jobs share: a lab that submits, a worker that claims, a document that fits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import job_parts
from app.settings import Settings
from gradient_blueprints import Blueprint, Client
from gradient_blueprints.models import Job, Scope


@pytest.fixture
def lab(make_client: Callable[..., Client]) -> Client:
    return make_client("lab-a", Scope.PROFILE, Scope.READ)


@pytest.fixture
def worker(make_client: Callable[..., Client]) -> Client:
    return make_client("workers", Scope.WORK)


@pytest.fixture
def sql(settings: Settings) -> Callable[..., list[asyncpg.Record]]:
    """Runs one statement beside the service."""

    def run(statement: str, *arguments: object) -> list[asyncpg.Record]:
        async def fetch() -> list[asyncpg.Record]:
            connection = await asyncpg.connect(settings.database_url)
            try:
                return list(await connection.fetch(statement, *arguments))
            finally:
                await connection.close()

        return asyncio.run(fetch())

    return run


@pytest.fixture
def expire_lease(
    sql: Callable[..., list[asyncpg.Record]], in_session: Callable[[Callable[[AsyncSession], Awaitable[int]]], int]
) -> Callable[[], int]:
    """Lets the leases of all jobs run out and the sweeper look."""

    def run() -> int:
        sql("UPDATE job_parts SET lease_expires_at = now() - interval '1 second' WHERE lease_expires_at IS NOT NULL")
        return in_session(job_parts.end_lost_attempts)

    return run


def submit(client: Client, model_id: str = "tiny", **changes: Any) -> Job:
    arguments: dict[str, Any] = {"source": "/models/tiny", "data": {"general": "/data/general.txt"}} | changes
    return client.submit_checkpoint(model_id, 0.8, **arguments)


def blueprint(model_id: str = "tiny", norm: float = 0.5) -> Blueprint:
    return Blueprint.from_dict(
        {"model_id": model_id, "training_checkpoint": 0.8, "layers": [{"id": "attn.0", "gradient_norm": norm}]}
    )


def states(client: Client, job_id: str) -> list[str]:
    """The states that the events of an ended job tell."""
    return [event.state.value for event in client.watch_job(job_id)]
