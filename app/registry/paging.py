"""Keyset paging: a cursor holds the sort key of the last row seen, so that a page costs the same wherever it is."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, TypeVar

from gradient_blueprints.errors import InvalidRequest
from gradient_blueprints.models import parse_checkpoint

Row = TypeVar("Row")
DEFAULT_LIMIT = 50
MAX_LIMIT = 200
INT4, INT8 = 2**31, 2**63
"""Where the numbers of a column of either type end."""


def encode_cursor(*key: str | int) -> str:
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None, *types: type, below: int = INT8) -> tuple[Any, ...] | None:
    """The sort key in a cursor, its numbers within those of their column; InvalidRequest for one that no page gave
    out."""
    if cursor is None:
        return None
    try:
        key = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (ValueError, binascii.Error):
        key = None
    if not isinstance(key, list) or [type(part) for part in key] != list(types):
        raise _foreign_cursor()
    if not all(-below <= part < below if isinstance(part, int) else part.isprintable() for part in key):
        raise _foreign_cursor()
    return tuple(key)


def split_page(
    rows: Sequence[Row], limit: int, key: Callable[[Row], tuple[str | int, ...]]
) -> tuple[Sequence[Row], str | None]:
    """Of `limit + 1` rows asked for, the page and the cursor of the next one."""
    if len(rows) <= limit:
        return rows, None
    return rows[:limit], encode_cursor(*key(rows[limit - 1]))


def decimal_of(text: str) -> Decimal:
    """A fraction out of a cursor."""
    try:
        return parse_checkpoint(text)
    except ValueError:
        raise _foreign_cursor() from None


def _foreign_cursor() -> InvalidRequest:
    return InvalidRequest("This cursor was not given out by this listing; start again without one.")
