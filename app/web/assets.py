"""The stylesheet, icon and scripts: a few small files of our own, read once and cached by browsers for ever."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Response

from gradient_blueprints.errors import NotFound

router = APIRouter(include_in_schema=False)
_FOLDER = Path(__file__).parent / "static"
_MEDIA_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Asset:
    body: bytes
    media_type: str
    tag: str  # of its bytes: the address changes with them


@cache
def _assets() -> dict[str, Asset]:
    found = {}
    for path in sorted(_FOLDER.iterdir()):
        body = path.read_bytes()
        found[path.name] = Asset(body, _MEDIA_TYPES[path.suffix], hashlib.sha256(body).hexdigest()[:12])
    return found


def address(name: str) -> str:
    """Where the file of that name is, for templates: `/static/3f2a…/site.css`."""
    return f"/static/{_assets()[name].tag}/{name}"


@router.get("/static/{tag}/{name}")
async def read_asset(tag: str, name: str) -> Response:
    asset = _assets().get(name)
    if asset is None:
        raise NotFound(f"There is no {name!r} here.")
    lasting = "public, max-age=31536000, immutable" if tag == asset.tag else "no-cache"
    return Response(asset.body, media_type=asset.media_type, headers={"Cache-Control": lasting})
