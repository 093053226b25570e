"""The pages of jobs: who sees which, progress as it happens, the same without script, and cancelling."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from gradient_blueprints import Client
from gradient_blueprints.models import JobOutcome, JobState, Progress, Scope
from tests.conftest import Server
from tests.jobs.conftest import blueprint, submit
from tests.web.conftest import Visitor
from tests.web.plain import PlainBrowser, hidden_fields


@pytest.fixture
def server(empty_registry: Server) -> Server:
    return empty_registry


@pytest.fixture
def lab(make_client: Callable[..., Client]) -> Client:
    return make_client("lab-a", Scope.PROFILE, Scope.READ)


@pytest.fixture
def worker(make_client: Callable[..., Client]) -> Client:
    return make_client("workers", Scope.WORK)


def log_in(visitor: Visitor, key: str) -> None:
    page = visitor.visit("/login")
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Log in").click()


def test_a_job_is_followed_to_its_blueprint_without_loading_the_page_again(
    server: Server, open_visitor: Callable[..., Visitor], lab: Client, worker: Client
) -> None:
    job = submit(lab, model_id="followed", shards=2)
    visitor = open_visitor(server.url)
    log_in(visitor, server.key("lab-a", Scope.READ))
    visitor.page.get_by_role("link", name="Jobs").click()
    expect(visitor.page).to_have_title("Jobs · Gradient blueprints")
    visitor.check()
    visitor.page.get_by_role("link", name="followed at 0.8").click()
    page = visitor.page
    page.get_by_text("This page follows the job").wait_for()
    page.evaluate("window.loadedOnce = true")
    visitor.check()
    assert page.get_by_role("button", name="Cancel the job").count() == 0  # not with the scope read alone

    token = worker.claim_job(job.id).lease_token
    worker.heartbeat_job(job.id, token, Progress(phase="profiling", done=3, total=8))
    expect(page.get_by_role("progressbar", name="Progress of part 0")).to_have_attribute("value", "3")
    expect(page.locator("#told")).to_have_text("The job is running.")
    visitor.check()
    hostile = "no such file <img src=x onerror=alert(1)>"
    worker.end_job(job.id, JobOutcome(lease_token=token, state=JobState.FAILED, reason=hostile))
    expect(page.locator("#progress > .note")).to_contain_text(hostile)
    expect(page.locator("#live img")).to_have_count(0)
    expect(page.locator("#liveness")).to_be_hidden()
    visitor.check()
    assert page.evaluate("window.loadedOnce") is True


def test_a_page_without_script_shows_how_it_was_and_loads_again(
    server: Server, open_visitor: Callable[..., Visitor], lab: Client, worker: Client
) -> None:
    job = submit(lab)
    visitor = open_visitor(server.url, script=False, width=390)
    log_in(visitor, server.key("lab-a", Scope.READ))
    page = visitor.visit(f"/jobs/{job.id}")
    expect(page.locator("#progress > .state")).to_contain_text("queued")
    worker.finish_job(job.id, worker.claim_job(job.id).lease_token, blueprint())
    page.get_by_role("link", name="Load it again").click()
    expect(page.locator("#progress > .state")).to_contain_text("succeeded")
    expect(page.get_by_role("link", name="version 1 of tiny at 0.8")).to_be_visible()
    assert visitor.overflow() == 0


def test_a_job_is_cancelled_by_a_button(server: Server, open_visitor: Callable[..., Visitor], lab: Client) -> None:
    job = submit(lab)
    visitor = open_visitor(server.url, width=390, dark=True)
    log_in(visitor, server.key("lab-a", Scope.PROFILE))
    for path in ("/jobs", f"/jobs/{job.id}"):
        page = visitor.visit(path)
        visitor.check()
        assert visitor.overflow() == 0
    page.get_by_role("button", name="Cancel the job").click()
    expect(page.locator("#progress > .state")).to_contain_text("cancelled")
    expect(page.get_by_role("button", name="Cancel the job")).to_have_count(0)
    assert lab.get_job(job.id).state is JobState.CANCELLED


def test_cancelling_what_has_just_ended_shows_how_it_ended(server: Server, lab: Client, worker: Client) -> None:
    job = submit(lab)
    with PlainBrowser(server.url) as plain:
        plain.log_in(server.key("lab-a", Scope.PROFILE))
        shown = plain.get(f"/jobs/{job.id}").text
        worker.finish_job(job.id, worker.claim_job(job.id).lease_token, blueprint())
        answer = plain.post(f"/jobs/{job.id}/cancel", data=hidden_fields(shown))
        assert (answer.status_code, answer.headers["location"]) == (303, f"/jobs/{job.id}")
    assert lab.get_job(job.id).state is JobState.SUCCEEDED


def test_each_lab_sees_its_own_jobs_and_an_administrator_all(
    server: Server, lab: Client, make_client: Callable[..., Client]
) -> None:
    ours, theirs = submit(lab), submit(make_client("lab-b", Scope.PROFILE), model_id="other")
    with PlainBrowser(server.url) as plain:
        plain.log_in(server.key("lab-a", Scope.PROFILE))
        assert "other at 0.8" not in plain.get("/jobs").text
        for path in (f"/jobs/{theirs.id}", f"/jobs/{theirs.id}/events"):
            with plain.stream("GET", path) as answer:
                assert answer.status_code == 404
        assert (
            plain.post(f"/jobs/{theirs.id}/cancel", data=hidden_fields(plain.get("/account").text)).status_code == 404
        )
    with PlainBrowser(server.url) as plain:
        plain.log_in(server.admin_key)
        listed = plain.get("/jobs").text
        assert ours.id in listed
        assert theirs.id in listed
        assert theirs.id not in plain.get("/jobs?state=cancelled").text
        plain.submit(f"/jobs/{theirs.id}", f"/jobs/{theirs.id}/cancel")
        assert theirs.id in plain.get("/jobs?state=cancelled").text


def test_a_stream_tells_nothing_more_once_its_session_has_ended(server: Server, lab: Client, worker: Client) -> None:
    job = submit(lab)
    with PlainBrowser(server.url) as plain, PlainBrowser(server.url) as same:
        plain.log_in(server.key("lab-a", Scope.READ))
        same.cookies["blueprints_session"] = plain.cookies["blueprints_session"]
        with plain.stream("GET", f"/jobs/{job.id}/events") as stream:
            lines = stream.iter_lines()
            while not next(lines).startswith("id:"):
                pass
            same.submit("/account", "/logout")
            worker.claim_job(job.id)
            assert not any("running" in line for line in lines)
