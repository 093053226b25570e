"""What routes ask for: a session that is committed before the answer leaves, the caller, the parts of the path."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from decimal import Decimal
from typing import Annotated, Any

from fastapi import Depends, Header, Path, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.convertors import StringConvertor, register_url_convertor

from app.registry import keys, paging
from app.registry.callers import Caller
from app.registry.current import NotFoundOut
from app.settings import Settings
from gradient_blueprints.errors import InvalidRequest, Unauthenticated
from gradient_blueprints.models import (
    LAB_NAME_PATTERN,
    MODEL_ID_PATTERN,
    Scope,
    build_validators,
    parse_checkpoint,
)

_MARK_USED_SECONDS = 60
build_validators()  # before any router's adapters, and not while the first request waits
_bearer = HTTPBearer(auto_error=False, description="An API key")


class _ModelIdConvertor(StringConvertor):
    """`{model_id:model}`: `name` or `org/name` within a path."""

    regex = MODEL_ID_PATTERN


register_url_convertor("model", _ModelIdConvertor())  # here, since every router imports this module first


async def _session(request: Request) -> AsyncIterator[AsyncSession]:
    async with request.app.state.sessions() as session:
        yield session
        await session.commit()


# scope="function": FastAPI would otherwise commit after the answer was sent, and a failing commit be answered 2xx.
Session = Annotated[AsyncSession, Depends(_session, scope="function")]


async def get_settings(request: Request) -> Settings:  # no thread, which FastAPI gives to plain functions
    settings: Settings = request.app.state.settings
    return settings


CurrentSettings = Annotated[Settings, Depends(get_settings)]


async def identify(
    request: Request,
    settings: CurrentSettings,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Caller | None:
    """Who asks, outside of the request's session: an upload must not hold a transaction open while it streams."""
    if credentials is None:
        if "authorization" in request.headers:
            raise Unauthenticated("The Authorization header must read: Bearer KEY.")
        return None
    state, secret = request.app.state, credentials.credentials
    row = None
    with contextlib.suppress(NotFoundOut):
        row = await state.live_keys.get(keys.hash_secret(secret, settings.secret))
    if row is not None:
        caller = keys.caller_of_row(row, request_id=request.state.request_id)
    else:  # to say what is wrong with it
        async with state.autocommit_sessions() as session:
            caller = await keys.authenticate(session, secret, settings.secret, request_id=request.state.request_id)
    state.rate_limits.recognise(request.headers["authorization"], caller.key_id)
    request.state.caller = caller  # for the log
    used: dict[int, float] = state.keys_marked_used
    if time.monotonic() - used.get(caller.key_id, -_MARK_USED_SECONDS) >= _MARK_USED_SECONDS:
        used[caller.key_id] = time.monotonic()
        async with state.autocommit_sessions() as session:
            await keys.mark_used(session, caller.key_id)
    return caller


Identified = Annotated[Caller | None, Depends(identify)]


def requires(*scopes: Scope) -> Callable[..., Coroutine[Any, Any, Caller]]:
    """A dependency that answers the caller, whose key has one of `scopes`."""

    async def check(caller: Identified) -> Caller:
        if caller is None:
            raise Unauthenticated(f"This needs a key with the scope {' or '.join(scopes)}: Authorization: Bearer KEY.")
        caller.require(*scopes)
        return caller

    return check


async def check_reader(settings: CurrentSettings, caller: Identified) -> Caller | None:
    """Reading is public by default; where it is closed it needs the scope read."""
    if not settings.public_reads:
        if caller is None:
            raise Unauthenticated("Reading this registry needs a key with the scope read: Authorization: Bearer KEY.")
        caller.require(Scope.READ)
    return caller


async def check_any_key(caller: Identified) -> Caller:
    if caller is None:
        raise Unauthenticated("This needs a key: Authorization: Bearer KEY.")
    return caller


Reader = Annotated[Caller | None, Depends(check_reader)]
AnyKey = Annotated[Caller, Depends(check_any_key)]
Publisher = Annotated[Caller, Depends(requires(Scope.PUBLISH))]
Uploader = Annotated[Caller, Depends(requires(Scope.PUBLISH, Scope.WORK))]
Admin = Annotated[Caller, Depends(requires(Scope.ADMIN))]


_CHECKPOINT_PATH = Path(
    examples=["0.8"],
    max_length=32,
    # As documented; other spellings of the same number, such as 0.80 and 8e-1, are read too.
    json_schema_extra={"pattern": r"^(1(\.0{1,4})?|0\.[0-9]{0,3}[1-9])$"},
)


async def _checkpoint(checkpoint: Annotated[str, _CHECKPOINT_PATH]) -> Decimal:
    return checkpoint_of(checkpoint, "/path/checkpoint")


def checkpoint_of(text: str, pointer: str) -> Decimal:
    try:
        return parse_checkpoint(text)
    except ValueError as error:
        fault = {"pointer": pointer, "code": "invalid_checkpoint", "detail": str(error)}
        raise InvalidRequest(f"{error}.", errors=[fault]) from None  # type: ignore[list-item] # a literal ErrorPlace


CheckpointPath = Annotated[Decimal, Depends(_checkpoint)]
VersionNumber = Annotated[int, Path(ge=1, le=2**31 - 1)]
DigestPath = Annotated[str, Path(pattern=r"^sha256:[0-9a-f]{64}$")]
AliasName = Annotated[str, Path(pattern=r"^[A-Za-z][A-Za-z0-9._-]{0,63}$")]
LabQuery = Annotated[str | None, Query(pattern=rf"^(\*|{LAB_NAME_PATTERN})$", description="a lab, or `*` for any")]
Limit = Annotated[int, Query(ge=1, le=paging.MAX_LIMIT)]
Cursor = Annotated[str | None, Query(max_length=512, description="from the previous page's `next`")]
IdempotencyKey = Annotated[
    str | None, Header(alias="Idempotency-Key", min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")
]
