"""The part of a file that a request asks for (RFC 9110, section 14)."""

from __future__ import annotations

import re

from fastapi import Request

from gradient_blueprints.errors import RangeNotSatisfiable


def requested_range(request: Request, size: int) -> tuple[int, int] | None:
    """First and last byte of the one range asked for; None for the whole, also when a range need not be understood.

    Raises RangeNotSatisfiable when it lies outside the `size` bytes.
    """
    wanted = re.fullmatch(r"bytes=(\d{,18})-(\d{,18})", request.headers.get("range", ""), re.ASCII)
    first, last = wanted.groups() if wanted else ("", "")
    if (not first and not last) or (first and last and int(last) < int(first)):
        return None
    if (int(first) >= size) if first else (int(last) == 0):
        raise RangeNotSatisfiable(f"The file has {size} bytes.", headers={"Content-Range": f"bytes */{size}"})
    if first:
        return int(first), min(int(last), size - 1) if last else size - 1
    return max(0, size - int(last)), size - 1
