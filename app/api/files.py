"""Files of checkpoints: uploaded resumably, read by their lab and by workers.

The fields are those of the IETF's draft on resumable uploads (Upload-Offset, Upload-Length, Upload-Complete), on the
file's own address: HEAD tells how much is there, PUT sends the rest. Repr-Digest is that of RFC 9530.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect

from app.api.dependencies import CheckpointPath, CurrentSettings, Cursor, Limit, Session, requires
from app.api.pages import with_links
from app.api.problems import documented
from app.api.ranges import requested_range
from app.registry import files
from app.registry.callers import Caller
from app.registry.file_store import FileStore
from app.registry.paging import DEFAULT_LIMIT
from gradient_blueprints.canonical import MAX_SAFE_INTEGER
from gradient_blueprints.errors import CheckpointFileNotFound, InvalidRequest, MalformedRequest
from gradient_blueprints.file_models import (
    FILE_PATH_PATTERN,
    FILE_SUFFIXES,
    LONGEST_FILE_PATH,
    CheckpointFile,
    CheckpointFilePage,
    FilePath,
)
from gradient_blueprints.models import LAB_NAME_PATTERN, Scope

SWEEP_SECONDS = 3_600.0
PATIENCE_SECONDS = 15.0  # how long a request waits for its file's verification, which goes on without it

logger = logging.getLogger(__name__)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.verifying = set()
    sweeper = asyncio.create_task(_sweep(app))
    try:
        yield
    finally:
        for task in (sweeper, *app.state.verifying):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _sweep(app: FastAPI) -> None:
    """Here and not in the relay, which need not see the store."""
    state = app.state
    while True:
        try:
            removed = await files.remove_abandoned(
                state.sessions, state.file_store, upload_seconds=state.settings.upload_seconds
            )
            if removed:
                logger.info("removed %d abandoned uploads", removed)
        except Exception as error:  # the database or the store is away: any error is one to outlive
            logger.warning("abandoned uploads were not removed: %s", error or type(error).__name__)
        await asyncio.sleep(SWEEP_SECONDS)


router = APIRouter(tags=["files"], lifespan=_lifespan)

_FILES = "/v1/models/{model_id:model}/checkpoints/{checkpoint}/files"
_FILE = _FILES + "/{path:path}"

Writer = Annotated[Caller, Depends(requires(Scope.PUBLISH, Scope.PROFILE))]
FileReader = Annotated[Caller, Depends(requires(Scope.PUBLISH, Scope.PROFILE, Scope.WORK))]
OfLab = Annotated[
    str | None, Query(pattern=f"^{LAB_NAME_PATTERN}$", description="for workers and administrators: another lab's")
]
ByteCount = Annotated[int, Header(ge=0, le=MAX_SAFE_INTEGER)]
OptionalByteCount = Annotated[int | None, Header(ge=0, le=MAX_SAFE_INTEGER)]
FramedByteCount = Annotated[int | None, Header(ge=0, le=MAX_SAFE_INTEGER, include_in_schema=False)]  # HTTP's own

_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_UPLOADED: dict[int | str, dict[str, Any]] = {
    200: {"model": CheckpointFile, "description": "Complete before"},
    202: {"model": CheckpointFile, "description": "Received, and not complete yet: go on at `received`, or ask again"},
}
_READ: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file", "content": _BINARY},
    206: {"description": "The range asked for", "content": _BINARY},
}


_FILE_PATH = Path(  # as documented; the check itself is FilePath's, which says more of what is wrong
    json_schema_extra={
        "maxLength": LONGEST_FILE_PATH,
        "pattern": f"^{FILE_PATH_PATTERN}({'|'.join(map(re.escape, FILE_SUFFIXES))})$",
    }
)


def _file_path(path: Annotated[str, _FILE_PATH]) -> str:
    try:
        return _PATHS.validate_python(path)
    except ValidationError as invalid:
        fault = invalid.errors(include_url=False, include_context=False, include_input=False)[0]
        detail = fault["msg"] if "pattern" not in fault["type"] else "not a path of letters, digits and ._- in folders"
        raise InvalidRequest(
            f"The registry takes no file of that name: {detail}.",
            errors=[{"pointer": "/path/path", "code": fault["type"], "detail": detail}],
        ) from None


_PATHS: TypeAdapter[str] = TypeAdapter(FilePath)
FilePathParameter = Annotated[str, Depends(_file_path)]


async def _address(
    session: Session,
    caller: FileReader,
    model_id: str,
    checkpoint: CheckpointPath,
    path: FilePathParameter,
    lab: OfLab = None,
) -> files.Address:
    lab_id, name = await files.lab_of(session, caller, lab)
    return files.Address(lab_id, name, model_id, checkpoint, path)


AddressOfAny = Annotated[files.Address, Depends(_address)]


def _own_address(caller: Writer, model_id: str, checkpoint: CheckpointPath, path: FilePathParameter) -> files.Address:
    return files.Address(caller.lab_id, caller.lab, model_id, checkpoint, path)


OwnAddress = Annotated[files.Address, Depends(_own_address)]


def _digest(repr_digest: str) -> str:
    """`sha256:…` of a Repr-Digest field, which may hold digests of other kinds too."""
    found = re.search(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):", repr_digest)
    try:
        raw = base64.b64decode(found[1], validate=True) if found else b""
    except binascii.Error:
        raw = b""
    if len(raw) != 32:
        raise MalformedRequest("Repr-Digest must hold the SHA-256 of the whole file: sha-256=:BASE64:.")
    return f"sha256:{raw.hex()}"


def _upload_fields(file: CheckpointFile) -> dict[str, str]:
    digest = base64.b64encode(bytes.fromhex(file.digest.removeprefix("sha256:"))).decode()
    return {
        "Upload-Offset": str(file.received),
        "Upload-Length": str(file.size),
        "Upload-Complete": "?1" if file.complete else "?0",
        "Repr-Digest": f"sha-256=:{digest}:",
    }


@router.get(_FILES, responses=documented(404), response_model_exclude_none=True)
async def list_files(
    request: Request,
    response: Response,
    session: Session,
    caller: FileReader,
    model_id: str,
    checkpoint: CheckpointPath,
    lab: OfLab = None,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> CheckpointFilePage:
    """The files of a checkpoint that your lab uploaded, unfinished ones too."""
    lab_id, name = await files.lab_of(session, caller, lab)
    page = await files.list_files(session, lab_id, name, model_id, checkpoint, limit=limit, cursor=cursor)
    return with_links(request, response, page)


@router.put(
    _FILE,
    status_code=201,
    response_model=CheckpointFile,
    openapi_extra={"requestBody": {"required": True, "content": _BINARY}},
    responses=_UPLOADED | documented(409),
)
async def upload_file(
    request: Request,
    settings: CurrentSettings,
    caller: Writer,
    address: OwnAddress,
    repr_digest: Annotated[
        str,
        Header(
            description="SHA-256 of the whole file: `sha-256=:BASE64:`",
            json_schema_extra={"pattern": "^sha-256=:[A-Za-z0-9+/]{43}=:$"},
        ),
    ],
    upload_offset: ByteCount = 0,
    upload_length: OptionalByteCount = None,
    content_length: FramedByteCount = None,
) -> Response:
    """Begin a file, or go on with it at the offset that HEAD tells; `Upload-Length` is the size of all of it.

    Once all of it is there it is verified, and cannot change any more.
    """
    size = upload_length if upload_length is not None else content_length
    if size is None or (upload_length is None and upload_offset > 0):
        raise MalformedRequest("Upload-Length must tell the size of the whole file.")
    if upload_offset > size:
        raise MalformedRequest("Upload-Offset lies beyond Upload-Length.")
    sessions, store = request.app.state.sessions, request.app.state.file_store
    digest = _digest(repr_digest)
    async with sessions() as session:
        begun = await files.begin(
            session,
            store,
            caller,
            address,
            size=size,
            digest=digest,
            offset=upload_offset,
            limits=files.Limits(settings.max_file_bytes, settings.lab_file_bytes),
        )
        await session.commit()
    if isinstance(begun, CheckpointFile):
        return JSONResponse(begun.model_dump(), 200 if begun.complete else 202, headers=_upload_fields(begun))
    try:
        received, hashed = await files.receive(sessions, store, begun, request.stream())
    except ClientDisconnect:
        return Response(status_code=408)  # nobody hears it; what arrived was kept
    if received == size:
        finishing = asyncio.create_task(files.finish(sessions, store, caller, address, begun, hashed))
        _keep(request.app.state.verifying, finishing)
        if (await asyncio.wait({finishing}, timeout=PATIENCE_SECONDS))[0]:
            file = finishing.result()
            return JSONResponse(file.model_dump(), 201, headers=_upload_fields(file))
    file = CheckpointFile(
        path=address.path, lab=address.lab, size=size, digest=digest, received=received, complete=False
    )
    return JSONResponse(file.model_dump(), 202, headers=_upload_fields(file))


def _keep(running: set[asyncio.Task[Any]], task: asyncio.Task[Any]) -> None:
    """A task that nobody waits for any more must not be forgotten, nor its failure."""
    running.add(task)

    def ended(task: asyncio.Task[Any]) -> None:
        running.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.info("a file was not completed: %s", error)

    task.add_done_callback(ended)


_INSPECTED: dict[int | str, dict[str, Any]] = {
    200: {"description": "Complete"},
    204: {"description": "Not complete yet; Upload-Offset says how much is there"},
}


@router.head(_FILE, response_class=Response, responses=_INSPECTED | documented(404))
async def inspect_file(session: Session, address: AddressOfAny) -> Response:
    """How much of a file is there: where an upload goes on."""
    file = files.as_wire(await files.find(session, address), address.lab)
    headers = _upload_fields(file)
    if not file.complete:
        return Response(status_code=204, headers=headers)
    return Response(headers=headers | {"Content-Length": str(file.size), "Accept-Ranges": "bytes"})


@router.get(_FILE, response_class=StreamingResponse, responses=_READ | documented(404, 416))
async def read_file(request: Request, address: AddressOfAny) -> Response:
    """A complete file, whole or a range of it. No session is held while it streams."""
    store: FileStore = request.app.state.file_store
    async with request.app.state.sessions() as session:
        row = await files.find(session, address)
    if row.completed_at is None:
        raise CheckpointFileNotFound(f"{address} is not complete: {row.received} of {row.size} bytes are there.")
    headers = {"ETag": f'"sha256:{row.digest.hex()}"', "Accept-Ranges": "bytes"}
    wanted = requested_range(request, row.size)
    first, last = wanted or (0, row.size - 1)
    headers["Content-Length"] = str(last - first + 1)
    if wanted:
        headers["Content-Range"] = f"bytes {first}-{last}/{row.size}"
    content = store.read(row.place, first, last) if row.size else iter(())
    return StreamingResponse(content, 206 if wanted else 200, headers=headers, media_type="application/octet-stream")


@router.delete(_FILE, status_code=204, response_class=Response, responses=documented(404))
async def delete_file(request: Request, session: Session, caller: Writer, address: OwnAddress) -> None:
    """Remove a file, complete or not."""
    await files.delete_file(session, request.app.state.file_store, caller, address)
