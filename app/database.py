"""The engine, its sessions, and bringing the schema up to date."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from app.settings import Settings
from gradient_blueprints.errors import ConfigurationError

MIGRATIONS = Path(__file__).parent.parent / "migrations"
Sessions = async_sessionmaker[AsyncSession]


def asyncpg_url(database_url: str) -> str:
    """The same database through the driver that this service uses, whichever scheme was given."""
    return make_url(database_url).set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)


def create_engine(
    settings: Settings, *, connections: int | None = None, wait_seconds: float = 30, idle_seconds: float | None = None
) -> AsyncEngine:
    """With as many connections as the settings say, or with `connections` and no more.

    Who finds none free waits for `wait_seconds`. A transaction may rest for `idle_seconds` between two statements, or
    for as long as a statement may take.
    """
    idle_seconds = idle_seconds or settings.statement_seconds
    return create_async_engine(
        asyncpg_url(settings.database_url),
        pool_size=connections or settings.pool_size,
        max_overflow=0 if connections else settings.pool_overflow,
        pool_timeout=wait_seconds,
        hide_parameters=True,  # an error in the log must not tell what was stored
        pool_pre_ping=True,  # a restarted database costs one retry here instead of one failed request per connection
        connect_args={
            "timeout": 10,
            "server_settings": {
                "application_name": "gradient-blueprints",
                "statement_timeout": str(int(settings.statement_seconds * 1000)),
                "idle_in_transaction_session_timeout": str(int(idle_seconds * 1000)),
                "timezone": "UTC",
            },
        },
    )


def create_sessions(engine: AsyncEngine) -> Sessions:
    return async_sessionmaker(engine, expire_on_commit=False)


def alembic_config(database_url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["database_url"] = asyncpg_url(database_url)
    return config


def migrate(database_url: str, revision: str = "head") -> None:
    """Bring the schema to `revision`; of several processes at once one does it, the others wait (migrations/env.py)."""
    try:
        command.upgrade(alembic_config(database_url), revision)
    except CommandError as error:  # a revision that this release does not know
        raise ConfigurationError(
            f"The database belongs to a later release ({error}). Run that release, or restore a backup from before it."
        ) from None
