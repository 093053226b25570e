"""The pages of administrators: labs, keys that are shown once, revoking them, and the audit."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from playwright.sync_api import Page, expect

from gradient_blueprints import Client
from gradient_blueprints.errors import Unauthenticated
from gradient_blueprints.models import Scope
from tests.conftest import Server, execute
from tests.web.conftest import Visitor
from tests.web.plain import PlainBrowser, hidden_fields


@pytest.fixture
def server(empty_registry: Server) -> Server:
    return empty_registry


@pytest.fixture
def operator(server: Server) -> Iterator[PlainBrowser]:
    with PlainBrowser(server.url) as browser:
        browser.log_in(server.admin_key)
        yield browser


def log_in(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Log in").click()


def test_a_lab_and_its_key_are_made_used_and_revoked(server: Server, open_visitor: Callable[..., Visitor]) -> None:
    visitor = open_visitor(server.url, width=390, dark=True)
    page = visitor.visit("/account")
    visitor.check()
    log_in(page, server.admin_key)
    page.get_by_role("button", name="Log out").wait_for()
    visitor.check()
    assert visitor.overflow() == 0
    visitor.visit("/admin/labs")
    visitor.check()
    page.get_by_label("Name of a new lab").fill("lab-a")
    page.get_by_role("button", name="Create the lab").click()
    page.get_by_role("rowheader", name="lab-a").wait_for()
    assert visitor.overflow() == 0

    page.get_by_role("link", name="Keys").click()
    page.get_by_label("Lab", exact=True).fill("lab-a")
    page.get_by_label("Name, for people").fill("nightly")
    page.get_by_label("publish").check()
    page.get_by_role("button", name="Make the key").click()
    secret = page.locator("#secret").inner_text()
    visitor.check()
    assert visitor.overflow() == 0
    with Client(server.url, api_key=secret) as client:
        assert set(client.whoami().scopes) == {Scope.READ, Scope.PUBLISH}

        page.get_by_role("link", name="Keys").click()
        expect(page.get_by_text(secret)).to_have_count(0)
        row = page.get_by_role("row").filter(has_text="nightly")
        row.get_by_text("Revoke").first.click()
        visitor.check()
        row.get_by_role("button", name="Revoke for ever").click()
        row.get_by_text("revoked").wait_for()
        with pytest.raises(Unauthenticated, match="revoked"):
            client.whoami()
    page.get_by_role("link", name="Audit").click()
    page.get_by_role("rowheader", name="key.revoke").wait_for()
    visitor.check()
    assert visitor.overflow() == 0


def test_what_cannot_be_made_is_said_in_words_and_what_was_typed_stays(operator: PlainBrowser, admin: Client) -> None:
    admin.create_lab("lab-b")
    before = len(list(admin.list_keys()))
    good: dict[str, str | list[str]] = {"lab": "lab-b", "name": "<b>nightly", "expires": "", "scope": ["read"]}
    changes: tuple[tuple[dict[str, str | list[str]], str], ...] = (
        ({"lab": "nobody"}, "There is no lab &#39;nobody&#39;"),
        ({"lab": "No Lab"}, "A lab&#39;s name has"),
        ({"scope": []}, "Choose at least one scope"),
        ({"scope": ["everything"]}, "Choose at least one scope"),
        ({"expires": "tomorrow"}, "is no date"),
        ({"expires": "2020-01-01"}, "lies in the past"),
        ({"name": "x" * 101}, "at most 100 characters"),
    )
    for change, words in changes:
        answer = operator.submit("/admin/keys", "/admin/keys", **(good | change))
        assert answer.status_code == 422, change
        assert words in answer.text
        if "name" not in change:
            assert "&lt;b&gt;nightly" in answer.text
    assert len(list(admin.list_keys())) == before
    for name, words in (("lab-b", "There is a lab lab-b already"), ("No Lab", "A lab&#39;s name has")):
        answer = operator.submit("/admin/labs", "/admin/labs", name=name)
        assert answer.status_code == 422
        assert words in answer.text


def test_a_key_is_valid_to_the_end_of_its_last_day(operator: PlainBrowser, admin: Client) -> None:
    tomorrow = datetime.now(UTC).date() + timedelta(days=1)
    made = operator.submit("/admin/keys", "/admin/keys", lab="operator", name="", expires=str(tomorrow), scope="read")
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    expires_at = max(admin.list_keys(), key=lambda key: key.id).expires_at
    assert expires_at is not None
    assert expires_at.date() == tomorrow
    assert (expires_at + timedelta(seconds=1)).date() == tomorrow + timedelta(days=1)


def test_a_sessions_own_key_cannot_be_revoked_in_it(operator: PlainBrowser, admin: Client) -> None:
    (own,) = (key for key in admin.list_keys() if key.prefix == admin.whoami().key_prefix)
    page = operator.get("/admin/keys").text
    assert f"/admin/keys/{own.id}/revoke" not in page
    admin.create_key("operator", [Scope.READ])
    other = max(key.id for key in admin.list_keys())
    path = f"/admin/keys/{other}/revoke"
    assert operator.submit("/admin/keys", path).headers["location"] == "/admin/keys"
    token = hidden_fields(operator.get("/admin/labs").text)
    assert operator.post(f"/admin/keys/{own.id}/revoke", data=token).status_code == 403
    assert operator.get("/account").status_code == 200


def test_the_audit_goes_on_page_by_page_to_its_first_entry(server: Server, operator: PlainBrowser) -> None:
    execute(
        server.settings.database_url,
        "INSERT INTO audit (action, subject, details) "
        "SELECT 'test.entry', 'entry <' || number || '>', '{}' FROM generate_series(1, 120) number",
    )
    seen: list[str] = []
    path: str | None = "/admin/audit"
    while path is not None:
        page = operator.get(path).raise_for_status().text
        seen += re.findall(r"entry &lt;(\d+)&gt;", page)
        following = re.search(r'<a rel="next" href="([^"]+)"', page)
        path = html.unescape(following[1]) if following else None
    assert seen == [str(number) for number in range(120, 0, -1)]
