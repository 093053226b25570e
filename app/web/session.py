"""Who looks at a page: the browser's session, and the proof that a form was sent by one of our own pages.

The cookie holds a token that only the row in `web_sessions` gives a meaning to; the API never reads it. A form is taken
when the browser says that it came from this origin and its hidden field fits the cookie (docs/decisions/0012).
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any
from urllib.parse import parse_qs, urlencode

from fastapi import Depends, Request, Response

from app.api.dependencies import CurrentSettings, Identified
from app.registry import web_sessions
from app.registry.callers import Caller
from app.settings import Settings
from gradient_blueprints.errors import InvalidRequest, PermissionDenied, Unauthenticated
from gradient_blueprints.models import Scope

_MOST_FIELDS = 100
_LOCAL_PATH = re.compile(r"/(?![/\\])[^\\\x00-\x20]*")


@dataclass(frozen=True)
class Visitor:
    """What a page knows of whom it is for."""

    cookie: str | None = None  # the session's token, or before the login a value that is for the form alone
    caller: Caller | None = None
    expires_at: datetime | None = None


async def identify(request: Request, settings: CurrentSettings, by_key: Identified) -> Visitor:
    """Read at every request, so that logging out and revoking the key take effect at once.

    A key in the header is taken too, as the API takes it: no browser sends one of its own accord.
    """
    visitor = Visitor(request.cookies.get(_cookie_name(request, "form")))
    token = request.cookies.get(_cookie_name(request, "session"))
    if by_key is not None:
        visitor = Visitor(caller=by_key)
    elif token is not None:
        visitor = await find_visitor(request, settings, token) or visitor
    request.state.viewer = visitor.caller
    request.state.form_token = form_token(visitor, settings)
    return visitor


async def find_visitor(request: Request, settings: Settings, token: str) -> Visitor | None:
    async with request.app.state.sessions() as session:
        try:
            found = await web_sessions.find(session, token, settings.secret, request_id=request.state.request_id)
        except Unauthenticated:
            return None
    return Visitor(token, found.caller, found.expires_at)


async def is_open(request: Request, settings: Settings, visitor: Visitor) -> bool:
    """Whether a session that a long answer began under has not ended since."""
    return visitor.cookie is None or await find_visitor(request, settings, visitor.cookie) is not None


Visiting = Annotated[Visitor, Depends(identify)]


async def check_viewer(visitor: Visiting, settings: CurrentSettings) -> Caller | None:
    """Reading is public by default; where it is closed it needs a session with the scope read."""
    if settings.public_reads:
        return visitor.caller
    return _member(visitor, Scope.READ)


def requires(*scopes: Scope) -> Callable[..., Coroutine[Any, Any, Caller]]:
    """A dependency that answers the caller, who is logged in with one of `scopes`, or with any key without them."""

    async def check(visitor: Visiting) -> Caller:
        return _member(visitor, *scopes)

    return check


def _member(visitor: Visitor, *scopes: Scope) -> Caller:
    if visitor.caller is None:
        raise Unauthenticated("Log in with a key to see this page.")  # app.web.errors sends browsers to the login
    if scopes:
        visitor.caller.require(*scopes)
    return visitor.caller


Viewer = Annotated[Caller | None, Depends(check_viewer)]
Member = Annotated[Caller, Depends(requires())]
Submitter = Annotated[Caller, Depends(requires(Scope.PROFILE))]
Administrator = Annotated[Caller, Depends(requires(Scope.ADMIN))]


# --- forms

Fields = Mapping[str, list[str]]


def form_token(visitor: Visitor, settings: Settings) -> str:
    """The hidden field of every form: what only a page that was rendered for this cookie can hold."""
    secret, cookie = settings.secret.get_secret_value(), visitor.cookie or ""
    return hmac.digest(secret.encode(), f"form {cookie}".encode(), "sha256").hex()


async def check_form(request: Request, visitor: Visiting, settings: CurrentSettings) -> Fields:
    """The fields of a form that one of our own pages has sent for this browser's session."""
    by_key = visitor.caller is not None and visitor.cookie is None
    if not by_key:
        _check_origin(request)
    try:
        fields = parse_qs((await request.body()).decode(), keep_blank_values=True, max_num_fields=_MOST_FIELDS)
    except ValueError:
        raise InvalidRequest("The form cannot be read.") from None
    sent = fields.pop("form_token", [""])[0]
    ours = visitor.cookie is not None and hmac.compare_digest(sent.encode(), form_token(visitor, settings).encode())
    if not (ours or by_key):
        raise PermissionDenied("This form belongs to another session. Go back, reload the page and send it again.")
    return fields


Form = Annotated[Fields, Depends(check_form)]


def _check_origin(request: Request) -> None:
    """Browsers say where a form came from, in headers that no page can forge; who says nothing is no browser.

    The host is compared and not the scheme, which a proxy that ends TLS may not pass on.
    """
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin", "")
    host = request.headers.get("host")
    if site is None and host and origin in (f"https://{host}", f"http://{host}"):
        return
    if site != "same-origin":
        raise PermissionDenied("Forms are taken from the pages of this registry alone.")


# --- cookies


def _cookie_name(request: Request, name: str) -> str:
    """`__Host-`: the browser refuses it unless it is Secure and this host's alone, so no other host can plant one."""
    return f"{'__Host-' if _secure(request) else ''}blueprints_{name}"


def _secure(request: Request) -> bool:
    return request.url.scheme == "https"


def _set_cookie(request: Request, response: Response, name: str, value: str, *, seconds: int | None) -> None:
    response.set_cookie(
        _cookie_name(request, name), value, max_age=seconds, httponly=True, samesite="lax", secure=_secure(request)
    )


def give_session(request: Request, response: Response, token: str, settings: Settings) -> None:
    _set_cookie(request, response, "session", token, seconds=int(settings.session_seconds))


def take_session(request: Request, response: Response) -> None:
    _set_cookie(request, response, "session", "", seconds=0)


def with_form_cookie(visitor: Visitor) -> Visitor:
    """A visitor whose forms can be told from those of others before there is a session."""
    return visitor if visitor.cookie is not None else Visitor(secrets.token_urlsafe(16))


def give_form_cookie(request: Request, response: Response, visitor: Visitor) -> None:
    if visitor.caller is None and visitor.cookie is not None:
        _set_cookie(request, response, "form", visitor.cookie, seconds=None)


# --- to the login and back


def local_path(wanted: str) -> str:
    """Where to go on after the login: a page of this registry and nothing else."""
    return wanted if _LOCAL_PATH.fullmatch(wanted) else "/"


def login_path(request: Request) -> str:
    """The login, and from there back to the page that was asked for."""
    wanted = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return "/login" if wanted == "/" else f"/login?{urlencode({'next': wanted})}"
