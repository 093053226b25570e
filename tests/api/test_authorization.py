"""Deny by default: every route without a key, with a useless one, and with each scope."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
from fastapi.routing import APIRoute

from app.api.application import ROUTERS
from app.registry.keys import generate_secret
from app.settings import Settings
from gradient_blueprints.models import Scope
from tests.conftest import Server, serving

# Without this table a new route fails the walk until somebody decided who may call it.
OPEN = {
    "GET /livez",
    "GET /readyz",
    "GET /v1/schemas/blueprint-1.json",
    "GET /static/{tag}/{name}",
    "GET /docs",
    "GET /login",
    "POST /login",
}
READ = {
    "GET /",
    "GET /models/{model_id}",
    "GET /models/{model_id}/compare",
    "GET /models/{model_id}/checkpoints/{checkpoint}",
    "GET /models/{model_id}/checkpoints/{checkpoint}/consensus",
    "GET /models/{model_id}/checkpoints/{checkpoint}/versions/{version}",
    "GET /blueprints/{digest}",
    "GET /blueprints/{digest}/{form}",
    "GET /blueprints/{digest}/pictures/{picture}",
    "GET /pictures/comparison.svg",
    "GET /pictures/consensus.svg",
    "GET /pictures/evidence.svg",
    "GET /v1/models",
    "GET /v1/models/{model_id}",
    "GET /v1/models/{model_id}/checkpoints",
    "GET /v1/models/{model_id}/checkpoints/{checkpoint}/blueprint",
    "GET /v1/models/{model_id}/checkpoints/{checkpoint}/versions",
    "GET /v1/models/{model_id}/aliases",
    "GET /v1/models/{model_id}/aliases/{name}",
    "GET /v1/models/{model_id}/aliases/{name}/history",
    "GET /v1/models/{model_id}/aliases/{name}/blueprint",
    "GET /v1/models/{model_id}/compare",
    "GET /v1/blueprints/{digest}",
    "GET /v1/blobs/{digest}",
    "HEAD /v1/blobs/{digest}",
    "POST /v1/aggregate",
    "POST /v1/models/{model_id}/checkpoints/{checkpoint}/staleness",
    "POST /v1/models/{model_id}/checkpoints/{checkpoint}/selection",
    "GET /v1/models/{model_id}/checkpoints/{checkpoint}/evidence",
    "GET /v1/models/{model_id}/evidence",
    "GET /v1/runs",
    "GET /v1/runs/{run_id}",
    "GET /v1/runs/{run_id}/points",
    "GET /v1/runs/{run_id}/model-card",
    "GET /v1/leaderboard",
    "GET /leaderboard",
    "GET /leaderboard/plots/{number}.svg",
    "GET /runs",
    "GET /runs/{run_id}",
    "GET /runs/{run_id}/curve.svg",
}
NEEDS: dict[str, set[Scope]] = {
    "POST /v1/blueprints": {Scope.PUBLISH},
    "POST /v1/models/{model_id}/checkpoints/{checkpoint}/versions/{version}/yank": {Scope.PUBLISH},
    "POST /v1/models/{model_id}/checkpoints/{checkpoint}/versions/{version}/unyank": {Scope.PUBLISH},
    "PUT /v1/models/{model_id}/aliases/{name}": {Scope.PUBLISH},
    "DELETE /v1/models/{model_id}/aliases/{name}": {Scope.PUBLISH},
    "POST /v1/runs": {Scope.PUBLISH},
    "POST /v1/runs/{run_id}/points": {Scope.PUBLISH},
    "POST /v1/runs/{run_id}/finish": {Scope.PUBLISH},
    "PUT /v1/blobs/{digest}": {Scope.PUBLISH, Scope.WORK},
    "GET /v1/models/{model_id}/checkpoints/{checkpoint}/files": {Scope.PUBLISH, Scope.PROFILE, Scope.WORK},
    "GET /v1/models/{model_id}/checkpoints/{checkpoint}/files/{path}": {Scope.PUBLISH, Scope.PROFILE, Scope.WORK},
    "HEAD /v1/models/{model_id}/checkpoints/{checkpoint}/files/{path}": {Scope.PUBLISH, Scope.PROFILE, Scope.WORK},
    "PUT /v1/models/{model_id}/checkpoints/{checkpoint}/files/{path}": {Scope.PUBLISH, Scope.PROFILE},
    "DELETE /v1/models/{model_id}/checkpoints/{checkpoint}/files/{path}": {Scope.PUBLISH, Scope.PROFILE},
    "GET /v1/whoami": set(Scope),
    "GET /metrics": {Scope.READ, Scope.ADMIN},
    "POST /v1/labs": {Scope.ADMIN},
    "GET /v1/labs": {Scope.ADMIN},
    "POST /v1/keys": {Scope.ADMIN},
    "GET /v1/keys": {Scope.ADMIN},
    "POST /v1/keys/{key_id}/revoke": {Scope.ADMIN},
    "GET /v1/audit": {Scope.ADMIN},
    "POST /v1/webhooks": {Scope.PUBLISH, Scope.PROFILE},
    "GET /v1/webhooks": {Scope.PUBLISH, Scope.PROFILE},
    "DELETE /v1/webhooks/{webhook_id}": {Scope.PUBLISH, Scope.PROFILE},
    "POST /v1/webhooks/{webhook_id}/test": {Scope.PUBLISH, Scope.PROFILE},
    "GET /v1/webhooks/{webhook_id}/deliveries": {Scope.PUBLISH, Scope.PROFILE},
    "POST /v1/models/{model_id}/checkpoints/{checkpoint}/refresh": {Scope.PROFILE},
    "POST /v1/jobs": {Scope.PROFILE},
    "GET /v1/jobs": set(Scope),
    "GET /v1/jobs/{job_id}": set(Scope),
    "GET /v1/jobs/{job_id}/events": set(Scope),
    "POST /v1/jobs/{job_id}/cancel": {Scope.PROFILE},
    "POST /v1/jobs/{job_id}/claim": {Scope.WORK},
    "POST /v1/jobs/{job_id}/heartbeat": {Scope.WORK},
    "POST /v1/jobs/{job_id}/result": {Scope.WORK},
    "POST /v1/jobs/{job_id}/outcome": {Scope.WORK},
    "PUT /v1/jobs/{job_id}/shards/{shard}/state": {Scope.WORK},
    "GET /v1/jobs/{job_id}/shards/{shard}/state": {Scope.WORK},
    "POST /logout": set(Scope),
    "GET /account": set(Scope),
    "POST /account/end-other-sessions": set(Scope),
    "GET /admin/keys": {Scope.ADMIN},
    "POST /admin/keys": {Scope.ADMIN},
    "POST /admin/keys/{key_id}/revoke": {Scope.ADMIN},
    "GET /admin/labs": {Scope.ADMIN},
    "POST /admin/labs": {Scope.ADMIN},
    "GET /admin/audit": {Scope.ADMIN},
    "GET /jobs": set(Scope),
    "GET /jobs/{job_id}": set(Scope),
    "GET /jobs/{job_id}/events": set(Scope),
    "POST /jobs/{job_id}/cancel": {Scope.PROFILE},
}
PATH_VALUES = {
    "model_id": "tiny",
    "checkpoint": "0.8",
    "version": "1",
    "number": "0",
    "name": "stable",
    "digest": "sha256:" + "0" * 64,
    "key_id": "999999",
    "shard": "0",
    "tag": "0",
    "form": "json",
    "picture": "norms.svg",
    "path": "config.json",
    "job_id": "00000000-0000-7000-8000-000000000000",
    "run_id": "00000000-0000-7000-8000-000000000000",
    "webhook_id": "00000000-0000-7000-8000-000000000000",
}


def _routes() -> list[str]:
    return sorted(
        f"{method} {re.sub(r':[a-z]+}', '}', route.path)}"
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    )


def _call(http: httpx2.Client, route: str, key: str | None) -> httpx2.Response:
    method, path = route.split(" ")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return http.request(method, path.format(**PATH_VALUES), headers=headers)


def test_every_route_has_its_place_in_the_tables() -> None:
    assert set(_routes()) == OPEN | READ | set(NEEDS)


def test_only_reading_needs_no_key(http: httpx2.Client) -> None:
    refused = {route for route in _routes() if _call(http, route, None).status_code == 401}
    assert refused == set(NEEDS)


def test_where_reads_are_closed_only_health_needs_no_key(settings: Settings) -> None:
    with (
        serving(settings.model_copy(update={"public_reads": False})) as server,
        httpx2.Client(base_url=server.url) as http,
    ):
        refused = {route for route in _routes() if _call(http, route, None).status_code == 401}
        assert refused == READ | set(NEEDS)
        key = server.key("lab-a", Scope.PROFILE)
        assert {route for route in READ if _call(http, route, key).status_code == 403} == READ
        key = server.key("lab-a", Scope.READ)
        assert {route for route in READ if _call(http, route, key).status_code == 403} == set()


@pytest.mark.parametrize("scope", list(Scope))
def test_each_scope_opens_its_own_routes_and_no_others(server: Server, http: httpx2.Client, scope: Scope) -> None:
    key = server.key("lab-a", scope)
    allowed = {route for route, scopes in NEEDS.items() if scope in scopes or scope is Scope.ADMIN}
    answers = {route: _call(http, route, key) for route in _routes()}
    assert {route for route, answer in answers.items() if answer.status_code == 403} == set(NEEDS) - allowed
    assert {route for route, answer in answers.items() if answer.status_code >= 500} == set()
    refusal = next((answer for answer in answers.values() if answer.status_code == 403), None)
    if refusal is not None:
        assert refusal.json()["code"] == "permission_denied"
        assert f"has {scope}" in refusal.json()["detail"]


UNKNOWN_KEY = "gbr_" + "A" * 43 + "_000000"


@pytest.mark.parametrize("authorization", ["Bearer", "Bearer nonsense", "Basic dTpw", f"Bearer {UNKNOWN_KEY}", "x"])
def test_a_key_that_is_not_known_is_refused_even_for_public_reads(http: httpx2.Client, authorization: str) -> None:
    answer = http.get("/v1/models", headers={"Authorization": authorization})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["code"] == "unauthenticated"


def test_a_revoked_key_is_refused_at_once(server: Server, http: httpx2.Client) -> None:
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    http.post("/v1/labs", json={"name": "lab-a"}, headers=headers)
    issued = http.post("/v1/keys", json={"lab": "lab-a", "scopes": ["publish"]}, headers=headers).json()
    theirs = {"Authorization": f"Bearer {issued['secret']}"}
    assert http.get("/v1/whoami", headers=theirs).json() == {
        "lab": "lab-a",
        "scopes": ["publish"],
        "key_prefix": issued["prefix"],
    }
    revoked = http.post(f"/v1/keys/{issued['id']}/revoke", headers=headers)
    assert revoked.json()["revoked_at"]
    refused = http.get("/v1/whoami", headers=theirs)
    assert refused.status_code == 401
    assert "revoked" in refused.json()["detail"]
    again = http.post(f"/v1/keys/{issued['id']}/revoke", headers=headers)
    assert again.json()["revoked_at"] == revoked.json()["revoked_at"]


def test_an_admin_key_cannot_revoke_itself(server: Server, http: httpx2.Client) -> None:
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    mine = http.get("/v1/keys", headers=headers).json()["keys"][0]
    assert http.post(f"/v1/keys/{mine['id']}/revoke", headers=headers).status_code == 403
    assert http.get("/v1/whoami", headers=headers).status_code == 200


def test_an_expired_key_is_refused(server: Server, http: httpx2.Client, database_url: str) -> None:
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    http.post("/v1/labs", json={"name": "lab-a"}, headers=headers)
    soon = datetime.now(UTC) + timedelta(seconds=0.4)

    def ask(expires_at: str) -> httpx2.Response:
        wanted = {"lab": "lab-a", "scopes": ["read"], "expires_at": expires_at}
        return http.post("/v1/keys", json=wanted, headers=headers)

    key = ask(soon.isoformat()).json()["secret"]
    while datetime.now(UTC) < soon:
        pass
    refused = http.get("/v1/whoami", headers={"Authorization": f"Bearer {key}"})
    assert refused.status_code == 401
    assert "expired" in refused.json()["detail"]
    assert ask("2020-01-01T00:00:00Z").status_code == 422
    assert ask("9999-12-31T23:59:59-12:00").status_code == 422
    assert ask("2999-01-01T00:00:00").json()["errors"][0]["pointer"] == "/expires_at"


def test_a_secret_is_shown_once_and_stored_only_as_a_hash(server: Server, http: httpx2.Client) -> None:
    secret = server.key("lab-a")
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    listed = http.get("/v1/keys", headers=headers)
    assert secret not in listed.text
    assert secret.startswith(listed.json()["keys"][-1]["prefix"])
    assert secret not in http.get("/v1/audit", headers=headers).text


def test_the_use_of_a_key_is_seen(server: Server, http: httpx2.Client) -> None:
    key = server.key("lab-a")
    headers = {"Authorization": f"Bearer {server.admin_key}"}

    def last_use() -> Any:
        return http.get("/v1/keys", headers=headers).json()["keys"][-1].get("last_used_at")

    assert last_use() is None
    http.get("/v1/whoami", headers={"Authorization": f"Bearer {key}"})
    assert last_use() is not None


def test_another_bootstrap_key_replaces_the_first(settings: Settings) -> None:
    with serving(settings) as first:
        pass
    changed = settings.model_copy(update={"admin_key": type(settings.secret)(generate_secret())})
    with serving(changed) as second, httpx2.Client(base_url=second.url) as http:
        assert http.get("/v1/whoami", headers={"Authorization": f"Bearer {first.admin_key}"}).status_code == 401
        assert http.get("/v1/whoami", headers={"Authorization": f"Bearer {second.admin_key}"}).status_code == 200
    with serving(settings) as back, httpx2.Client(base_url=back.url) as http:
        assert http.get("/v1/whoami", headers={"Authorization": f"Bearer {first.admin_key}"}).status_code == 200


def test_a_bootstrap_key_that_was_revoked_stays_so_after_a_restart(settings: Settings) -> None:
    with serving(settings) as first, httpx2.Client(base_url=first.url) as http:
        other = {"Authorization": f"Bearer {first.key('operator', Scope.ADMIN)}"}
        bootstrap = http.get("/v1/keys", headers=other).json()["keys"][0]
        assert http.post(f"/v1/keys/{bootstrap['id']}/revoke", headers=other).status_code == 200
    with serving(settings) as again, httpx2.Client(base_url=again.url) as http:
        assert http.get("/v1/whoami", headers={"Authorization": f"Bearer {again.admin_key}"}).status_code == 401


def test_every_write_leaves_an_audit_row(server: Server, publisher: httpx2.Client) -> None:
    document = {"model_id": "tiny", "training_checkpoint": 0.8, "layers": [{"id": "a", "gradient_norm": 1}]}
    publisher.post("/v1/blueprints", json=document, headers={"X-Request-Id": "the-publish"})
    publisher.post("/v1/models/tiny/checkpoints/0.8/versions/1/yank", json={"reason": "why not"})
    publisher.post("/v1/models/tiny/checkpoints/0.8/versions/1/unyank")
    publisher.put("/v1/models/tiny/aliases/stable", json={"training_checkpoint": 0.8, "version": 1})
    publisher.delete("/v1/models/tiny/aliases/stable")
    with httpx2.Client(base_url=server.url, headers={"Authorization": f"Bearer {server.admin_key}"}) as admin:
        entries = admin.get("/v1/audit").json()["entries"]
    actions = [entry["action"] for entry in reversed(entries)]
    assert actions == [
        "key.create",  # the bootstrap key
        "lab.create",
        "key.create",
        "model.create",
        "blueprint.publish",
        "version.yank",
        "version.unyank",
        "alias.move",
        "alias.delete",
    ]
    publish = entries[actions[::-1].index("blueprint.publish")]
    assert (publish["lab"], publish["subject"], publish["request_id"]) == ("lab-a", "tiny@0.8@1", "the-publish")
    assert publish["key_prefix"]
