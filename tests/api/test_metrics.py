"""What Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from gradient_blueprints import Client
from gradient_blueprints.models import Scope
from tests.conftest import Server
from tests.documents import blueprint_document

Sample = tuple[str, frozenset[tuple[str, str]]]


def scrape(server: Server) -> dict[Sample, float]:
    key = server.key("watcher", Scope.READ)
    text = httpx2.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {key}"}).raise_for_status().text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: dict[Sample, float], name: str, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)


def test_requests_are_counted_by_the_route_and_not_by_the_path(server: Server, http: httpx2.Client) -> None:
    for path in ("/v1/models/one", "/v1/models/two", "/nowhere/1", "/nowhere/2"):
        http.get(path)
    http.request("PROPFIND", "/livez")
    samples = scrape(server)
    name = "blueprints_http_requests_total"
    assert value(samples, name, method="GET", route="/v1/models/{model_id:model}", status="404") == 2
    assert value(samples, name, method="GET", route="unmatched", status="404") == 2
    assert {dict(labels)["method"] for got, labels in samples if got == name} == {"GET", "POST", "other"}
    paths = [dict(labels).get("route", "") for _, labels in samples]
    assert not any("one" in path or "nowhere" in path for path in paths)


def test_a_request_that_is_refused_before_its_route_is_counted(server: Server, publisher: httpx2.Client) -> None:
    too_large = b" " * (server.settings.max_document_bytes + 1)
    assert publisher.post("/v1/blueprints", content=too_large).status_code == 413
    samples = scrape(server)
    assert value(samples, "blueprints_http_requests_total", method="POST", route="unmatched", status="413") == 1


def test_hits_and_misses_of_the_document_cache_are_told_apart(server: Server, publisher: httpx2.Client) -> None:
    publisher.post("/v1/blueprints", json=blueprint_document())
    for _ in range(3):
        publisher.get("/v1/models/tiny/checkpoints/0.8/blueprint", headers={"Accept-Encoding": "identity"})
    samples = scrape(server)
    assert value(samples, "blueprints_document_cache_lookups_total", found="no") == 1
    assert value(samples, "blueprints_document_cache_lookups_total", found="yes") == 2


def test_jobs_are_counted_by_state_and_the_longest_wait_is_told(
    server: Server, make_client: Callable[..., Client]
) -> None:
    before = scrape(server)
    assert value(before, "blueprints_jobs", state="queued") == 0
    assert value(before, "blueprints_job_queue_age_seconds") == 0
    client = make_client("lab-a", Scope.PROFILE)
    client.submit_checkpoint("tiny", 0.8, source="/models/tiny", data={"general": "/data/general.txt"})
    after = scrape(server)
    assert value(after, "blueprints_jobs", state="queued") == 1
    assert value(after, "blueprints_job_queue_age_seconds") > 0
