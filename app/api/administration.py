"""Labs, keys and the audit, for administrators; and who a key belongs to, for its holder."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from app.api.dependencies import Admin, AnyKey, CurrentSettings, Cursor, Limit, Session
from app.api.pages import with_links
from app.api.problems import documented
from app.registry import audit, keys, labs
from app.registry.paging import DEFAULT_LIMIT
from gradient_blueprints import models

router = APIRouter(tags=["administration"])


@router.get("/v1/whoami", responses=documented())
async def whoami(caller: AnyKey) -> models.WhoAmI:
    """The lab and scopes of the key."""
    return models.WhoAmI(lab=caller.lab, scopes=tuple(sorted(caller.scopes)), key_prefix=caller.key_prefix)


@router.post("/v1/labs", status_code=201, responses=documented(409))
async def create_lab(session: Session, caller: Admin, new: models.NewLab) -> models.Lab:
    return await labs.create_lab(session, caller, new)


@router.get("/v1/labs", response_model_exclude_none=True, responses=documented())
async def list_labs(
    request: Request,
    response: Response,
    session: Session,
    caller: Admin,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> models.LabPage:
    return with_links(request, response, await labs.list_labs(session, limit=limit, cursor=cursor))


@router.post("/v1/keys", status_code=201, response_model_exclude_none=True, responses=documented(404))
async def create_key(
    session: Session, settings: CurrentSettings, caller: Admin, new: models.NewKey
) -> models.IssuedKey:
    """Issue a key. Its secret is in this answer and nowhere else."""
    return await keys.create_key(session, caller, new, settings.secret)


@router.get("/v1/keys", response_model_exclude_none=True, responses=documented())
async def list_keys(
    request: Request,
    response: Response,
    session: Session,
    caller: Admin,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> models.KeyPage:
    return with_links(request, response, await keys.list_keys(session, limit=limit, cursor=cursor))


@router.post("/v1/keys/{key_id}/revoke", response_model_exclude_none=True, responses=documented(404))
async def revoke_key(session: Session, caller: Admin, key_id: Annotated[int, Path(ge=1, le=2**63 - 1)]) -> models.Key:
    """End a key at once."""
    return await keys.revoke_key(session, caller, key_id)


@router.get("/v1/audit", response_model_exclude_none=True, responses=documented())
async def list_audit(
    request: Request,
    response: Response,
    session: Session,
    caller: Admin,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> models.AuditPage:
    """Every write, newest first."""
    return with_links(request, response, await audit.list_entries(session, limit=limit, cursor=cursor))
