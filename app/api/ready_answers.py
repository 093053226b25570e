"""Answers to plain fetches of blueprints, made once and sent again: no parsing, no rendering, no statement of its own.

A request that asks for nothing special (no key, no query) and was answered before gets the same bytes, once it is
known that they still stand. Everything else goes the whole way through the routes.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from dataclasses import dataclass

from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.gate import HTTPS_ONLY, Begun, request_id_of, with_defaults
from app.api.metrics import Metrics
from app.api.rate_limits import RateLimits
from app.api.representations import DocumentCache, Representation, same_content_tags
from app.api.request_log import log_request
from app.registry.blueprints import Found
from app.registry.current import CurrentRows, Name, NotFoundOut
from app.settings import Settings

_MOST = 4_096
_LONGEST_HEADERS = 256  # of Accept and Accept-Encoding together; nobody fills the memory with long ones
_FRESH_SECONDS = 1.0
_ONE_TAG = re.compile(rb'"[^",]*"')
_NOT_PLAIN = frozenset({b"authorization", b"content-length", b"transfer-encoding", b"expect"})
_OF_A_BODY = frozenset({b"content-encoding", b"content-length", b"content-type"})

RawHeaders = list[tuple[bytes, bytes]]
Key = tuple[str, bytes, bytes]
"""Path, Accept and Accept-Encoding."""


@dataclass
class Standing:
    """Whom to ask whether a name still stands for the version that it was resolved to.

    What a digest stands for never changes (`for_ever`): there a yank, which only adds a warning, is told of within a
    second, and a database out of reach changes nothing.
    """

    current: CurrentRows
    name: Name
    for_ever: bool = False
    known_until: float = 0.0

    async def holds(self, found: Found) -> bool:
        began = time.monotonic()
        if began <= self.known_until:
            return True
        try:
            row = await self.current.get(*self.name)
        except NotFoundOut:
            return self.for_ever
        if row is None or row["id"] != found.version_id or row.get("yanked") != found.yanked:
            return False
        if self.for_ever:
            self.known_until = began + _FRESH_SECONDS
        return True


@dataclass
class ReadyAnswer:
    """The headers of one representation; its body stays in the cache of documents."""

    found: Found
    representation: Representation
    tags: frozenset[bytes]
    headers: RawHeaders
    headers_unchanged: RawHeaders
    route: Route
    standing: Standing


class ReadyAnswers:
    """The most recently used."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Key, ReadyAnswer] = OrderedDict()

    def get(self, key: Key) -> ReadyAnswer | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def keep(
        self,
        request: Request,
        found: Found,
        representation: Representation,
        headers: RawHeaders,
        standing: Standing,
    ) -> None:
        plain = plain_fetch(request.scope)
        if plain is None or (found.yanked is not None and not standing.for_ever):
            return
        headers = with_defaults(headers)
        self._entries[plain[0]] = ReadyAnswer(
            found=found,
            representation=representation,
            tags=frozenset(tag.encode() for tag in same_content_tags(found, representation)),
            headers=headers,
            headers_unchanged=[(name, value) for name, value in headers if name not in _OF_A_BODY],
            route=request.scope["route"],
            standing=standing,
        )
        if len(self._entries) > _MOST:
            self._entries.popitem(last=False)


def plain_fetch(scope: Scope) -> tuple[Key, dict[bytes, bytes]] | None:
    """What the answer depends on, if on nothing but this, and the headers, of which each came once."""
    if scope["method"] != "GET" or scope["query_string"]:
        return None
    headers: dict[bytes, bytes] = dict(scope["headers"])
    if len(headers) < len(scope["headers"]) or not headers.keys().isdisjoint(_NOT_PLAIN):
        return None
    accept, encodings = headers.get(b"accept", b""), headers.get(b"accept-encoding", b"")
    if len(accept) + len(encodings) > _LONGEST_HEADERS:
        return None
    return (scope["path"], accept, encodings), headers


class FastFetches:
    """Pure ASGI, before everything else of the application: quotas, metrics and log are as the gate has them."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        ready: ReadyAnswers,
        documents: DocumentCache,
        metrics: Metrics,
        limits: RateLimits,
    ) -> None:
        self._app = app
        self._log_requests = settings.log_requests
        self._ready = ready
        self._documents = documents
        self._metrics = metrics
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not await self._answer(scope, send):
            await self._app(scope, receive, send)

    async def _answer(self, scope: Scope, send: Send) -> bool:
        began = time.perf_counter()
        plain = plain_fetch(scope)
        if plain is None or (ready := self._ready.get(plain[0])) is None:
            return False
        stored = self._documents.get(ready.found.digest, ready.representation)
        if stored is None:
            return False
        asked = plain[1]
        status, headers, body = 200, ready.headers, stored.body
        if (tag := asked.get(b"if-none-match")) is not None:
            if tag in ready.tags:
                status, headers, body = 304, ready.headers_unchanged, b""
            elif not _ONE_TAG.fullmatch(tag):
                return False  # a list, or whatever else
        charge = self._limits.charge(scope.get("client"), None)
        if charge is not None and charge.wait > 0:
            return False  # the gate refuses it
        state = scope.setdefault("state", {})
        if not await ready.standing.holds(ready.found):
            state["begun"] = Begun(began, charge)
            return False
        request_id = request_id_of(asked)
        headers = [*headers, (b"x-request-id", request_id.encode()), *(charge.headers if charge else ())]
        if scope["scheme"] == "https":
            headers.append(HTTPS_ONLY)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        seconds = time.perf_counter() - began
        self._metrics.documents_found.inc()
        route = ready.route.path
        self._metrics.answered("GET", route, status, seconds)
        log_request(scope, "GET", route, status, seconds, self._log_requests, request_id)
        scope["route"], state["request_id"] = ready.route, request_id  # for the span, where there is one
        return True
