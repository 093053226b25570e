"""Logging in with a key and out again, and what the session may do."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse

from app.api.dependencies import CurrentSettings, Session
from app.registry import keys, web_sessions
from app.settings import Settings
from app.web.rendering import render
from app.web.session import (
    Form,
    Member,
    Visiting,
    Visitor,
    form_token,
    give_form_cookie,
    give_session,
    local_path,
    take_session,
    with_form_cookie,
)
from gradient_blueprints.errors import Unauthenticated

router = APIRouter(include_in_schema=False)


@router.get("/login")
async def login_page(
    request: Request,
    settings: CurrentSettings,
    visitor: Visiting,
    wanted: Annotated[str, Query(alias="next", max_length=2_000)] = "/",
) -> Response:
    if visitor.caller is not None:
        return RedirectResponse("/account", 303)
    return _login_page(request, settings, with_form_cookie(visitor), local_path(wanted))


def _login_page(
    request: Request, settings: Settings, visitor: Visitor, wanted: str, refusal: str | None = None
) -> Response:
    request.state.form_token = form_token(visitor, settings)
    page = render(request, "login.html", status=401 if refusal else 200, wanted=wanted, refusal=refusal)
    give_form_cookie(request, page, visitor)
    return page


@router.post("/login")
async def log_in(
    request: Request, session: Session, settings: CurrentSettings, visitor: Visiting, form: Form
) -> Response:
    """A session that can do what the key can; one that the browser had before ends."""
    wanted = local_path(form.get("next", ["/"])[0])
    try:
        caller = await keys.authenticate(
            session, form.get("key", [""])[0].strip(), settings.secret, request_id=request.state.request_id
        )
    except Unauthenticated as refused:
        return _login_page(request, settings, visitor, wanted, refused.detail)
    if visitor.caller is not None and visitor.cookie is not None:
        await web_sessions.end(session, visitor.caller, visitor.cookie, settings.secret)
    token = await web_sessions.begin(session, caller, settings.secret, seconds=settings.session_seconds)
    await keys.mark_used(session, caller.key_id)
    answer = RedirectResponse(wanted, 303)
    give_session(request, answer, token, settings)
    return answer


@router.post("/logout")
async def log_out(
    request: Request, session: Session, settings: CurrentSettings, visitor: Visiting, caller: Member, form: Form
) -> Response:
    if visitor.cookie is not None:
        await web_sessions.end(session, caller, visitor.cookie, settings.secret)
    answer = RedirectResponse("/", 303)
    take_session(request, answer)
    return answer


@router.get("/account")
async def account_page(request: Request, session: Session, visitor: Visiting, caller: Member) -> Response:
    browsers = await web_sessions.count(session, caller)
    return render(request, "account.html", caller=caller, ends=visitor.expires_at, browsers=browsers)


@router.post("/account/end-other-sessions")
async def end_other_sessions(
    session: Session, settings: CurrentSettings, visitor: Visiting, caller: Member, form: Form
) -> Response:
    await web_sessions.end_others(session, caller, visitor.cookie or "", settings.secret)
    return RedirectResponse("/account", 303)
