"""The canonical bytes of a document (RFC 8785) and the digest that names them."""

from __future__ import annotations

import hashlib
from typing import Any

import rfc8785

DIGEST_PREFIX = "sha256:"


def canonical_bytes(document: Any) -> bytes:
    """Serialise plain JSON data to its one canonical form, UTF-8.

    >>> canonical_bytes({"b": 0.80, "a": 8e-1})
    b'{"a":0.8,"b":0.8}'
    """
    return rfc8785.dumps(document)


def digest_of(content: bytes) -> str:
    """`sha256:` and the 64 hex digits of `content`.

    >>> digest_of(b"")[:23]
    'sha256:e3b0c44298fc1c14'
    """
    return DIGEST_PREFIX + hashlib.sha256(content).hexdigest()
