"""What every request passes: an id, limits on its body, and headers that every answer carries."""

from __future__ import annotations

import contextlib
import re
import time
from uuid import uuid4

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.metrics import Metrics
from app.api.problems import render
from app.settings import Settings
from gradient_blueprints.errors import ApiError, MalformedRequest, PayloadTooLarge, RequestTimeout

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_JOB_RESULT = re.compile(r"/v1/jobs/[^/]+/result")
_CHECKPOINT_FILE = re.compile(r"/v1/models/.+/checkpoints/[^/]+/files/.+")
_SHARD_STATE = re.compile(r"/v1/jobs/[^/]+/shards/[^/]+/state")


_DRAIN_BYTES = 128 << 20
_DRAIN_SECONDS = 10.0


class Gate:
    """Pure ASGI, so that streamed bodies pass without being held."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 499  # the client went away before there was an answer
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                answer["X-Request-Id"] = request_id
                answer.setdefault("X-Content-Type-Options", "nosniff")
                answer.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            await self._answer(scope, headers, receive, send_with_headers, request_id)
        finally:
            self._metrics.answered(scope, status, time.perf_counter() - began)

    async def _answer(self, scope: Scope, headers: Headers, receive: Receive, send: Send, request_id: str) -> None:
        if refusal := self._refusal_before_reading(scope, headers):
            if "expect" not in headers:
                await _drain(receive)
            await render(refusal, request_id)(scope, receive, send)
            return
        limit = self._limit(scope)
        # A blob takes the time that it takes, as long as it moves; app.registry.blobs limits its size.
        body = _LimitedBody(receive, limit, self._settings.body_seconds, each_message=limit is None)
        started = False

        async def send_unless_refused(message: Message) -> None:
            nonlocal started
            if body.refusal is not None and not started:
                return  # whatever the application makes of a body cut short, the refusal is the answer
            started = True
            await send(message)

        with contextlib.suppress(ApiError):
            await self._app(scope, body.receive, send_unless_refused)
        if body.refusal is not None and not started:
            if isinstance(body.refusal, PayloadTooLarge):
                await _drain(receive)
            body.refusal.headers["Connection"] = "close"  # the rest of the body is not read
            await render(body.refusal, request_id)(scope, receive, send)

    def _refusal_before_reading(self, scope: Scope, headers: Headers) -> ApiError | None:
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            return MalformedRequest("The address holds a NUL character.")
        limit = self._limit(scope)
        length = headers.get("content-length", "")
        if limit is not None and length.isdecimal() and int(length) > limit:
            refusal = _too_large(limit)
            refusal.headers["Connection"] = "close"
            return refusal
        return None

    def _limit(self, scope: Scope) -> int | None:
        path = scope["path"]
        if path.startswith("/v1/blobs/") or _SHARD_STATE.fullmatch(path) or _CHECKPOINT_FILE.fullmatch(path):
            return None  # app.registry.blobs has its own, while it streams
        if path == "/v1/blueprints" or _JOB_RESULT.fullmatch(path):
            return self._settings.max_document_bytes
        return self._settings.max_body_bytes


class _LimitedBody:
    """`receive` that refuses a body which is too large or too slow, chunked ones without end among them."""

    def __init__(self, receive: Receive, limit: int | None, seconds: float, *, each_message: bool) -> None:
        self._receive = receive
        self._limit = limit
        self._deadline = time.monotonic() + seconds
        self._seconds = seconds
        self._each_message = each_message  # the time is that of one message, not of the whole body
        self._received = 0
        self._complete = False
        self.refusal: ApiError | None = None

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()  # waits for the disconnect
        if self._each_message:
            self._deadline = time.monotonic() + self._seconds
        try:
            with anyio.fail_after(max(0.001, self._deadline - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            self.refusal = RequestTimeout(f"The body did not arrive within {self._seconds:g} seconds.")
            raise self.refusal from None
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._limit is not None and self._received > self._limit:
                self.refusal = _too_large(self._limit)
                raise self.refusal
        return message


async def _drain(receive: Receive) -> None:
    """Read on for a bounded while: a connection closed on a client that still writes loses the answer on its way."""
    received = 0
    with anyio.move_on_after(_DRAIN_SECONDS):
        while received < _DRAIN_BYTES:
            message = await receive()
            received += len(message.get("body", b""))
            if not message.get("more_body", False):
                return


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"A body has at most {limit} bytes here.")
