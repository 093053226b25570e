"""What every request passes: an id, its quota, limits of size and time, and headers that every answer carries."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import secrets
import time
from collections.abc import Sequence
from typing import NamedTuple

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.metrics import Metrics
from app.api.patience import Patience
from app.api.problems import render
from app.api.rate_limits import Charge, RateLimits
from app.api.request_log import log_request
from app.settings import Settings
from gradient_blueprints.errors import (
    ApiError,
    MalformedRequest,
    PayloadTooLarge,
    RateLimited,
    RequestTimeout,
    ServiceUnavailable,
)
from gradient_blueprints.log_lines import add_ids

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_JOB_RESULT = re.compile(r"/v1/jobs/[^/]+/result")
_CHECKPOINT_FILE = re.compile(r"/v1/models/.+/checkpoints/[^/]+/files/.+")
_JOB_EVENTS = re.compile(r"(/v1)?/jobs/[^/]+/events")
_SHARD_STATE = re.compile(r"/v1/jobs/[^/]+/shards/[^/]+/state")

_DRAIN_BYTES = 128 << 20
_DRAIN_SECONDS = 10.0

RawHeader = tuple[bytes, bytes]
# What an answer says unless it says something else itself: pages bring their own policy. A Referrer-Policy of
# no-referrer would take the Origin from the forms of our pages, which their check needs.
_DEFAULT_HEADERS: tuple[RawHeader, ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
)
HTTPS_ONLY: RawHeader = (b"strict-transport-security", b"max-age=31536000")
_UNLIMITED = ("/livez", "/readyz")


class Begun(NamedTuple):
    """What was done about a request before it came here."""

    at: float
    charge: Charge | None = None


class Gate:
    """Pure ASGI, so that streamed bodies pass without being held. Cheap: it is a part of every answer from memory."""

    def __init__(
        self, app: ASGIApp, settings: Settings, metrics: Metrics, limits: RateLimits, patience: Patience
    ) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._limits = limits
        self._patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = scope.setdefault("state", {}).pop("begun", None) or Begun(time.perf_counter())
        method, path = scope["method"], scope["path"]
        headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))  # of a repeated field the first
        request_id = request_id_of(headers)
        scope["state"]["request_id"] = request_id
        add_ids(request_id=request_id)
        own: list[RawHeader] = [(b"x-request-id", request_id.encode())]
        refusal = _unreadable(scope)
        if path not in _UNLIMITED and (
            charge := begun.charge or self._limits.charge(scope.get("client"), headers.get(b"authorization"))
        ):
            own.extend(charge.headers)
            if charge.wait > 0:
                refusal = RateLimited(
                    f"The quota of requests of this {charge.policy} is used up.", retry_after=charge.wait
                )
                self._metrics.rate_limited.labels(charge.policy).inc()
        if scope["scheme"] == "https":
            own.append(HTTPS_ONLY)
        limit = self._limit(path)
        given = scope
        if method == "HEAD" and limit is not None and not _JOB_EVENTS.fullmatch(path):
            scope = {**scope, "method": "GET"}  # uvicorn, which has the scope as it was, leaves the body away
        exchange = _Exchange(receive, send, own, limit, self._settings.body_seconds, self._patience)
        try:
            await self._answer(scope, headers, exchange, refusal)
        finally:
            self._patience.waiting.discard(exchange)
            seconds = time.perf_counter() - begun.at
            given["route"] = scope.get("route")  # for the span around all this
            route = getattr(given["route"], "path", "")
            self._metrics.answered(method, route, exchange.status, seconds)
            log_request(scope, method, route, exchange.status, seconds, self._settings.log_requests, request_id)

    async def _answer(
        self, scope: Scope, headers: dict[bytes, bytes], exchange: _Exchange, refusal: ApiError | None
    ) -> None:
        limit = exchange.limit
        length = headers.get(b"content-length", b"0")
        if refusal is None and limit is not None and length.isdigit() and int(length) > limit:
            refusal = _too_large(limit)
            refusal.headers["Connection"] = "close"
        if refusal is None:
            exchange.begin(has_body=length != b"0" or b"transfer-encoding" in headers)
            try:
                with contextlib.suppress(ApiError, ClientDisconnect):
                    await self._app(scope, exchange.receive, exchange.send)
            except asyncio.CancelledError:
                if not exchange.overdue:
                    raise
                exchange.task.uncancel()
            except Exception as error:
                if exchange.started:
                    raise
                # Outside of this the framework would answer, past our headers, the metrics and the log.
                failure = await _failure(scope, error)
                if exchange.refusal is None:
                    await failure(scope, exchange.receive_raw, exchange.send_anyway)
                    return
            refusal = exchange.refusal
            if refusal is None or exchange.started:
                return
            if isinstance(refusal, PayloadTooLarge):
                await _drain(exchange.receive_raw)
            refusal.headers["Connection"] = "close"  # the rest of the body is not read
        elif b"expect" not in headers:
            await _drain(exchange.receive_raw)
        await render(refusal, scope["state"]["request_id"])(scope, exchange.receive_raw, exchange.send_anyway)

    def _limit(self, path: str) -> int | None:
        if not path.startswith("/v1/"):
            return self._settings.max_body_bytes
        if path.startswith("/v1/blobs/") or _SHARD_STATE.fullmatch(path) or _CHECKPOINT_FILE.fullmatch(path):
            return None  # app.registry.blobs has its own, while it streams
        if path == "/v1/blueprints" or _JOB_RESULT.fullmatch(path):
            return self._settings.max_document_bytes
        return self._settings.max_body_bytes


class _Exchange:
    """One request and its answer: `receive` and `send` for the application, which refuse what is too large or slow."""

    def __init__(
        self, receive: Receive, send: Send, own: list[RawHeader], limit: int | None, seconds: float, patience: Patience
    ) -> None:
        self.receive_raw = receive
        self.limit = limit
        """Bytes of the body. None where files are sent: they take the time that they take, as long as they move."""
        self.status = 499  # the client went away before there was an answer
        self.started = False
        self.overdue = False
        self.refusal: ApiError | None = None
        self.answer_by = math.inf
        self.task: asyncio.Task[object]
        self._send = send
        self._own = own
        self._seconds = seconds
        self._patience = patience
        self._body_by = 0.0
        self._received = 0
        self._complete = False

    def begin(self, *, has_body: bool) -> None:
        """The time runs from here on."""
        if self.limit is None:
            return
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        now = time.monotonic()
        self._body_by = now + self._seconds
        self.answer_by = now + self._patience.seconds + (self._seconds if has_body else 0.0)
        self._patience.waiting.add(self)

    def give_up(self) -> None:
        self.overdue = True
        self.refusal = ServiceUnavailable(
            f"The answer was not ready within {self._patience.seconds:g} seconds.", retry_after=1
        )
        self.task.cancel()

    async def receive(self) -> Message:
        if self._complete:
            return await self.receive_raw()  # waits for the disconnect
        left = self._seconds if self.limit is None else self._body_by - time.monotonic()
        try:
            with anyio.fail_after(max(0.001, left)):
                message = await self.receive_raw()
        except TimeoutError:
            self.refusal = RequestTimeout(f"The body did not arrive within {self._seconds:g} seconds.")
            raise self.refusal from None
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            if self.limit is not None and self._received > self.limit:
                self.refusal = _too_large(self.limit)
                raise self.refusal
            if not message.get("more_body", False):
                self._complete = True
                if self.limit is not None:
                    self.answer_by = time.monotonic() + self._patience.seconds
        return message

    async def send(self, message: Message) -> None:
        if self.refusal is None or self.started:
            await self.send_anyway(message)
        # else: whatever the application makes of a body cut short, the refusal is the answer

    async def send_anyway(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self._patience.waiting.discard(self)
            self.status = message["status"]
            headers: list[RawHeader] = message["headers"]
            message["headers"] = [*with_defaults(headers), *self._own]
            await self._send(message)
        elif message.get("more_body", False):
            try:
                async with asyncio.timeout(self._seconds):
                    await self._send(message)
            except TimeoutError:
                logger.warning("a client took nothing of its answer for %g seconds", self._seconds)
                raise ClientDisconnect from None
        else:
            await self._send(message)


def with_defaults(headers: Sequence[RawHeader]) -> list[RawHeader]:
    said = {name for name, _ in headers}
    return [*headers, *(one for one in _DEFAULT_HEADERS if one[0] not in said)]


def request_id_of(headers: dict[bytes, bytes]) -> str:
    given = headers.get(b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(text := given.decode("latin-1")):
        return text
    return secrets.token_hex(16)


def _unreadable(scope: Scope) -> ApiError | None:
    if "\0" in scope["path"] or b"%00" in scope["query_string"]:
        return MalformedRequest("The address holds a NUL character.")
    return None


async def _drain(receive: Receive) -> None:
    """Read on for a bounded while: a connection closed on a client that still writes loses the answer on its way."""
    received = 0
    with anyio.move_on_after(_DRAIN_SECONDS):
        while received < _DRAIN_BYTES:
            message = await receive()
            received += len(message.get("body", b""))
            if not message.get("more_body", False):
                return


async def _failure(scope: Scope, error: Exception) -> Response:
    """What the application answers, and logs, of an error that none of its other handlers takes."""
    answered: Response = await scope["app"].exception_handlers[Exception](Request(scope), error)
    return answered


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"A body has at most {limit} bytes here.")
