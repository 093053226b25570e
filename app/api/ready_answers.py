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
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.metrics import Metrics
from app.api.representations import DocumentCache, Representation, same_content_tags
from app.registry.blueprints import Found
from app.registry.current import CurrentVersions, Name

_MOST = 4_096
_LONGEST_HEADERS = 256  # of Accept and Accept-Encoding together; nobody fills the memory with long ones
_FRESH_SECONDS = 1.0
_ONE_TAG = re.compile(rb'"[^",]*"')
_OF_A_BODY = frozenset({b"content-encoding", b"content-length", b"content-type"})

RawHeaders = list[tuple[bytes, bytes]]
Key = tuple[str, bytes, bytes]
"""Path, Accept and Accept-Encoding."""


@dataclass
class ReadyAnswer:
    """The headers of one representation; its body stays in the cache of documents."""

    found: Found
    representation: Representation
    tags: frozenset[bytes]
    headers: RawHeaders
    headers_unchanged: RawHeaders
    route: object  # for the metrics
    named: tuple[CurrentVersions, Name] | None
    """Whom to ask whether the name still stands for this version. None for a digest, whose bytes never change:
    there a yank, which only adds a warning, is told of within a second."""
    fresh_until: float


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
        named: tuple[CurrentVersions, Name] | None = None,
    ) -> None:
        key = plain_fetch(request.scope)
        if key is None or (named is not None and found.yanked is not None):
            return
        self._entries[key] = ReadyAnswer(
            found=found,
            representation=representation,
            tags=frozenset(tag.encode() for tag in same_content_tags(found, representation)),
            headers=headers,
            headers_unchanged=[(name, value) for name, value in headers if name not in _OF_A_BODY],
            route=request.scope["route"],
            named=named,
            fresh_until=time.monotonic() + _FRESH_SECONDS,
        )
        if len(self._entries) > _MOST:
            self._entries.popitem(last=False)


def plain_fetch(scope: Scope) -> Key | None:
    """What the answer depends on, if on nothing but this."""
    if scope["method"] != "GET" or scope["query_string"]:
        return None
    accept = encodings = b""
    for name, value in scope["headers"]:
        if name == b"accept":
            accept = accept + b"," + value if accept else value
        elif name == b"accept-encoding":
            encodings = encodings + b"," + value if encodings else value
        elif name == b"authorization":
            return None
    return (scope["path"], accept, encodings) if len(accept) + len(encodings) <= _LONGEST_HEADERS else None


class FastFetches:
    """Pure ASGI, before the application."""

    def __init__(self, app: ASGIApp, ready: ReadyAnswers, documents: DocumentCache, metrics: Metrics) -> None:
        self._app = app
        self._ready = ready
        self._documents = documents
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not await self._answer(scope, send):
            await self._app(scope, receive, send)

    async def _answer(self, scope: Scope, send: Send) -> bool:
        key = plain_fetch(scope)
        ready = self._ready.get(key) if key is not None else None
        if ready is None:
            return False
        stored = self._documents.get(ready.found.digest, ready.representation)
        if stored is None:
            return False
        if ready.named is None:
            now = time.monotonic()
            if now > ready.fresh_until:
                ready.fresh_until = now + _FRESH_SECONDS  # this request looks; the others need not
                return False
        else:
            current, name = ready.named
            if await current.version_id(name) != ready.found.version_id:
                return False
        status, headers, body = 200, ready.headers, stored.body
        for name, value in scope["headers"]:
            if name == b"if-none-match":
                if value in ready.tags:
                    status, headers, body = 304, ready.headers_unchanged, b""
                elif not _ONE_TAG.fullmatch(value):
                    return False  # a list, or whatever else
        scope["route"] = ready.route
        self._metrics.documents_found.inc()
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await send({"type": "http.response.body", "body": body})
        return True
