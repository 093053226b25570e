"""A real Chromium against a real server: pages that are accessible, quiet on the console and strict in their policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Request, Response, sync_playwright

from app.web.rendering import CONTENT_SECURITY_POLICY
from gradient_blueprints import Client
from gradient_blueprints.models import Publication
from tests.conftest import Server, fresh_database, make_settings, serving
from tests.web import browser as browsers
from tests.web.plain import PlainBrowser
from tests.web.seeding import seed

# As root Chromium refuses to start in its sandbox; the rest keeps it from looking for updates.
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="package")
def browser(template_database: str) -> Iterator[Browser]:
    """One for all tests of this package, and gone after them: Playwright's loop runs in this thread as long.

    So a test here is no coroutine, and what needs `asyncio.run` (such as the migrations behind `template_database`)
    comes before or happens in another thread.
    """
    executable = browsers.find()
    if executable is None:
        pytest.skip(browsers.MISSING)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=_FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="package")
def registry(postgres_url: str, template_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with what tests/web/seeding.py publishes, for all tests of the package: who publishes more, under names
    of its own."""
    with fresh_database(postgres_url, template_database) as url:
        settings = make_settings(url, tmp_path_factory.mktemp("registry"))
        with serving(settings) as server:
            seed(server, blocks=8)
            yield server


@pytest.fixture(scope="module")
def empty_registry(
    postgres_url: str, template_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server without any data, for the tests of one module."""
    with fresh_database(postgres_url, template_database) as url:
        settings = make_settings(url, tmp_path_factory.mktemp("empty_registry"))
        with serving(settings) as server:
            yield server


@pytest.fixture
def plain(server: Server) -> Iterator[PlainBrowser]:
    with PlainBrowser(server.url) as browser:
        yield browser


@pytest.fixture
def publish(registry: Server, tmp_path: Path) -> Callable[..., Publication]:
    """`publish("lab-a", document)`, into the registry that the package shares."""

    def publish_as(lab: str, document: dict[str, Any]) -> Publication:
        with Client(registry.url, api_key=_key(registry, lab), cache=tmp_path / lab) as client:
            return client.publish_blueprint(document)

    return publish_as


@cache
def _key(registry: Server, lab: str) -> str:
    return registry.key(lab)


@dataclass
class Visitor:
    """A page in the browser, and what went wrong in it.

    `visit` opens an address and `check` demands of the page that is shown: an answer with the policy, not a word on
    the console, nothing loaded from elsewhere, no violation found by axe (WCAG 2.2 AA and best practices).
    """

    page: Page
    url: str
    faults: list[str] = field(default_factory=list)
    answer: Response | None = None

    def visit(self, path: str) -> Page:
        self.answer = self.page.goto(self.url + path)
        return self.page

    def check(self) -> None:
        if self.answer is not None:
            assert self.answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert self.faults == []
        found = Axe().run(self.page)
        assert found.violations_count == 0, found.generate_report()

    def note_failure(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # the page was left before its pictures had come
            self.faults.append(f"failed: {request.url} {request.failure}")

    def overflow(self) -> int:
        """By how many CSS pixels the page is wider than its window."""
        width: int = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        return width


@pytest.fixture
def open_visitor(browser: Browser) -> Iterator[Callable[..., Visitor]]:
    """`open_visitor(url, dark=True, width=390, script=False)`: a browser window with cookies of its own."""
    contexts = []

    def start(url: str, *, width: int = 1280, dark: bool = False, script: bool = True) -> Visitor:
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            java_script_enabled=script,
        )
        contexts.append(context)
        context.set_default_timeout(10_000)
        visitor = Visitor(context.new_page(), url)
        page = visitor.page
        page.on("console", lambda message: visitor.faults.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: visitor.faults.append(f"error: {error}"))
        page.on("requestfailed", lambda request: visitor.note_failure(request))
        page.on(
            "request", lambda request: visitor.faults.append(request.url) if not request.url.startswith(url) else None
        )
        return visitor

    yield start
    for context in contexts:
        context.close()
