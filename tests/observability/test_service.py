"""One job through all processes: its ids in every log, one trace, metrics of each process, and no secret anywhere."""

from __future__ import annotations

import re
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.registry.keys import generate_secret
from gradient_blueprints.models import Job, JobState, Scope
from tests.conftest import execute
from tests.documents import blueprint_document
from tests.observability.conftest import Service, Span
from tests.worker.conftest import wait_until

CALLERS_TRACE, CALLERS_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACE_PARENT = f"00-{CALLERS_TRACE}-{CALLERS_SPAN}-01"


@pytest.fixture(scope="module")
def job(service: Service, sources: Any) -> Job:
    """A job that has succeeded; it was submitted by the request `the-submission`, within a trace of its caller."""
    key = service.key("lab-a", Scope.PROFILE, Scope.READ)
    with service.client(key) as lab:
        new = {
            "model_id": "tiny",
            "training_checkpoint": 0.8,
            "source": str(sources / "tiny"),
            "data": {"general": {"source": str(sources / "general.txt")}},
            "options": {"batches": 1, "batch_size": 2, "sequence_length": 16},
        }
        headers = {
            "Authorization": f"Bearer {key}",
            "X-Request-Id": "the-submission",
            "traceparent": TRACE_PARENT,
        }
        submitted = httpx2.post(f"{service.url}/v1/jobs", json=new, headers=headers).raise_for_status().json()
        ended = lab.wait_for_job(submitted["id"], 120)
    assert ended.state is JobState.SUCCEEDED, ended.reason
    return ended


def about(lines: list[dict[str, Any]], job: Job) -> list[dict[str, Any]]:
    return [line for line in lines if line.get("job_id") == job.id]


def test_every_process_logs_the_job_with_the_id_of_the_request_that_submitted_it(service: Service, job: Job) -> None:
    (submission,) = [line for line in service.logs("api") if line["message"] == "POST /v1/jobs: 202"]
    assert (submission["request_id"], submission["job_id"]) == ("the-submission", job.id)
    assert (submission["lab"], submission["status"], submission["route"]) == ("lab-a", 202, "/v1/jobs")
    assert 0 < submission["seconds"] < 60

    (announced,) = about(service.logs("relay"), job)
    assert announced["request_id"] == "the-submission"

    worked = wait_until(lambda: about(service.logs("worker"), job), what="the worker has written its lines")
    assert {line["request_id"] for line in worked} == {"the-submission"}
    subprocess = [line for line in worked if line["logger"] == "worker.profile"]
    assert [line["message"] for line in subprocess] == ["working on part 0 with device auto"]
    assert subprocess[0]["process"] != service.running["worker"].pid
    assert any("published version 1" in line["message"] for line in worked)

    calls = {line["route"] for line in about(service.logs("api"), job) if "route" in line}
    assert {"/v1/jobs/{job_id}/claim", "/v1/jobs/{job_id}/result"} <= calls


def test_one_trace_leads_from_the_caller_through_api_and_relay_to_the_worker(service: Service, job: Job) -> None:
    def trace() -> dict[str, Span]:
        return {span.span_id: span for span in service.receiver.spans if span.trace_id == CALLERS_TRACE}

    def worker_is_done() -> Span | None:
        return next((span for span in trace().values() if span.name == "work on job"), None)

    worked = wait_until(worker_is_done, what="the worker's spans have arrived")
    spans = trace()
    announced = spans[worked.parent_id]
    submitted = spans[announced.parent_id]
    assert (worked.service, worked.attributes) == ("gradient-blueprints-worker", {"blueprints.job_id": job.id})
    assert (announced.service, announced.name) == ("gradient-blueprints-relay", "announce job")
    assert (submitted.service, submitted.name) == ("gradient-blueprints-api", "POST /v1/jobs")
    assert submitted.parent_id == CALLERS_SPAN
    assert submitted.attributes["http.response.status_code"] == 202
    assert submitted.attributes["blueprints.request_id"] == "the-submission"

    (profile,) = [span for span in spans.values() if span.name == "profile"]
    assert profile.parent_id == worked.span_id
    phases = {span.name for span in spans.values() if span.parent_id == profile.span_id}
    assert {"checking sources", "loading the model", "profiling"} <= phases

    def calls_of_the_worker() -> bool:
        names = {span.name for span in trace().values() if span.service == "gradient-blueprints-api"}
        return {"POST /v1/jobs/{job_id}/claim", "POST /v1/jobs/{job_id}/result"} <= names

    wait_until(calls_of_the_worker, what="the API's spans have arrived")  # each process sends its own, in batches
    traced = {line.get("trace_id") for line in about(service.logs("worker"), job)}
    assert traced == {CALLERS_TRACE}


def test_answers_from_memory_and_heads_have_spans_with_their_route_and_request(service: Service, job: Job) -> None:
    path, trace = "/v1/models/tiny/checkpoints/0.8/blueprint", "c0ffee" + "0" * 25 + "1"
    wait_until(lambda: httpx2.get(service.url + path).status_code == 200, what="the blueprint is published")
    for method, request in (("GET", "first"), ("GET", "second"), ("HEAD", "third")):
        headers = {"traceparent": f"00-{trace}-{CALLERS_SPAN}-01", "X-Request-Id": request}
        httpx2.request(method, service.url + path, headers=headers).raise_for_status()

    def arrived() -> list[Span] | None:
        spans = [span for span in service.receiver.spans if span.trace_id == trace and span.parent_id == CALLERS_SPAN]
        return spans if len(spans) == 3 else None

    spans = wait_until(arrived, what="the three spans have arrived")
    route = "/v1/models/{model_id:model}/checkpoints/{checkpoint}/blueprint"
    named = {span.attributes["blueprints.request_id"]: (span.name, span.attributes["http.route"]) for span in spans}
    assert named == {
        "first": (f"GET {route}", route),
        "second": (f"GET {route}", route),
        "third": (f"HEAD {route}", route),
    }


def scrape(address: str, key: str | None = None) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    text = httpx2.get(f"{address}/metrics", headers=headers).raise_for_status().text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_each_process_tells_prometheus_what_it_did(service: Service, job: Job) -> None:
    api = scrape(service.url, service.admin_key)
    assert api["blueprints_publications_total", frozenset({("source", "worker"), ("created", "yes")})] == 1
    assert api["blueprints_outbox_messages", frozenset()] == 0
    assert api["blueprints_outbox_age_seconds", frozenset()] == 0
    relay = scrape(f"http://{service.relay_metrics}")
    assert relay["blueprints_relay_messages_total", frozenset()] >= 1
    assert relay["blueprints_lease_losses_total", frozenset()] == 0

    def worker_is_idle() -> bool:
        return scrape(f"http://{service.worker_metrics}")["blueprints_worker_busy", frozenset()] == 0

    wait_until(worker_is_idle)
    worker = scrape(f"http://{service.worker_metrics}")
    assert worker["blueprints_worker_attempts_total", frozenset({("outcome", "succeeded")})] == 1
    assert not any(name == "blueprints_worker_device_memory_bytes" for name, _ in worker)


def test_a_running_job_shows_the_memory_that_it_takes(service: Service, job: Job, sources: Any) -> None:
    with service.client(service.key("lab-b", Scope.PROFILE, Scope.READ)) as lab:
        data = {"general": sources / "general.txt"}
        running = lab.submit_checkpoint(
            "tiny", 0.9, source=sources / "tiny", data=data, batches=3_000, batch_size=2, sequence_length=16
        )

        def memory() -> float | None:
            taken = ("blueprints_worker_device_memory_bytes", frozenset({("device", "cpu")}))
            return scrape(f"http://{service.worker_metrics}").get(taken)

        assert wait_until(memory, what="the worker tells the memory of the job") > 1 << 20
        lab.cancel_job(running.id)
        assert lab.wait_for_job(running.id, 60).state is JobState.CANCELLED


def test_no_secret_is_ever_logged(service: Service, job: Job, sources: Any) -> None:
    """Everything that goes wrong with a secret at hand: all processes log it, and none of them the secret."""
    mistyped, unknown, pasted = (generate_secret() for _ in range(3))
    service.secrets |= {"a mistyped key": mistyped, "an unknown key": unknown, "a pasted key": pasted}
    key = service.key("lab-c", *Scope)
    mine = {"Authorization": f"Bearer {key}"}
    with service.client(key) as lab, httpx2.Client(base_url=service.url) as http:
        refused = [
            http.get("/v1/whoami", headers={"Authorization": f"Bearer {mistyped[:-1]}"}),
            http.get("/v1/whoami", headers={"Authorization": f"Bearer {unknown}"}),
            http.get("/v1/whoami", headers={"Authorization": unknown}),
            http.get("/v1/whoami", params={"key": pasted, "api_key": key}),
            http.get(f"/v1/models/{pasted}"),
            http.get(f"/v1/{pasted}/nothing"),
            http.post("/v1/blueprints", headers=mine, json=blueprint_document() | {"api_key": pasted}),
            http.post("/v1/blueprints", headers=mine, content=pasted.encode()),
            http.post("/v1/jobs", headers=mine | {"Idempotency-Key": pasted}, json={"source": pasted}),
            http.get("/login", params={"next": f"/?key={pasted}"}, headers={"Cookie": f"session={pasted}"}),
            http.post("/login", data={"key": unknown}, headers={"Origin": service.url}),
        ]
        assert [answer.status_code for answer in refused if answer.status_code >= 500] == []
        hub = lab.submit_checkpoint("tiny", 0.7, source="hf://org/name@main", data={"g": sources / "general.txt"})
        local = lab.submit_checkpoint("tiny", 0.7, source=f"/{pasted}", data={"g": sources / "general.txt"})
        assert {lab.wait_for_job(failed.id, 60).state for failed in (hub, local)} == {JobState.FAILED}

        service.broker.stop()
        ended = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{service.role}'"
        execute(service.owner_url, f"ALTER ROLE {service.role} NOLOGIN", ended)
        try:
            assert http.get("/readyz").status_code == 503
            assert http.get("/v1/whoami", headers=mine).status_code == 503
            wait_until(lambda: _said(service, "trying again"), what="the relay misses its database")
        finally:
            execute(service.owner_url, f"ALTER ROLE {service.role} LOGIN")
        wait_until(lambda: http.get("/readyz").status_code == 200, what="the API is ready again")
        service.broker.start()
        wait_until(lambda: _said(service, "working again"), what="the relay works again")

    logged = service.everything_logged()
    assert [what for what, secret in service.secrets.items() if secret in logged] == []
    assert not re.search(r"gbr_[A-Za-z0-9_-]{9}", logged)
    assert "Bearer" not in logged
    assert "whoami" in logged  # what was done with them was logged


def _said(service: Service, text: str) -> bool:
    return any(text in line["message"] for line in service.logs("relay"))
