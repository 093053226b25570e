"""The pages of administrators: keys, labs and the audit."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime, time
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

from app.api.dependencies import CurrentSettings, Cursor, Session
from app.registry import audit, keys, labs
from app.registry.paging import MAX_LIMIT
from app.web.rendering import render
from app.web.session import Administrator, Fields, Form, local_path
from gradient_blueprints import models
from gradient_blueprints.errors import ApiError, InvalidRequest
from gradient_blueprints.models import Scope

router = APIRouter(include_in_schema=False)
_ROWS_ON_A_PAGE = 50
_MEANINGS = {
    Scope.READ: "where reading is closed",
    Scope.PUBLISH: "blueprints, aliases, attachments and runs of its lab",
    Scope.PROFILE: "submit and cancel jobs, upload checkpoints",
    Scope.WORK: "for workers: claim jobs and report results",
    Scope.ADMIN: "everything, for every lab",
}
LAB_RULE = "A lab's name has at most 64 lower-case letters, digits, dots, dashes and underscores, no dash or dot first."
_KEY_FAULTS = {
    "lab": LAB_RULE,
    "scopes": "Choose at least one scope.",
    "name": "A key's name has at most 100 characters, on one line.",
}


# --- keys


@router.get("/admin/keys")
async def keys_page(request: Request, session: Session, caller: Administrator, cursor: Cursor = None) -> Response:
    return await _keys_page(request, session, cursor)


async def _keys_page(
    request: Request,
    session: AsyncSession,
    cursor: str | None = None,
    *,
    status: int = 200,
    given: Mapping[str, Any] | None = None,
    issued: models.IssuedKey | None = None,
    refusal: str | None = None,
) -> Response:
    page = await keys.list_keys(session, limit=_ROWS_ON_A_PAGE, cursor=cursor)
    some_labs = await labs.list_labs(session, limit=MAX_LIMIT, cursor=None)
    return render(
        request,
        "admin_keys.html",
        status=status,
        page=page,
        first=cursor is None,
        labs=some_labs.labs,
        scopes=_MEANINGS,
        given=given or {"lab": "", "name": "", "expires": "", "scopes": [Scope.READ]},
        issued=issued,
        refusal=refusal,
        now=datetime.now(UTC),
    )


@router.post("/admin/keys")
async def make_key(
    request: Request, session: Session, settings: CurrentSettings, caller: Administrator, form: Form
) -> Response:
    """The page with the new key's secret, which nothing else shows."""
    given = {name: _one(form, name) for name in ("lab", "name", "expires")}
    wanted = {**given, "scopes": form.get("scope", [])}
    try:
        new = models.NewKey.model_validate(
            {
                "lab": given["lab"],
                "name": given["name"],
                "scopes": wanted["scopes"],
                "expires_at": _end_of_day(given["expires"]),
            }
        )
        issued = await keys.create_key(session, caller, new, settings.secret)
    except (ApiError, ValidationError) as refused:
        return await _keys_page(request, session, status=422, given=wanted, refusal=_in_words(refused, _KEY_FAULTS))
    return await _keys_page(request, session, status=201, issued=issued)


@router.post("/admin/keys/{key_id}/revoke")
async def revoke_key(
    session: Session, caller: Administrator, form: Form, key_id: Annotated[int, Path(ge=1, le=2**63 - 1)]
) -> Response:
    await keys.revoke_key(session, caller, key_id)
    return RedirectResponse(local_path(_one(form, "back") or "/admin/keys"), 303)


# --- labs


@router.get("/admin/labs")
async def labs_page(request: Request, session: Session, caller: Administrator, cursor: Cursor = None) -> Response:
    page = await labs.list_labs(session, limit=_ROWS_ON_A_PAGE, cursor=cursor)
    return render(request, "admin_labs.html", page=page, first=cursor is None, given="", refusal=None)


@router.post("/admin/labs")
async def create_lab(request: Request, session: Session, caller: Administrator, form: Form) -> Response:
    name = _one(form, "name")
    try:
        await labs.create_lab(session, caller, models.NewLab(name=name))
    except (ApiError, ValidationError) as refused:
        page = await labs.list_labs(session, limit=_ROWS_ON_A_PAGE, cursor=None)
        words = _in_words(refused, {"name": LAB_RULE})
        return render(request, "admin_labs.html", status=422, page=page, first=True, given=name, refusal=words)
    return RedirectResponse("/admin/labs", 303)


# --- the audit


@router.get("/admin/audit")
async def audit_page(request: Request, session: Session, caller: Administrator, cursor: Cursor = None) -> Response:
    page = await audit.list_entries(session, limit=_ROWS_ON_A_PAGE, cursor=cursor)
    return render(request, "admin_audit.html", page=page, first=cursor is None)


# --- what was typed


def _one(form: Fields, name: str) -> str:
    return form.get(name, [""])[0].strip()


def _end_of_day(text: str) -> datetime | None:
    """The last moment of a day in UTC."""
    if not text:
        return None
    try:
        return datetime.combine(date.fromisoformat(text), time.max, UTC)
    except ValueError:
        raise InvalidRequest(f"{text!r} is no date, such as 2027-01-31.") from None


def _in_words(refused: ApiError | ValidationError, rules: Mapping[str, str]) -> str:
    """What to type instead: our own errors say it themselves, of pydantic's only the field is told."""
    if isinstance(refused, ApiError):
        return refused.detail
    return " ".join(sorted({rules[str(fault["loc"][0])] for fault in refused.errors()}))
