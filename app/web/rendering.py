"""Pages from templates: escaping, the strict Content-Security-Policy, and how numbers and dates are written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

import anyio
import anyio.to_thread
from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from sqlalchemy.ext.asyncio import AsyncSession

from app.web import assets
from gradient_blueprints.models import format_checkpoint

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "style-src 'self'",
        "script-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
_TEMPLATES = Path(__file__).parent / "templates"
_NOTHING = "–"
_PART_ENDS = re.compile(r"(?<=[._/])")
Made = TypeVar("Made")


def render(
    request: Request, template: str, *, status: int = 200, headers: Mapping[str, str] | None = None, **context: Any
) -> HTMLResponse:
    """The page `templates/TEMPLATE` with `context`.

    Every value is escaped; templates see `request`, and `viewer`, the Caller who is logged in or None. No page loads
    anything from elsewhere or holds inline script or style: the policy forbids it, and the browser tests watch.
    """
    viewer = getattr(request.state, "viewer", None)
    body = _environment().get_template(template).render(request=request, viewer=viewer, **context)
    return HTMLResponse(
        body,
        status,
        headers={
            "Content-Security-Policy": CONTENT_SECURITY_POLICY,
            # After logging out the browser must not show it again when somebody goes back.
            "Cache-Control": "private, no-cache" if viewer is None else "no-store",
            "Vary": "Cookie, Authorization, Accept",
            **(headers or {}),
        },
    )


async def in_thread(
    session: AsyncSession, make: Callable[[], Made], *, limiter: anyio.CapacityLimiter | None = None
) -> Made:
    """What takes long to make of what was read. The database's connection goes back before: there are few of them."""
    await session.commit()
    return await anyio.to_thread.run_sync(make, limiter=limiter)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number,
        signed=signed,
        breakable=breakable,
        count=count,
        percent=percent,
        size=size,
        day=day,
        moment=moment,
        checkpoint=format_checkpoint,
        plain=plain,
        exponential=exponential,
    )
    environment.filters.update(second=second, duration=duration)
    environment.globals.update(asset=assets.address, model_path=model_path, version_path=version_path, with_query=query)
    return environment


# --- addresses: model ids, checkpoints and digests need no quoting in a path


def model_path(model_id: str, *parts: str) -> str:
    """
    >>> model_path("org/name", "compare")
    '/models/org/name/compare'
    """
    return "/".join(("/models", model_id, *parts))


def version_path(model_id: str, checkpoint: float, number: int | None = None) -> str:
    """The page of a version, or of the newest one of a checkpoint."""
    place = model_path(model_id, "checkpoints", format_checkpoint(checkpoint))
    return place if number is None else f"{place}/versions/{number}"


def query(request: Request, **changes: object) -> str:
    """The page's own address with another query; None takes a parameter out."""
    parameters = {name: value for name, value in request.query_params.items() if name not in changes}
    parameters |= {name: str(value) for name, value in changes.items() if value is not None}
    return f"{request.url.path}?{urlencode(parameters)}" if parameters else request.url.path


# --- values


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits, as plain as the magnitude allows.

    >>> number(0.0523), number(12345.6), number(1.2e-7), number(None), number(-0.5), number(0.0)
    ('0.0523', '12,346', '1.20e−7', '–', '−0.500', '0')
    """
    if value is None or not math.isfinite(value):
        return _NOTHING
    if value == 0:
        return "0"
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    exponent = int(power)  # of the rounded value: 99.96 has three digits before the point
    plainly = -4 <= exponent <= 6
    text = f"{value:,.{max(0, digits - 1 - exponent)}f}" if plainly else f"{mantissa}e{exponent}"
    return text.replace("-", "−")


def exponential(value: float) -> float:
    """e^value, at most about the largest float64."""
    return math.exp(min(value, 709.0))


def signed(value: float | None) -> str:
    """
    >>> signed(36), signed(-0.01234), signed(0)
    ('+36', '−0.0123', '0')
    """
    text = f"{value:,}".replace("-", "−") if isinstance(value, int) else number(value)
    return f"+{text}" if value is not None and value > 0 else text


def count(value: int | None) -> str:
    """
    >>> count(950), count(12_345), count(7_000_000_000)
    ('950', '12,345', '7.00 B')
    """
    if value is None:
        return _NOTHING
    if value < 1_000_000:
        return f"{value:,}"
    mantissa, _, power = f"{value:.2e}".partition("e")  # of the rounded value: 999,600,000 is 1.00 B
    unit = min(int(power) // 3, 4)
    shift = int(power) - 3 * unit
    return f"{float(mantissa) * 10**shift:,.{max(0, 2 - shift)}f} {' MBT'[unit - 1]}"


def percent(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.0%}"


def size(value: int) -> str:
    """
    >>> size(900), size(12_345), size(5 << 20)
    ('900 B', '12.1 KiB', '5.0 MiB')
    """
    scaled = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if scaled < 1024:
            return f"{scaled:.0f} {unit}" if unit == "B" else f"{scaled:.1f} {unit}"
        scaled /= 1024
    return f"{scaled:.1f} TiB"


def breakable(name: str) -> Markup:
    """A dotted name that may go on in the next line behind each of its parts.

    >>> breakable("layers.0.a<b")
    Markup('layers.<wbr>0.<wbr>a&lt;b')
    """
    return Markup("<wbr>").join(_PART_ENDS.split(name))


def plain(value: object) -> str:
    """Any JSON value in words.

    >>> plain({"bio": 2.77, "legal": {"documents": 3}}), plain(["a", "b"]), plain(1572864)
    ('bio 2.77, legal (documents 3)', 'a, b', '1,572,864')
    """
    match value:
        case dict():
            inner = {
                name: f"({plain(member)})" if isinstance(member, dict) else plain(member)
                for name, member in value.items()
            }
            return ", ".join(f"{name.replace('_', ' ')} {text}" for name, text in inner.items())
        case list() | tuple():
            return ", ".join(map(plain, value))
        case bool() | str():
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.6g}"
        case _:
            return str(value)


def day(value: date | datetime | None) -> str:
    """
    >>> day(datetime(2030, 1, 2, tzinfo=UTC))
    '2 Jan 2030'
    """
    return _NOTHING if value is None else f"{value.day} {value:%b %Y}"


def moment(value: datetime | None) -> str:
    return _NOTHING if value is None else f"{value.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def second(value: datetime | None) -> str:
    """
    >>> second(datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC))
    '2030-01-02 03:04:05 UTC'
    """
    return _NOTHING if value is None else f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def duration(value: timedelta) -> str:
    """
    >>> duration(timedelta(seconds=7.4)), duration(timedelta(seconds=754)), duration(timedelta(hours=30, minutes=5))
    ('7.4 s', '12 min 34 s', '30 h 5 min')
    """
    seconds = value.total_seconds()
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
