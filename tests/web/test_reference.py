"""The page of the HTTP API: the whole contract, without a script and from this server alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import unescape

import httpx2

from tests.conftest import Server
from tests.web.conftest import Visitor


def test_the_page_is_accessible_loads_nothing_from_elsewhere_and_opens_what_a_link_names(
    registry: Server, open_visitor: Callable[..., Visitor]
) -> None:
    visitor = open_visitor(registry.url, width=390, dark=True)
    page = visitor.visit("/docs")
    page.locator("summary", has_text="POST /v1/jobs").first.click()
    page.get_by_role("link", name="NewJob").first.click()
    assert page.locator("#schema-NewJob").is_visible()
    visitor.check()
    assert visitor.overflow() == 0


def test_every_operation_and_every_schema_is_on_the_page_and_every_link_leads_somewhere(registry: Server) -> None:
    document = httpx2.get(f"{registry.url}/v1/openapi.json").json()
    page = httpx2.get(f"{registry.url}/docs", headers={"Accept": "text/html"}).raise_for_status().text
    shown = {unescape(text) for text in re.findall(r"<summary><code><b>(\w+</b> [^<]+)</code>", page)}
    operations = {f"{method.upper()}</b> {path}" for path, methods in document["paths"].items() for method in methods}
    assert shown == operations
    assert len(shown) > 50
    anchors = set(re.findall(r'id="([^"]+)"', page))
    assert {f"schema-{name}" for name in document["components"]["schemas"]} <= anchors
    assert set(re.findall(r'href="#([^"]+)"', page)) <= anchors
    assert "<script" not in page
