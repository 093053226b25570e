"""Whether the process lives, whether it can serve, and the schema of a blueprint."""

from __future__ import annotations

from typing import Any

import anyio
from fastapi import APIRouter, Request
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.api.problems import documented
from app.database_errors import RAISED
from gradient_blueprints.errors import ServiceUnavailable
from gradient_blueprints.models import Blueprint

router = APIRouter(tags=["health"])
_READY_SECONDS = 2


@router.get("/livez")
async def livez() -> dict[str, str]:
    """200 while the process answers at all."""
    return {"status": "ok"}


@router.get("/readyz", responses=documented())
async def readyz(request: Request) -> dict[str, str]:
    """200 while the database answers and holds the schema; 503 otherwise."""
    try:
        with anyio.fail_after(_READY_SECONDS):
            async with request.app.state.sessions() as session:
                await session.execute(text("SELECT version_num FROM alembic_version"))
    except (SQLAlchemyError, TimeoutError, *RAISED) as error:
        raise ServiceUnavailable(f"The database does not answer ({type(error).__name__}).", retry_after=1) from None
    return {"status": "ready"}


@router.get("/v1/schemas/blueprint-1.json")
async def blueprint_schema() -> dict[str, Any]:
    """JSON Schema of the blueprint document, version 1."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Blueprint.model_json_schema()}
