"""Sessions: what opens them, what ends them, and forms that come from elsewhere."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx2
import pytest
from fastapi.routing import APIRoute

from app.api.application import ROUTERS
from app.settings import Settings
from gradient_blueprints import Client
from gradient_blueprints.models import Scope
from tests.api.test_authorization import PATH_VALUES
from tests.api.test_leaderboard import report
from tests.conftest import Server, execute, serving
from tests.documents import blueprint_document
from tests.http_server import QuietHandler, serving_http
from tests.web.conftest import Visitor
from tests.web.plain import PlainBrowser


@pytest.fixture
def server(empty_registry: Server) -> Server:
    return empty_registry


@pytest.fixture
def operator(server: Server, plain: PlainBrowser) -> PlainBrowser:
    """Logged in as administrator."""
    assert plain.log_in(server.admin_key).status_code == 303
    return plain


def has_lab(admin: Client, name: str) -> bool:
    return any(lab.name == name for lab in admin.list_labs())


# --- in and out


def test_a_page_for_members_leads_to_the_login_and_back(server: Server, plain: PlainBrowser) -> None:
    sent_away = plain.get("/admin/audit?cursor=WzFd")
    assert sent_away.status_code == 303
    assert sent_away.headers["location"] == "/login?next=%2Fadmin%2Faudit%3Fcursor%3DWzFd"
    back = plain.submit(sent_away.headers["location"], "/login", key=server.admin_key)
    assert (back.status_code, back.headers["location"]) == (303, "/admin/audit?cursor=WzFd")
    audit = plain.get("/admin/audit")
    assert audit.status_code == 200
    assert audit.headers["cache-control"] == "no-store"  # or the browser shows it to whoever goes back after the logout
    assert plain.get("/login").headers["location"] == "/account"


def test_a_login_leads_to_no_other_site(server: Server, plain: PlainBrowser) -> None:
    for elsewhere in (
        "https://elsewhere.example/",
        "//elsewhere.example",
        "/\\elsewhere.example",
        "/\t/elsewhere",
        "x",
    ):
        page = httpx2.URL("/login", params={"next": elsewhere})
        assert plain.submit(str(page), "/login", key=server.admin_key).headers["location"] == "/"
        plain.cookies.clear()
        assert plain.submit("/login", "/login", key=server.admin_key, next=elsewhere).headers["location"] == "/"
        plain.cookies.clear()


def test_a_key_that_is_not_valid_opens_nothing_and_is_not_shown_again(plain: PlainBrowser) -> None:
    refused = plain.log_in("gbr_not-a-key")
    assert refused.status_code == 401
    assert "not known to the registry" in refused.text
    assert "gbr_not-a-key" not in refused.text
    assert "session" not in refused.headers.get("set-cookie", "")
    assert plain.get("/account").status_code == 303


def test_the_cookie_is_out_of_reach_of_scripts_and_of_other_sites(server: Server, plain: PlainBrowser) -> None:
    cookie = plain.log_in(server.admin_key).headers["set-cookie"]
    assert re.fullmatch(
        r"blueprints_session=[\w-]{43}; HttpOnly; Max-Age=43200; Path=/; SameSite=lax", cookie, re.IGNORECASE
    )


def test_over_https_the_cookie_never_travels_without_it(settings: Settings) -> None:
    behind_proxy = settings.model_copy(update={"trusted_proxies": "127.0.0.1"})
    with serving(behind_proxy) as server, PlainBrowser(server.url) as plain:
        plain.headers["X-Forwarded-Proto"] = "https"
        shown = plain.get("/login")
        form_cookie = shown.headers["set-cookie"]
        assert form_cookie.startswith("__Host-blueprints_form=")
        token = re.findall(r'name="form_token" value="(\w+)"', shown.text)[0]
        # The client sends Secure cookies over https alone, as it should; this one is carried by hand.
        answer = plain.post(
            "/login",
            data={"key": server.admin_key, "form_token": token},
            headers={"Cookie": form_cookie.partition(";")[0]},
        )
        assert answer.status_code == 303
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith("__Host-blueprints_session=")
        assert {"secure", "httponly", "path=/"} <= {part.strip().lower() for part in cookie.split(";")}


def test_logging_out_ends_the_session_in_the_registry_and_not_only_in_the_browser(
    server: Server, operator: PlainBrowser
) -> None:
    kept = operator.cookies["blueprints_session"]
    assert operator.submit("/account", "/logout").headers["location"] == "/"
    assert "blueprints_session" not in operator.cookies
    with PlainBrowser(server.url) as thief:
        thief.cookies["blueprints_session"] = kept
        assert thief.get("/account").status_code == 303


def test_a_session_ends_with_its_key_and_with_its_time(server: Server, plain: PlainBrowser, admin: Client) -> None:
    def log_in_anew() -> int:
        plain.cookies.clear()
        plain.log_in(server.key("lab-a", Scope.PROFILE))
        assert plain.get("/jobs").status_code == 200
        return max(key.id for key in admin.list_keys())

    admin.revoke_key(log_in_anew())
    assert plain.get("/jobs").status_code == 303
    execute(server.settings.database_url, f"UPDATE keys SET expires_at = now() WHERE id = {log_in_anew()}")
    assert plain.get("/jobs").status_code == 303
    log_in_anew()
    execute(server.settings.database_url, "UPDATE web_sessions SET expires_at = now()")
    assert plain.get("/jobs").status_code == 303


def test_other_browsers_of_a_key_can_be_logged_out_from_one_of_them(server: Server, operator: PlainBrowser) -> None:
    with PlainBrowser(server.url) as other:
        other.log_in(server.admin_key)
        assert other.get("/account").status_code == 200
        operator.submit("/account", "/account/end-other-sessions")
        assert other.get("/account").status_code == 303
        assert operator.get("/account").status_code == 200


def test_logging_in_again_leaves_no_earlier_session_behind(server: Server, operator: PlainBrowser) -> None:
    earlier = operator.cookies["blueprints_session"]
    operator.post("/login", data={"key": server.admin_key, "form_token": token_of(operator, "/account")})
    assert operator.cookies["blueprints_session"] != earlier
    operator.cookies.clear()
    operator.cookies["blueprints_session"] = earlier
    assert operator.get("/account").status_code == 303


def test_sessions_are_audited(operator: PlainBrowser, admin: Client) -> None:
    operator.submit("/account", "/logout")
    actions = [entry.action for entry in admin.list_audit()]
    assert actions[:2] == ["session.end", "session.begin"]


# --- what a session may do


def test_a_session_opens_nothing_of_the_api(operator: PlainBrowser) -> None:
    for path in ("/v1/whoami", "/v1/keys", "/v1/jobs", "/metrics"):
        assert operator.get(path).status_code == 401, path


def test_where_reads_are_closed_pages_need_a_session_with_the_scope_read(settings: Settings) -> None:
    with serving(settings.model_copy(update={"public_reads": False})) as server, PlainBrowser(server.url) as plain:
        assert plain.get("/").headers["location"] == "/login"
        plain.log_in(server.key("lab-a", Scope.PROFILE))
        for path in ("/", "/leaderboard", "/runs"):
            assert plain.get(path).status_code == 403, path
        plain.cookies.clear()
        plain.log_in(server.key("lab-a", Scope.READ))
        for path in ("/", "/leaderboard", "/runs"):
            assert plain.get(path).status_code == 200, path


def test_where_reads_are_closed_no_page_leads_a_session_to_the_api(settings: Settings) -> None:
    content = b"attached"
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    attachment = {"name": "notes.txt", "digest": digest, "size": len(content), "media_type": "text/plain"}
    for public in (True, False):
        with serving(settings.model_copy(update={"public_reads": public})) as server, PlainBrowser(server.url) as plain:
            key = server.key("lab-a")
            headers = {"Authorization": f"Bearer {key}"}
            with httpx2.Client(base_url=server.url, headers=headers) as http:
                http.put(f"/v1/blobs/{digest}", content=content).raise_for_status()
                http.post("/v1/blueprints", json=blueprint_document(attachments=[attachment])).raise_for_status()
                run = report(http, (1, 9.0), (4, 5.0))
            plain.log_in(key)
            for path in ("/models/tiny/checkpoints/0.8", f"/runs/{run}"):
                page = plain.get(path).raise_for_status().text.partition("<footer")[0]
                assert ('href="/v1/' in page) is public, path
            assert "notes.txt" in plain.get("/models/tiny/checkpoints/0.8").text


def test_pages_of_administrators_are_for_them_alone(server: Server, plain: PlainBrowser) -> None:
    plain.log_in(server.key("lab-a", Scope.READ, Scope.PUBLISH, Scope.PROFILE, Scope.WORK))
    for path in ("/admin/keys", "/admin/labs", "/admin/audit"):
        assert plain.get(path).status_code == 403
    assert "/admin/keys" not in plain.get("/account").text


# --- forms


def token_of(plain: PlainBrowser, page: str) -> str:
    return str(re.findall(r'name="form_token" value="(\w+)"', plain.get(page).text)[0])


def forms() -> list[str]:
    return sorted(
        re.sub(r":[a-z]+}", "}", route.path).format(**PATH_VALUES)
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute) and "POST" in (route.methods or ()) and not route.path.startswith("/v1/")
    )


def test_every_form_needs_its_token(operator: PlainBrowser) -> None:
    assert len(forms()) >= 6
    for path in forms():
        for token in ("", "0" * 64):
            answer = operator.post(path, data={"form_token": token, "name": "forged", "key": "x"})
            assert answer.status_code == 403, path
            assert "belongs to another session" in answer.text


def test_a_form_that_does_not_come_from_here_is_refused_even_with_its_token(
    operator: PlainBrowser, admin: Client
) -> None:
    fields = {"form_token": token_of(operator, "/admin/labs"), "name": "forged-by-origin"}
    own = {"Origin": operator.headers.pop("Origin")}
    origins: tuple[dict[str, str], ...] = (
        {},
        {"Origin": "null"},
        {"Origin": "https://elsewhere.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://["},  # no browser says so, and no server may stumble over it
        own | {"Sec-Fetch-Site": "cross-site"},
        own | {"Sec-Fetch-Site": "same-site"},
        own | {"Sec-Fetch-Site": "none"},
    )
    for origin in origins:
        assert operator.post("/admin/labs", data=fields, headers=origin).status_code == 403, origin
    assert not has_lab(admin, "forged-by-origin")
    assert operator.post("/admin/labs", data=fields, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 303
    assert has_lab(admin, "forged-by-origin")


def test_the_token_of_one_session_is_of_no_use_in_another(server: Server, operator: PlainBrowser) -> None:
    with PlainBrowser(server.url) as other:
        other.log_in(server.admin_key)
        stolen = token_of(other, "/admin/labs")
    answer = operator.post("/admin/labs", data={"form_token": stolen, "name": "forged"})
    assert answer.status_code == 403


@contextmanager
def hostile_page(target: str) -> Iterator[str]:
    """A site on another port of this host, to which a browser sends the same cookies."""
    page = (
        f'<form method="post" action="{target}/admin/labs"><input name="name" value="forged-by-site">'
        f'<input name="form_token" value="{"0" * 64}"></form><script>document.forms[0].submit()</script>'
    )

    class Page(QuietHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

    with serving_http(Page) as url:
        yield url


def test_a_hostile_site_cannot_send_a_form_in_the_name_of_who_is_logged_in(
    server: Server, admin: Client, open_visitor: Callable[..., Visitor]
) -> None:
    visitor = open_visitor(server.url)
    page = visitor.visit("/login")
    visitor.check()
    page.get_by_label("API key").fill(server.admin_key)
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("link", name="operator").wait_for()
    with hostile_page(server.url) as elsewhere:
        page.goto(elsewhere)
        page.get_by_text("from the pages of this registry alone").wait_for()
    assert page.url == f"{server.url}/admin/labs"
    assert not has_lab(admin, "forged-by-site")
