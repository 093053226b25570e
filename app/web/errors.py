"""Errors as pages for browsers: the same problem that a program is answered, in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from inspect import isawaitable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse

from app.web.rendering import render
from app.web.session import login_path
from gradient_blueprints.errors import PROBLEM_MEDIA_TYPE, Unauthenticated

_KEPT = ("retry-after", "allow", "connection", "x-request-id")


def install(app: FastAPI) -> None:
    """After app.api.problems: wraps its handlers."""
    for kind, handler in list(app.exception_handlers.items()):
        app.exception_handlers[kind] = _in_words(handler)


def wants_page(request: Request) -> bool:
    """Whether a browser asks: what lies under /v1 speaks JSON to everyone."""
    return "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/v1/")


def _in_words(handler: Callable[[Request, Any], Any]) -> Callable[[Request, Any], Any]:
    async def answer(request: Request, error: Any) -> Response:
        answered: Response = await given if isawaitable(given := handler(request, error)) else given
        if answered.headers.get("content-type") != PROBLEM_MEDIA_TYPE or not wants_page(request):
            return answered
        is_page = hasattr(request.state, "viewer")  # app.web.session looked for one; elsewhere a login would not help
        if answered.status_code == Unauthenticated.status and is_page and request.method in ("GET", "HEAD"):
            return RedirectResponse(login_path(request), 303)
        problem = json.loads(bytes(answered.body))
        headers = {name: answered.headers[name] for name in _KEPT if name in answered.headers}
        return render(request, "error.html", status=answered.status_code, headers=headers, problem=problem)

    return answer
