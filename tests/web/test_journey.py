"""One way through all pages, as a lab, an adapter and an operator take it: each page is looked at by axe on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from gradient_blueprints import Blueprint, Client
from gradient_blueprints.models import Scope
from tests.conftest import Server
from tests.jobs.conftest import submit
from tests.web.conftest import Visitor
from tests.web.seeding import MODEL, profile


def test_from_publishing_to_the_audit(
    server: Server,
    make_client: Callable[..., Client],
    open_visitor: Callable[..., Visitor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lab = make_client("northwind", Scope.PUBLISH, Scope.PROFILE, Scope.READ)
    lab.publish_blueprint(profile(0.4, 6, seed=1))
    published = lab.publish_blueprint(profile(0.8, 6, seed=2))
    make_client("blue-harbour", Scope.PUBLISH).publish_blueprint({**profile(0.8, 6, seed=3), "model_id": "other"})
    job = submit(lab, model_id=MODEL)

    visitor = open_visitor(server.url)
    page = visitor.page

    def arrive(title: str) -> None:
        """At a page of that title, by a click; nothing may be wrong with it."""
        expect(page).to_have_title(f"{title} · Gradient blueprints")
        visitor.check()

    # The adapter finds the model, opens the blueprint and fetches it with the line that the page gives.
    visitor.visit("/")
    arrive("Models")
    page.get_by_role("searchbox").fill("atlas")
    page.get_by_role("button", name="Search").click()
    expect(page.get_by_role("rowheader")).to_have_text([MODEL])
    page.get_by_role("link", name=MODEL).click()
    arrive(MODEL)
    page.get_by_role("link", name="version 1").last.click()
    arrive(f"{MODEL} at 0.8, version 1")
    monkeypatch.setenv("BLUEPRINTS_CACHE", str(tmp_path / "adapter"))
    said: dict[str, Any] = {}
    exec(page.get_by_label("Python to fetch this blueprint").inner_text(), said)
    fetched = said["blueprint"]
    assert isinstance(fetched, Blueprint)
    assert fetched.digest == published.digest
    said["client"].close()

    by_norm = sorted(fetched.layers, key=lambda layer: layer.gradient_norm)
    page.get_by_role("link", name="Gradient norm").click()
    expect(page.locator("#layers tbody th").first).to_have_text(by_norm[0].id)
    visitor.check()

    page.get_by_role("link", name=MODEL).first.click()
    page.get_by_role("link", name="compare 0.4 with 0.8").click()
    arrive(f"Compare 0.4@1 with 0.8@1 of {MODEL}")
    page.get_by_label("Pages").get_by_role("link", name="Leaderboard").click()
    arrive("Leaderboard")
    page.get_by_label("Pages").get_by_role("link", name="Runs").click()
    arrive("Runs")

    # The operator logs in, makes a key that works, cancels the job and reads all of it in the audit.
    page.get_by_role("link", name="Log in").click()
    arrive("Log in")
    page.get_by_label("API key").fill(server.admin_key)
    page.keyboard.press("Enter")
    expect(page.get_by_role("link", name="operator")).to_be_visible()
    page.get_by_role("link", name="Administration").click()
    arrive("Keys")
    page.get_by_label("Lab", exact=True).fill("northwind")
    page.get_by_role("button", name="Make the key").click()
    visitor.check()
    with Client(server.url, api_key=page.locator("#secret").inner_text(), cache=tmp_path / "new") as client:
        assert client.whoami().lab == "northwind"
    page.get_by_role("link", name="Labs").click()
    arrive("Labs")
    page.get_by_role("link", name="Jobs").click()
    arrive("Jobs")
    page.get_by_role("link", name=f"{MODEL} at 0.8").click()
    arrive(f"Job of {MODEL}")
    page.get_by_role("button", name="Cancel the job").click()
    expect(page.locator("#progress > .state")).to_contain_text("cancelled")
    visitor.check()
    page.get_by_role("link", name="Administration").click()
    page.get_by_role("link", name="Audit").click()
    arrive("Audit")
    latest = page.get_by_role("rowheader").all_inner_texts()[:4]
    assert latest == ["job.cancel", "key.create", "session.begin", "job.submit"]
    expect(page.get_by_role("row").filter(has_text="job.cancel")).to_contain_text(job.id)

    page.get_by_role("link", name="operator").click()
    arrive("operator")
    page.get_by_role("button", name="Log out").click()
    arrive("Models")
    expect(page.get_by_role("link", name="Log in")).to_be_visible()
    page.go_back()
    page.go_back()
    arrive("Log in")  # and not the audit again, out of the browser's memory
