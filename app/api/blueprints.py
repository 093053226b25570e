"""Publishing and fetching blueprints."""

from __future__ import annotations

from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.ext.asyncio import AsyncSession

from app.api import representations
from app.api.dependencies import (
    AliasName,
    CheckpointPath,
    CurrentSettings,
    DigestPath,
    IdempotencyKey,
    LabQuery,
    Publisher,
    Reader,
    Session,
)
from app.api.problems import documented
from app.api.ready_answers import Standing
from app.api.representations import CSV, JSON, Cached, DocumentCache, Representation
from app.registry import aliases, blueprints, documents
from app.registry.blueprints import Found
from app.registry.current import CurrentRows
from app.registry.documents import Document
from app.registry.idempotency import IdempotentRequest
from app.registry.threads import in_thread_unless
from gradient_blueprints import models
from gradient_blueprints.errors import UnsupportedMediaType

router = APIRouter(tags=["blueprints"])

_BRIEF_BYTES = 64 << 10
_BRIEF_COMMAS = 4_096  # about as many values: with both, read and validated in a few milliseconds, or refused in some

_BODY = {
    "requestBody": {
        "required": True,
        "content": {JSON: {"schema": {"$ref": "#/components/schemas/Blueprint"}}, CSV: {"schema": {"type": "string"}}},
    }
}
_DOCUMENT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The stored bytes; version, digest, lab and warnings are in the Blueprint-* headers",
        "content": {JSON: {"schema": {"$ref": "#/components/schemas/Blueprint"}}, CSV: {"schema": {"type": "string"}}},
    },
    304: {"description": "Unchanged since the ETag given in If-None-Match"},
}

_BEFORE: dict[int | str, dict[str, Any]] = {200: {"model": models.Publication, "description": "Published before"}}


@router.post(
    "/v1/blueprints",
    status_code=201,
    response_model=models.Publication,
    openapi_extra=_BODY,
    responses=_BEFORE | documented(404, 409, 415),
)
async def publish_blueprint(
    request: Request, session: Session, caller: Publisher, idempotency_key: IdempotencyKey = None
) -> Response:
    """Publish a document as JSON or CSV under the next version of its checkpoint."""
    if encoding := request.headers.get("content-encoding"):
        raise UnsupportedMediaType(f"A body is sent as it is, without Content-Encoding; this one says {encoding!r}.")
    body = await request.body()
    media_type = request.headers.get("content-type", "")
    document = await in_thread_unless(_is_brief(body), read_document, media_type, body)
    repetition = IdempotentRequest(session, caller, idempotency_key, b"publish", document.body)
    if (answered := await repetition.begin()) is not None:
        status, answer = answered
    else:
        publication = await blueprints.publish(session, caller, document)
        request.app.state.metrics.publications.labels("lab", "yes" if publication.created else "no").inc()
        status, answer = (201 if publication.created else 200), publication.model_dump(mode="json", exclude_none=True)
        await repetition.finish(status, answer)
    return JSONResponse(answer, status, headers={"Location": f"/v1/blueprints/{document.digest}"})


def _is_brief(body: bytes) -> bool:
    """A body is short and yet slow to validate when it holds nothing but faults."""
    return len(body) <= _BRIEF_BYTES and body.count(b",") <= _BRIEF_COMMAS


def read_document(content_type: str, body: bytes) -> Document:
    """Validate a body by its media type."""
    match content_type.partition(";")[0].strip().lower():
        case "application/json":
            return documents.parse_json(body)
        case "text/csv":
            return documents.parse_csv(body)
        case other:
            named = repr(other) if other else "no media type"
            raise UnsupportedMediaType(f"A blueprint is sent as {JSON} or {CSV}, not with {named}.")


@router.get(
    "/v1/models/{model_id:model}/checkpoints/{checkpoint}/blueprint",
    response_class=Response,
    responses=_DOCUMENT | documented(404, 406),
)
async def fetch_blueprint(
    request: Request,
    session: Session,
    reader: Reader,
    model_id: str,
    checkpoint: CheckpointPath,
    lab: LabQuery = None,
    version: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None,
    nearest: Annotated[bool, Query(description="answer the nearest checkpoint when this one does not exist")] = False,
) -> Response:
    """The owner's newest version that is not yanked, unless `lab` or `version` asks otherwise."""
    found = await blueprints.resolve(session, model_id, checkpoint, lab=lab, version=version, nearest=nearest)
    current: CurrentRows = request.app.state.newest_of_owner
    return await _respond(
        request,
        session,
        found,
        cache_control=representations.REVALIDATE,
        nearest=nearest,
        standing=Standing(current, (model_id, checkpoint)),
    )


@router.get("/v1/blueprints/{digest}", response_class=Response, responses=_DOCUMENT | documented(404, 406))
async def fetch_by_digest(
    request: Request, session: Session, reader: Reader, settings: CurrentSettings, digest: DigestPath
) -> Response:
    """That document, for ever."""
    found = await blueprints.resolve_digest(session, digest)
    current: CurrentRows = request.app.state.yanks
    return await _respond(
        request,
        session,
        found,
        cache_control=representations.immutable(settings),
        standing=Standing(current, (found.version_id,), for_ever=True),
    )


@router.get(
    "/v1/models/{model_id:model}/aliases/{name}/blueprint",
    response_class=Response,
    responses=_DOCUMENT | documented(404, 406),
)
async def fetch_by_alias(
    request: Request, session: Session, reader: Reader, model_id: str, name: AliasName
) -> Response:
    """The version that the alias points to now."""
    found = await aliases.resolve_alias(session, model_id, name)
    current: CurrentRows = request.app.state.aliased
    return await _respond(
        request,
        session,
        found,
        cache_control=representations.REVALIDATE,
        standing=Standing(current, (model_id, name)),
    )


async def _respond(
    request: Request,
    session: AsyncSession,
    found: Found,
    *,
    cache_control: str,
    standing: Standing,
    nearest: bool = False,
) -> Response:
    cache: DocumentCache = request.app.state.documents
    representation = representations.negotiate(request, found.size)
    entry = cache.get(found.digest, representation)
    request.app.state.metrics.documents.labels("no" if entry is None else "yes").inc()
    if entry is None:
        entry = await _represent(cache, session, found, representation)
    header = representations.headers(
        found, representation, entry.warnings, cache_control=cache_control, nearest=nearest
    )
    response = representations.respond(entry.body, representation, header)
    request.app.state.ready_answers.keep(request, found, representation, response.raw_headers, standing)
    if representations.is_unchanged(request, found, representation):
        header.pop("Content-Encoding", None)
        return Response(status_code=304, headers=header)
    return response


async def _represent(
    cache: DocumentCache, session: AsyncSession, found: Found, representation: Representation
) -> Cached:
    stored = await representations.read_document(cache, session, found)
    if representation == representations.PLAIN:
        return stored
    body = await anyio.to_thread.run_sync(representations.encode, stored.body, representation)
    entry = Cached(body, stored.warnings)
    cache.put(found.digest, representation, entry)
    return entry
