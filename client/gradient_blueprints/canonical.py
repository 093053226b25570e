"""The canonical bytes of a document (RFC 8785) and the digest that names them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from decimal import Decimal
from json.encoder import encode_basestring  # escapes as section 3.2.2.2 says
from typing import Any

DIGEST_PREFIX = "sha256:"
MAX_SAFE_INTEGER = 2**53 - 1  # beyond it a float64 does not hold every integer

Shape = list[tuple[str, str]]
"""The names of an object in order, each with what is written before its value."""
Leaves = dict[type, Callable[[Any], str]]
"""How a value that holds no others is written, by its type."""
Shapes = dict[tuple[str, ...], Shape]
"""Of the objects met so far: the layers of a blueprint have few."""


def canonical_bytes(document: Any, *, exact: bool = False) -> bytes:
    """Serialise plain JSON data to its one canonical form, UTF-8.

    ValueError for what has none: infinities, NaN, integers beyond float64, unpaired surrogates, names that are not
    text, other types, nesting too deep for the stack; if `exact`, also for integers whose form denotes another integer.

    >>> canonical_bytes({"b": 0.80, "a": 8e-1})
    b'{"a":0.8,"b":0.8}'
    """
    pieces: list[str] = []
    try:
        _write(document, pieces.append, _EXACT_LEAVES if exact else _LEAVES, {})
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return "".join(pieces).encode()


def _write(value: Any, add: Callable[[str], None], leaves: Leaves, shapes: Shapes) -> None:
    leaf = leaves.get(type(value))
    if leaf is not None:
        add(leaf(value))
    elif isinstance(value, dict):
        names = tuple(value)
        shape = shapes.get(names)
        if shape is None:
            shape = shapes[names] = _shape(names)
        for name, before in shape:
            add(before)
            member = value[name]
            leaf = leaves.get(type(member))
            if leaf is not None:
                add(leaf(member))
            else:
                _write(member, add, leaves, shapes)
        add("}" if value else "{}")
    elif isinstance(value, list | tuple):
        separator = "["
        for member in value:
            add(separator)
            _write(member, add, leaves, shapes)
            separator = ","
        add("]" if value else "[]")
    else:
        for kind in (str, int, float):  # an enumeration, or numpy's float64
            if isinstance(value, kind):
                add(leaves[kind](kind(value)))
                return
        raise ValueError(f"{type(value).__name__} is no JSON")


def _shape(names: tuple[str, ...]) -> Shape:
    """Names by their UTF-16 code units (section 3.2.3)."""
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"the name {name!r} is no text")
    if "".join(names).isascii():
        ordered = sorted(names)
    else:
        ordered = sorted(names, key=lambda name: name.encode("utf-16-be", "surrogatepass"))
    return [(name, f"{'{' if name is ordered[0] else ','}{encode_basestring(name)}:") for name in ordered]


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


def _integer(value: int) -> str:
    """Beyond ±(2^53 - 1) as the float64 that it stands for (section 3.2.2.3)."""
    if -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER:
        return str(value)
    try:
        return _number(float(value))
    except OverflowError:
        raise ValueError("an integer is beyond float64") from None


def _exact_integer(value: int) -> str:
    if not is_exact(value):
        raise ValueError(f"the canonical form of {value} would denote another integer")
    return _integer(value)


_LEAVES: Leaves = {
    str: encode_basestring,
    float: _number,
    int: _integer,
    bool: lambda value: "true" if value else "false",
    type(None): lambda _: "null",
}
_EXACT_LEAVES = _LEAVES | {int: _exact_integer}


def is_exact(integer: int) -> bool:
    """Whether the canonical form of `integer` denotes the same integer.

    >>> is_exact(10**16), is_exact(2**60)
    (True, False)
    """
    if -MAX_SAFE_INTEGER <= integer <= MAX_SAFE_INTEGER:
        return True
    try:
        return int(_integer(integer)) == integer
    except ValueError:  # beyond float64, or spelled with an exponent
        return False


def digest_of(content: bytes) -> str:
    """`sha256:` and the 64 hex digits of `content`.

    >>> digest_of(b"")[:23]
    'sha256:e3b0c44298fc1c14'
    """
    return DIGEST_PREFIX + hashlib.sha256(content).hexdigest()
