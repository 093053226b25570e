"""Attachments by digest, streamed both ways."""

from __future__ import annotations

from typing import Any

import anyio
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, JSONResponse

from app.api.dependencies import CurrentSettings, DigestPath, Reader, Uploader
from app.api.problems import documented
from app.api.ranges import requested_range
from app.api.representations import immutable, names_one_of
from app.registry import blobs
from gradient_blueprints import models
from gradient_blueprints.errors import ServiceUnavailable

router = APIRouter(tags=["blobs"])

BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_BLOB: dict[int | str, dict[str, Any]] = {
    200: {"description": "The blob", "content": BINARY},
    206: {"description": "The range asked for", "content": BINARY},
    304: {"description": "Unchanged"},
}

_BEFORE: dict[int | str, dict[str, Any]] = {200: {"model": models.BlobSummary, "description": "Known before"}}


@router.put(
    "/v1/blobs/{digest}",
    status_code=201,
    response_model=models.BlobSummary,
    openapi_extra={"requestBody": {"required": True, "content": BINARY}},
    responses=_BEFORE | documented(),
)
async def upload_blob(request: Request, settings: CurrentSettings, caller: Uploader, digest: DigestPath) -> Response:
    """Keep a file under its digest. The transaction begins when the file is complete and durable."""
    size = await blobs.receive(settings.store, digest, request.stream(), max_bytes=settings.max_blob_bytes)
    async with request.app.state.sessions() as session:
        summary = await blobs.record(session, caller, digest, size)
        await session.commit()
    return JSONResponse(summary.model_dump(), 201 if summary.created else 200)


@router.get("/v1/blobs/{digest}", response_class=FileResponse, responses=_BLOB | documented(404, 416))
@router.head("/v1/blobs/{digest}", response_class=FileResponse, responses=_BLOB | documented(404, 416))
async def fetch_blob(request: Request, settings: CurrentSettings, reader: Reader, digest: DigestPath) -> Response:
    """The blob, whole or a range of it. No session is held while it streams."""
    async with request.app.state.sessions() as session:
        size = await blobs.get_size(session, digest)
    header = {"ETag": f'"{digest}"', "Cache-Control": immutable(settings)}
    if names_one_of(request, [header["ETag"]]):
        return Response(status_code=304, headers=header)
    path = blobs.blob_path(settings.store, digest)
    if not await anyio.Path(path).is_file():
        raise ServiceUnavailable(f"The store has lost the file of {digest}; its operator can restore it from a backup.")
    check_range(request, size)
    return FileResponse(path, media_type="application/octet-stream", headers=header)


def check_range(request: Request, size: int) -> None:
    """Leave one satisfiable range of bytes to the file response; ignore what need not be understood (RFC 9110)."""
    if requested_range(request, size) is None:
        request.scope["headers"] = [item for item in request.scope["headers"] if item[0] != b"range"]
