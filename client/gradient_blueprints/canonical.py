"""The canonical bytes of a document (RFC 8785) and the digest that names them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from decimal import Decimal
from json.encoder import encode_basestring  # escapes as section 3.2.2.2 says
from typing import Any

DIGEST_PREFIX = "sha256:"
MAX_SAFE_INTEGER = 2**53 - 1  # beyond it a float64 does not hold every integer


def canonical_bytes(document: Any) -> bytes:
    """Serialise plain JSON data to its one canonical form, UTF-8.

    ValueError for what has none: infinities, NaN, unpaired surrogates, names that are not text, other types.

    >>> canonical_bytes({"b": 0.80, "a": 8e-1})
    b'{"a":0.8,"b":0.8}'
    """
    pieces: list[str] = []
    _write(document, pieces.append)
    return "".join(pieces).encode()


def _write(value: Any, add: Callable[[str], None]) -> None:
    if isinstance(value, str):
        add(encode_basestring(value))
    elif isinstance(value, float):
        add(_number(value))
    elif isinstance(value, dict):
        separator = "{"
        for name in _in_order(value):
            add(f"{separator}{encode_basestring(name)}:")
            _write(value[name], add)
            separator = ","
        add("}" if value else "{}")
    elif isinstance(value, list | tuple):
        separator = "["
        for member in value:
            add(separator)
            _write(member, add)
            separator = ","
        add("]" if value else "[]")
    elif value is None:
        add("null")
    elif isinstance(value, bool):
        add("true" if value else "false")
    elif isinstance(value, int):
        # Integers beyond ±(2^53 − 1) as the float64 that they stand for (section 3.2.2.3).
        add(str(value) if -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER else _number(float(value)))
    else:
        raise ValueError(f"{type(value).__name__} is no JSON")


def _in_order(members: dict[str, Any]) -> list[str]:
    """Names by their UTF-16 code units (section 3.2.3)."""
    if "".join(members).isascii():
        return sorted(members)
    return sorted(members, key=lambda name: name.encode("utf-16-be", "surrogatepass"))


def _number(value: float) -> str:
    """As ECMAScript writes it (section 3.2.2.3): the digits that Python also finds, placed otherwise."""
    text = repr(value)
    if text.endswith(".0"):
        return text[:-2] if value else "0"
    if "e" not in text:
        if "n" in text:
            raise ValueError(f"{text} has no place in JSON")
        return text
    digits, _, exponent = text.partition("e")
    power = int(exponent)
    return format(Decimal(text), "f") if -7 < power < 21 else f"{digits}e{power:+d}"


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
