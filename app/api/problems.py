"""Every failure as problem+json (RFC 9457), with the request's id."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from app import database_errors
from app.registry.documents import places_of
from gradient_blueprints.errors import (
    ERRORS_BY_STATUS,
    PROBLEM_MEDIA_TYPE,
    ApiError,
    InternalError,
    InvalidRequest,
    MalformedRequest,
    ServiceUnavailable,
    Unauthenticated,
)

logger = logging.getLogger(__name__)

_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


class Place(BaseModel):
    pointer: str
    code: str
    detail: str


class Problem(BaseModel):
    """The body of every error answer; further members depend on `code`."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    request_id: str | None = None
    errors: list[Place] | None = None


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI `responses` of the error statuses that a route can answer besides those that every route can."""
    every = {400, 401, 403, 408, 413, 422, 429, 500, 503}
    return {
        status: {
            "description": ERRORS_BY_STATUS[status].title,
            "content": {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in sorted(every | set(statuses))
    }


def render(error: ApiError, request_id: str | None) -> JSONResponse:
    error.request_id = request_id
    headers = dict(error.headers)
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.problem(), error.status, headers=headers, media_type=PROBLEM_MEDIA_TYPE)


def _request_id(request: Request) -> str | None:
    request_id: str | None = request.scope.get("state", {}).get("request_id")
    return request_id


async def _on_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return render(error, _request_id(request))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """What the framework itself refuses: unknown paths, wrong methods, bodies it cannot read."""
    assert isinstance(error, HTTPException)
    kind = ERRORS_BY_STATUS.get(error.status_code, InternalError)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        detail = f"There is nothing at {request.url.path}; /v1/openapi.json lists what there is."
    elif error.status_code == 405:
        detail = f"{request.method} is not possible at {request.url.path}."
        headers["Allow"] = ", ".join(_possible_methods(request))
    else:
        detail = str(error.detail)
    return render(kind(detail, headers=headers), _request_id(request))


def _possible_methods(request: Request) -> Iterator[str]:
    """Of all routes of the path; the framework tells those of the first one alone."""
    for method in _METHODS:
        asked = dict(request.scope) | {"method": method}
        if any(route.matches(asked)[0] is Match.FULL for route in request.app.router.routes):
            yield method
            if method == "GET":
                yield "HEAD"  # app.api.gate answers it as the GET without its body


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    """Locations begin with where the value stood: body (then a JSON pointer), path, query or header."""
    assert isinstance(error, RequestValidationError)
    first, *_ = faults = error.errors()
    if first["type"] == "json_invalid":  # the only one, and its location is a count of characters
        told = f"The body is not JSON that can be read: {first['ctx']['error']} at character {first['loc'][-1]}."
        return render(MalformedRequest(told), _request_id(request))
    return render(
        InvalidRequest(
            "The request is not valid; errors[] names the places.", errors=places_of(faults, above=("body",))
        ),
        _request_id(request),
    )


async def _on_database_error(request: Request, error: Exception) -> JSONResponse:
    request_id = _request_id(request)
    if isinstance(error, DataError):
        return render(InvalidRequest("A value cannot be stored; does a text hold a NUL character?"), request_id)
    if database_errors.passes(error):
        logger.warning("database unavailable during request %s: %s", request_id, type(error).__name__)
        return render(ServiceUnavailable("The database cannot answer now; try again.", retry_after=1), request_id)
    return await _on_unexpected(request, error)


async def _on_unexpected(request: Request, error: Exception) -> JSONResponse:
    request_id = _request_id(request)
    if isinstance(error, RuntimeError) and error.__cause__ and database_errors.passes(error.__cause__):
        # The framework's word for an error within a streamed answer, too late for another: the client sees it cut.
        logger.warning("the answer to request %s broke off: %s", request_id, type(error.__cause__).__name__)
    elif not isinstance(error, ClientDisconnect):  # whose answer nobody hears
        logger.error("request %s failed", request_id, exc_info=error)
    return render(InternalError("The server failed; its log tells why under this request id."), request_id)


def install(app: FastAPI) -> None:
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    for kind in database_errors.RAISED:
        app.add_exception_handler(kind, _on_database_error)
    app.add_exception_handler(Exception, _on_unexpected)
