"""The link to the next page: in the body, and in the Link header (RFC 8288)."""

from __future__ import annotations

from typing import TypeVar
from urllib.parse import urlencode

from fastapi import Request, Response

from gradient_blueprints.models import Page

AnyPage = TypeVar("AnyPage", bound=Page)


def with_links(request: Request, response: Response, page: AnyPage) -> AnyPage:
    """The page with `next` turned from a cursor into a path and query that keeps the request's filters."""
    if page.next is None:
        return page
    query = [(name, value) for name, value in request.query_params.multi_items() if name != "cursor"]
    target = f"{request.url.path}?{urlencode([*query, ('cursor', page.next)])}"
    response.headers["Link"] = f'<{target}>; rel="next"'
    return page.model_copy(update={"next": target})
