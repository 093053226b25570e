"""Movable names of versions."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from app.api.dependencies import AliasName, Cursor, Limit, Publisher, Reader, Session
from app.api.pages import with_links
from app.api.problems import documented
from app.registry import aliases
from app.registry.paging import DEFAULT_LIMIT
from gradient_blueprints import models
from gradient_blueprints.errors import MalformedRequest

router = APIRouter(tags=["aliases"])
_ALIASES = "/v1/models/{model_id:model}/aliases"

IfMatch = Annotated[
    str | None,
    Header(
        alias="If-Match",
        description='the revision last seen, such as "3"',
        json_schema_extra={"pattern": '^"[1-9][0-9]{0,8}"$'},
    ),
]
IfNoneMatch = Annotated[
    str | None,
    Header(
        alias="If-None-Match",
        description="`*`: only when there is none yet",
        json_schema_extra={"pattern": r"^\*$"},
    ),
]


def _revision(if_match: str | None) -> int | None:
    if if_match is None:
        return None
    match = re.fullmatch(r'"([1-9][0-9]{0,8})"', if_match.strip())
    if match is None:
        raise MalformedRequest('If-Match holds one revision in quotes, as the ETag gave it: "3".')
    return int(match[1])


@router.get(_ALIASES, response_model_exclude_none=True, responses=documented(404))
async def list_aliases(
    request: Request,
    response: Response,
    session: Session,
    reader: Reader,
    model_id: str,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> models.AliasPage:
    page = await aliases.list_aliases(session, model_id, limit=limit, cursor=cursor)
    return with_links(request, response, page)


@router.get(_ALIASES + "/{name}", responses=documented(404))
async def get_alias(
    response: Response, session: Session, reader: Reader, model_id: str, name: AliasName
) -> models.Alias:
    alias = await aliases.get_alias(session, model_id, name)
    response.headers["ETag"] = f'"{alias.revision}"'
    return alias


@router.put(_ALIASES + "/{name}", responses=documented(404, 412))
async def move_alias(
    response: Response,
    session: Session,
    caller: Publisher,
    model_id: str,
    name: AliasName,
    target: models.AliasTarget,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> models.Alias:
    """Point the alias at a version; only the model's owner may. With If-Match it moves only from that revision."""
    if if_none_match is not None and if_none_match.strip() != "*":
        raise MalformedRequest("If-None-Match can only be * here; use If-Match to name a revision.")
    alias = await aliases.move_alias(
        session,
        caller,
        model_id,
        name,
        target,
        expected=_revision(if_match),
        must_be_new=if_none_match is not None,
    )
    response.headers["ETag"] = f'"{alias.revision}"'
    return alias


@router.delete(_ALIASES + "/{name}", status_code=204, responses=documented(404, 412))
async def delete_alias(
    session: Session, caller: Publisher, model_id: str, name: AliasName, if_match: IfMatch = None
) -> None:
    await aliases.delete_alias(session, caller, model_id, name, expected=_revision(if_match))


@router.get(_ALIASES + "/{name}/history", response_model_exclude_none=True, responses=documented(404))
async def list_moves(
    request: Request,
    response: Response,
    session: Session,
    reader: Reader,
    model_id: str,
    name: AliasName,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> models.AliasHistory:
    """Every move of the alias, newest first; also of one that was removed."""
    page = await aliases.list_moves(session, model_id, name, limit=limit, cursor=cursor)
    return with_links(request, response, page)
