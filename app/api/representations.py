"""A stored blueprint as bytes on the wire: JSON or CSV, plain or compressed, from memory where possible."""

from __future__ import annotations

import gzip
import json
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import zstandard
from fastapi import Request, Response
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry.blueprints import Found, read_stored, yanked_warning
from app.settings import Settings
from gradient_blueprints.errors import NotAcceptable
from gradient_blueprints.models import Blueprint, format_checkpoint

JSON = "application/json"
CSV = "text/csv"
REVALIDATE = "no-cache"
_MOST_HEADER_WARNINGS = 20
_SMALLEST_COMPRESSED = 1_024  # bytes
_ENCODINGS = ("zstd", "gzip")
_UNSAID_IDENTITY = 1e-9  # always acceptable, never preferred, unless it is named


@dataclass(frozen=True)
class Representation:
    media_type: str
    encoding: str  # identity, gzip or zstd

    @property
    def tag_suffix(self) -> str:
        """Representations differ in bytes, so their strong ETags must (RFC 9110 section 8.8.3)."""
        parts = [";csv"] if self.media_type == CSV else []
        return "".join([*parts, f";{self.encoding}" if self.encoding != "identity" else ""])


@dataclass(frozen=True)
class Cached:
    """The bytes of one representation, and the document's own warnings, which travel with each of them."""

    body: bytes
    warnings: tuple[dict[str, str], ...]


class DocumentCache:
    """The most recently used bodies by digest and representation, bounded in bytes; compressed forms are made once."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = 0
        self._entries: OrderedDict[tuple[bytes, Representation], Cached] = OrderedDict()

    def get(self, digest: bytes, representation: Representation) -> Cached | None:
        entry = self._entries.get((digest, representation))
        if entry is not None:
            self._entries.move_to_end((digest, representation))
        return entry

    def put(self, digest: bytes, representation: Representation, entry: Cached) -> None:
        if len(entry.body) > self._max_bytes or (digest, representation) in self._entries:
            return
        self._entries[digest, representation] = entry
        self._held += len(entry.body)
        while self._held > self._max_bytes:
            _, dropped = self._entries.popitem(last=False)
            self._held -= len(dropped.body)


PLAIN = Representation(JSON, "identity")


async def read_document(cache: DocumentCache, session: AsyncSession, found: Found) -> Cached:
    """The document as it is stored: from memory, else from the database."""
    entry = cache.get(found.digest, PLAIN)
    if entry is None:
        stored = await read_stored(session, found.document_id)
        entry = Cached(stored.body, stored.warnings)
        cache.put(found.digest, PLAIN, entry)
    return entry


def immutable(settings: Settings) -> str:
    """Cache-Control of what never changes. Where reading needs a key, a shared cache must not pass it on."""
    return f"{'public' if settings.public_reads else 'private'}, max-age=31536000, immutable"


def negotiate(request: Request, size: int) -> Representation:
    """The representation that suits Accept and Accept-Encoding; NotAcceptable when there is none."""
    accept = ",".join(request.headers.getlist("accept")) or "*/*"
    media_type = preferred(accept, (JSON, CSV))
    if media_type is None:
        raise NotAcceptable(f"A blueprint can be had as {JSON} or {CSV}, not as {accept!r}.")
    encodings = ",".join(request.headers.getlist("accept-encoding"))
    worthwhile = size >= _SMALLEST_COMPRESSED and encodings
    encoding = preferred(encodings, (*_ENCODINGS, "identity")) if worthwhile else None
    return Representation(media_type, encoding or "identity")


def preferred(header: str, offers: Sequence[str]) -> str | None:
    """The offer with the highest quality value; of equals the first offered."""
    qualities: dict[str, float] = {}
    for item in header.lower().split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        quality = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        try:
            qualities[name] = float(quality)
        except ValueError:
            qualities[name] = 0.0
    ranked = [(_quality(qualities, offer), -index) for index, offer in enumerate(offers)]
    best, index = max(ranked)
    return offers[-index] if best > 0 else None


def _quality(qualities: dict[str, float], offer: str) -> float:
    kind, slash, _ = offer.partition("/")
    for pattern in (offer, f"{kind}/*", "*/*") if slash else (offer, "*"):
        if pattern in qualities:
            return qualities[pattern]
    return _UNSAID_IDENTITY if offer == "identity" else 0.0


def same_content_tags(found: Found, representation: Representation) -> frozenset[str]:
    """The ETags of these bytes, in this or another compression of the same media type."""
    return frozenset(
        f'"{found.digest_text}{Representation(representation.media_type, encoding).tag_suffix}"'
        for encoding in ("identity", *_ENCODINGS)
    )


def is_unchanged(request: Request, found: Found, representation: Representation) -> bool:
    """Whether If-None-Match names these bytes, in this or another compression of the same media type."""
    return names_one_of(request, same_content_tags(found, representation))


def names_one_of(request: Request, tags: Collection[str]) -> bool:
    """Whether If-None-Match holds one of `tags`, or `*` (RFC 9110 section 13.1.2)."""
    given = ",".join(request.headers.getlist("if-none-match"))
    named = {tag.strip().removeprefix("W/") for tag in given.split(",")}
    return "*" in named or not named.isdisjoint(tags)


def encode(body: bytes, representation: Representation) -> bytes:
    """Render and compress the canonical bytes."""
    if representation.media_type == CSV:
        body = Blueprint.from_json(body).to_csv().encode()
    match representation.encoding:
        case "gzip":
            return gzip.compress(body, compresslevel=6, mtime=0)
        case "zstd":
            return zstandard.compress(body, level=6)
        case _:
            return body


def headers(
    found: Found,
    representation: Representation,
    warnings: Sequence[dict[str, str]],
    *,
    cache_control: str,
    nearest: bool,
) -> dict[str, str]:
    answer = {
        "ETag": f'"{found.digest_text}{representation.tag_suffix}"',
        "Vary": "Accept, Accept-Encoding",
        "Cache-Control": cache_control,
        "Blueprint-Version": str(found.version),
        "Blueprint-Digest": found.digest_text,
        "Blueprint-Lab": found.lab,
        "Blueprint-Checkpoint": format_checkpoint(found.checkpoint),
    }
    if representation.encoding != "identity":
        answer["Content-Encoding"] = representation.encoding
    if found.yanked is not None:
        warnings = [yanked_warning(found.yanked), *warnings]
    if warnings:
        shown = json.dumps(warnings[:_MOST_HEADER_WARNINGS], ensure_ascii=True, separators=(",", ":"))
        answer["Blueprint-Warning"] = shown
    if nearest:
        answer["Blueprint-Distance"] = format(found.distance.normalize(), "f")
    return answer


def respond(body: bytes, representation: Representation, header: dict[str, str]) -> Response:
    media_type = f"{CSV}; charset=utf-8" if representation.media_type == CSV else JSON
    return Response(body, media_type=media_type, headers=header)
