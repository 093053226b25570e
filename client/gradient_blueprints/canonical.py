"""The canonical bytes of a document (RFC 8785) and the digest that names them."""

from __future__ import annotations

import hashlib
from typing import Any

import rfc8785

DIGEST_PREFIX = "sha256:"
MAX_SAFE_INTEGER = 2**53 - 1  # beyond it a float64 does not hold every integer


def canonical_bytes(document: Any) -> bytes:
    """Serialise plain JSON data to its one canonical form, UTF-8.

    >>> canonical_bytes({"b": 0.80, "a": 8e-1})
    b'{"a":0.8,"b":0.8}'
    """
    try:
        return rfc8785.dumps(document)
    except rfc8785.IntegerDomainError:
        # The canonical form of the float 1e16 is spelled as an integer, which comes back as one.
        return rfc8785.dumps(_with_doubles(document))


def _with_doubles(value: Any) -> Any:
    """Integers beyond ±(2^53 − 1) as the float64 that they stand for (RFC 8785 section 3.2.2.3)."""
    if isinstance(value, dict):
        return {name: _with_doubles(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [_with_doubles(member) for member in value]
    if isinstance(value, int) and abs(value) > MAX_SAFE_INTEGER:
        return float(value)
    return value


def is_exact(integer: int) -> bool:
    """Whether the canonical form of `integer` denotes the same integer.

    >>> is_exact(10**16), is_exact(2**60)
    (True, False)
    """
    try:
        return int(canonical_bytes(integer)) == integer
    except (OverflowError, ValueError):  # beyond float64, or spelled with an exponent
        return False


def digest_of(content: bytes) -> str:
    """`sha256:` and the 64 hex digits of `content`.

    >>> digest_of(b"")[:23]
    'sha256:e3b0c44298fc1c14'
    """
    return DIGEST_PREFIX + hashlib.sha256(content).hexdigest()
