"""What every page has: a policy, a way past the navigation, room on a phone, errors in words."""

from __future__ import annotations

from collections.abc import Callable

import httpx2
import pytest

from app.web.rendering import CONTENT_SECURITY_POLICY
from tests.conftest import Server
from tests.web.conftest import Visitor
from tests.web.seeding import MODEL

OPEN_PAGES = {
    "models": "/",
    "model": f"/models/{MODEL}",
    "blueprint": f"/models/{MODEL}/checkpoints/0.8",
    "small": "/models/northwind/atlas-7b/checkpoints/0.8",
    "comparison": f"/models/{MODEL}/compare?base=0.2&other=0.8",
    "form": f"/models/{MODEL}/compare",
    "consensus": f"/models/{MODEL}/checkpoints/0.8/consensus",
}


@pytest.mark.parametrize("page", OPEN_PAGES)
def test_every_page_is_accessible_quiet_and_fits_a_wide_window(
    registry: Server, open_visitor: Callable[..., Visitor], page: str
) -> None:
    visitor = open_visitor(registry.url)
    visitor.visit(OPEN_PAGES[page])
    visitor.check()
    assert visitor.overflow() == 0


@pytest.mark.parametrize("page", ["models", "model", "blueprint", "comparison", "consensus"])
def test_every_page_is_accessible_and_fits_a_phone_in_the_dark(
    registry: Server, open_visitor: Callable[..., Visitor], page: str
) -> None:
    visitor = open_visitor(registry.url, dark=True, width=390)
    shown = visitor.visit(OPEN_PAGES[page])
    visitor.check()
    assert visitor.overflow() == 0
    background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(20, 24, 28)"


def test_pictures_are_drawn_for_the_width_of_the_window(registry: Server, open_visitor: Callable[..., Visitor]) -> None:
    def drawn(width: int) -> list[tuple[str, bool]]:
        page = open_visitor(registry.url, width=width).visit(OPEN_PAGES["blueprint"])
        pictures = page.locator("figure img")
        for number in range(pictures.count()):
            pictures.nth(number).scroll_into_view_if_needed()
        page.wait_for_function("[...document.images].every(image => image.complete)")
        found: list[tuple[str, bool]] = pictures.evaluate_all(
            "images => images.map(image => [image.currentSrc.split('/').pop(), image.naturalWidth > 0])"
        )
        return [(name, there) for name, there in found]

    names = ["norms.svg", "heatmap.svg", "retained-mass.svg"]
    assert drawn(1280) == [(name, True) for name in names]
    assert drawn(390) == [(f"{name}?narrow=true", True) for name in names]


def test_the_keyboard_skips_the_navigation(registry: Server, open_visitor: Callable[..., Visitor]) -> None:
    page = open_visitor(registry.url).visit("/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "q"


# --- errors


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/models/nothing", 404, "There is no model"),
        ("/nowhere", 404, "There is nothing at /nowhere"),
        (f"/models/{MODEL}/checkpoints/0.9", 404, "it has 0.2, 0.4, 0.6, 0.8, 1"),
        (f"/models/{MODEL}/checkpoints/nine", 422, "is not a training checkpoint"),
        (f"/models/{MODEL}/compare?base=x&other=0.8", 422, "should match pattern"),
    ],
)
def test_an_error_is_a_page_for_a_browser_and_a_problem_for_a_program(
    registry: Server, path: str, status: int, says: str
) -> None:
    with httpx2.Client(base_url=registry.url) as http:
        page = http.get(path, headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
        problem = http.get(path)
    assert (page.status_code, problem.status_code) == (status, status)
    assert page.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert "<h1>" in page.text
    assert says in page.text
    assert problem.headers["content-type"] == "application/problem+json"
    assert says in problem.text


def test_the_api_speaks_json_to_a_browser_too(registry: Server) -> None:
    answer = httpx2.get(f"{registry.url}/v1/models/nothing", headers={"Accept": "text/html"})
    assert answer.json()["code"] == "model_not_found"


def test_an_error_page_is_accessible(registry: Server, open_visitor: Callable[..., Visitor]) -> None:
    visitor = open_visitor(registry.url)
    visitor.visit("/models/nothing")
    (said,) = visitor.faults  # Chromium tells of the status on its console
    assert "404" in said
    visitor.faults.clear()
    visitor.check()


# --- files


def test_a_stylesheet_is_cached_for_ever_under_the_address_of_its_bytes(registry: Server) -> None:
    with httpx2.Client(base_url=registry.url) as http:
        address = next(part for part in http.get("/").text.split('"') if part.endswith("/site.css"))
        current, older = http.get(address), http.get("/static/000000000000/site.css")
        assert http.get("/static/000000000000/secrets").status_code == 404
    assert current.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert current.headers["content-type"] == "text/css; charset=utf-8"
    assert older.headers["cache-control"] == "no-cache"
    assert older.content == current.content
