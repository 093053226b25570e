"""Movable names: compare-and-set, history, ownership."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from tests.conftest import Server
from tests.documents import blueprint_document

STABLE = "/v1/models/tiny/aliases/stable"


@pytest.fixture
def two_versions(publisher: httpx2.Client) -> httpx2.Client:
    for norm in (1, 2):
        publisher.post("/v1/blueprints", json=blueprint_document(norm=norm))
    return publisher


def move(http: httpx2.Client, version: int, **headers: str) -> httpx2.Response:
    return http.put(STABLE, json={"training_checkpoint": 0.8, "version": version}, headers=headers)


def test_an_alias_moves_and_remembers(two_versions: httpx2.Client) -> None:
    first = move(two_versions, 1)
    assert (first.status_code, first.json()["revision"], first.headers["etag"]) == (200, 1, '"1"')
    assert move(two_versions, 2).json()["revision"] == 2
    assert move(two_versions, 2).json()["revision"] == 2, "where it is already nothing moves"
    assert two_versions.get(f"{STABLE}/blueprint").headers["blueprint-version"] == "2"
    moves = two_versions.get(f"{STABLE}/history").json()["moves"]
    assert [(item["revision"], item["version"], item["lab"]) for item in moves] == [(2, 2, "lab-a"), (1, 1, "lab-a")]


def test_a_move_from_another_revision_than_the_expected_is_refused(two_versions: httpx2.Client) -> None:
    move(two_versions, 1)
    stale = move(two_versions, 2, **{"If-Match": '"7"'})
    assert (stale.status_code, stale.json()["code"]) == (412, "precondition_failed")
    assert move(two_versions, 2, **{"If-Match": '"1"'}).json()["revision"] == 2
    assert move(two_versions, 1, **{"If-None-Match": "*"}).status_code == 412
    assert move(two_versions, 1, **{"If-Match": "1"}).status_code == 400


def test_of_many_moves_from_one_revision_one_wins(two_versions: httpx2.Client) -> None:
    move(two_versions, 1)
    with ThreadPoolExecutor(8) as pool:
        statuses = sorted(pool.map(lambda _: move(two_versions, 2, **{"If-Match": '"1"'}).status_code, range(8)))
    assert statuses == [200] + [412] * 7


def test_a_removed_alias_keeps_its_history_and_goes_on_counting(two_versions: httpx2.Client) -> None:
    move(two_versions, 1)
    assert two_versions.delete(STABLE).status_code == 204
    assert two_versions.get(STABLE).json()["code"] == "alias_not_found"
    assert two_versions.delete(STABLE).status_code == 404
    assert move(two_versions, 2).json()["revision"] == 3
    moves = two_versions.get(f"{STABLE}/history").json()["moves"]
    assert [(item["revision"], item.get("version")) for item in moves] == [(3, 2), (2, None), (1, 1)]


def test_an_alias_points_only_to_what_exists(two_versions: httpx2.Client) -> None:
    assert move(two_versions, 3).json()["code"] == "blueprint_not_found"
    answer = two_versions.put(STABLE, json={"training_checkpoint": 0.5, "version": 1})
    assert answer.json()["code"] == "checkpoint_not_found"
    assert (
        two_versions.put("/v1/models/none/aliases/a", json={"training_checkpoint": 1, "version": 1}).status_code == 404
    )


def test_only_the_owner_moves_and_each_lab_yanks_its_own(server: Server, two_versions: httpx2.Client) -> None:
    with httpx2.Client(base_url=server.url, headers={"Authorization": f"Bearer {server.key('lab-b')}"}) as other:
        other.post("/v1/blueprints", json=blueprint_document(norm=3))
        assert move(other, 3).status_code == 403
        yank = "/v1/models/tiny/checkpoints/0.8/versions"
        assert other.post(f"{yank}/1/yank", json={"reason": "not mine"}).status_code == 403
        assert two_versions.post(f"{yank}/3/yank", json={"reason": "not mine"}).status_code == 403
        assert other.post(f"{yank}/3/yank", json={"reason": "mine"}).status_code == 200
    assert move(two_versions, 3).status_code == 200, "the owner may point to another lab's version"
