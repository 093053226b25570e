"""Publishing and fetching over HTTP."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import zstandard

from gradient_blueprints.canonical import canonical_bytes, digest_of
from gradient_blueprints.models import Blueprint
from tests.conftest import Server
from tests.documents import PAPER_EXAMPLE, blueprint_document, paper_example

PAPER_PATH = "/v1/models/foundation-7b/checkpoints/0.8/blueprint"


def publish(http: httpx2.Client, document: object, **headers: str) -> httpx2.Response:
    return http.post("/v1/blueprints", json=document, headers=headers)


def test_the_papers_example_is_accepted_and_comes_back_with_equal_values(publisher: httpx2.Client) -> None:
    published = publish(publisher, PAPER_EXAMPLE)
    assert published.status_code == 201
    answer = published.json()
    assert (answer["version"], answer["created"], answer["lab"]) == (1, True, "lab-a")
    assert answer["digest"] == digest_of(canonical_bytes(PAPER_EXAMPLE))
    assert published.headers["location"] == f"/v1/blueprints/{answer['digest']}"

    fetched = publisher.get(PAPER_PATH)
    assert fetched.json() == PAPER_EXAMPLE
    assert fetched.headers["blueprint-version"] == "1"
    assert fetched.headers["blueprint-digest"] == answer["digest"] == digest_of(fetched.content)


def test_the_papers_example_survives_csv(publisher: httpx2.Client) -> None:
    publish(publisher, PAPER_EXAMPLE)
    table = publisher.get(PAPER_PATH, headers={"Accept": "text/csv"})
    assert table.headers["content-type"] == "text/csv; charset=utf-8"
    assert Blueprint.from_csv(table.text).to_dict() == PAPER_EXAMPLE

    again = publisher.post("/v1/blueprints", content=table.content, headers={"Content-Type": "text/csv"})
    assert again.status_code == 200, "the same document as a table is the same document"
    assert again.json()["created"] is False


def test_the_papers_example_is_answered_with_the_warning_that_its_gammas_contradict_its_formula(
    publisher: httpx2.Client,
) -> None:
    warnings = publish(publisher, PAPER_EXAMPLE).json()["warnings"]
    assert [(item["code"], item["pointer"]) for item in warnings] == [
        ("gamma_not_from_alpha", f"/layers/{index}/gamma") for index in range(3)
    ]
    assert json.loads(publisher.get(PAPER_PATH).headers["blueprint-warning"]) == warnings


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("alpha", 0.9, "alpha_outside_1_2"),
        ("k_star", 1.5, "k_star_above_one"),
        ("gradient_norm", 0, "no_positive_norm"),
    ],
)
def test_what_is_dubious_is_stored_as_sent_with_a_warning(
    publisher: httpx2.Client, field: str, value: float, code: str
) -> None:
    document = blueprint_document(layers=1)
    document["layers"][0][field] = value
    answer = publish(publisher, document).json()
    assert code in {item["code"] for item in answer["warnings"]}
    assert publisher.get(f"/v1/blueprints/{answer['digest']}").json()["layers"][0][field] == value


def test_key_order_and_number_spelling_do_not_change_the_digest(publisher: httpx2.Client) -> None:
    first = publish(publisher, PAPER_EXAMPLE).json()
    respelled = json.dumps(dict(reversed(PAPER_EXAMPLE.items()))).replace("0.8,", "8e-1,").replace("0.05,", "5.0E-2,")
    assert "8e-1" in respelled
    again = publisher.post("/v1/blueprints", content=respelled, headers={"Content-Type": "application/json"})
    assert again.status_code == 200
    assert again.json()["digest"] == first["digest"]


def test_the_same_bytes_again_answer_200_and_the_version_they_have(publisher: httpx2.Client) -> None:
    publish(publisher, blueprint_document(norm=1))
    publish(publisher, blueprint_document(norm=2))
    again = publish(publisher, blueprint_document(norm=1))
    assert again.status_code == 200
    assert (again.json()["version"], again.json()["created"]) == (1, False)


def test_fifty_simultaneous_publishes_get_versions_1_to_50(publisher: httpx2.Client) -> None:
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda n: publish(publisher, blueprint_document(norm=n)), range(1, 51)))
    assert Counter(answer.status_code for answer in answers) == {201: 50}
    assert sorted(answer.json()["version"] for answer in answers) == list(range(1, 51))


def test_the_same_document_from_20_clients_at_once_gives_one_version(publisher: httpx2.Client) -> None:
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: publish(publisher, PAPER_EXAMPLE), range(20)))
    assert Counter(answer.status_code for answer in answers) == {201: 1, 200: 19}
    assert {answer.json()["version"] for answer in answers} == {1}
    versions = publisher.get("/v1/models/foundation-7b/checkpoints/0.8/versions").json()["versions"]
    assert len(versions) == 1


def test_a_yanked_number_is_not_reissued(publisher: httpx2.Client) -> None:
    publish(publisher, blueprint_document(norm=1))
    publisher.post("/v1/models/tiny/checkpoints/0.8/versions/1/yank", json={"reason": "wrong data"})
    assert publish(publisher, blueprint_document(norm=2)).json()["version"] == 2


def test_a_repeated_request_with_its_idempotency_key_gets_the_first_answer(publisher: httpx2.Client) -> None:
    first = publish(publisher, PAPER_EXAMPLE, **{"Idempotency-Key": "once"})
    again = publish(publisher, PAPER_EXAMPLE, **{"Idempotency-Key": "once"})
    assert (again.status_code, again.json()) == (first.status_code, first.json())

    other = publish(publisher, blueprint_document(), **{"Idempotency-Key": "once"})
    assert other.status_code == 409
    assert other.json()["code"] == "idempotency_conflict"
    assert publisher.get("/v1/models/tiny").status_code == 404, "the refused one was not stored"


@pytest.mark.parametrize("spelling", ["0.8", "0.80", "0.8000", "8e-1", ".8"])
def test_checkpoints_compare_as_decimals(publisher: httpx2.Client, spelling: str) -> None:
    publish(publisher, PAPER_EXAMPLE)
    assert publisher.get(f"/v1/models/foundation-7b/checkpoints/{spelling}/blueprint").status_code == 200


@pytest.mark.parametrize("spelling", ["0", "1.5", "-0.5", "0.80001", "nan", "inf", "abc", "1e-9"])
def test_what_is_no_checkpoint_is_refused(publisher: httpx2.Client, spelling: str) -> None:
    answer = publisher.get(f"/v1/models/foundation-7b/checkpoints/{spelling}/blueprint")
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/path/checkpoint"


def test_a_missing_checkpoint_lists_those_that_exist(publisher: httpx2.Client) -> None:
    for checkpoint in (1.0, 0.5):
        publish(publisher, blueprint_document(checkpoint=checkpoint))
    missing = publisher.get("/v1/models/tiny/checkpoints/0.8/blueprint")
    assert missing.status_code == 404
    assert (missing.json()["code"], missing.json()["checkpoints"]) == ("checkpoint_not_found", [0.5, 1.0])


@pytest.mark.parametrize(
    ("path", "advised"), [("blueprint", True), ("blueprint?version=1", False), ("versions", False), ("evidence", False)]
)
def test_a_missing_checkpoint_advises_the_nearest_where_the_request_takes_it(
    publisher: httpx2.Client, path: str, advised: bool
) -> None:
    publish(publisher, blueprint_document(checkpoint=1.0))
    missing = publisher.get(f"/v1/models/tiny/checkpoints/0.8/{path}").json()
    assert missing["code"] == "checkpoint_not_found"
    assert ("nearest=true" in missing["detail"]) is advised


@pytest.mark.parametrize(
    ("asked", "answered", "distance"),
    [("0.8", "0.9", "0.1"), ("0.6", "0.5", "0.1"), ("0.7", "0.9", "0.2"), ("0.5", "0.5", "0")],
)
def test_nearest_answers_the_nearest_checkpoint_and_says_how_far(
    publisher: httpx2.Client, asked: str, answered: str, distance: str
) -> None:
    for checkpoint in (0.5, 0.9):
        publish(publisher, blueprint_document(checkpoint=checkpoint))
    answer = publisher.get(f"/v1/models/tiny/checkpoints/{asked}/blueprint", params={"nearest": "true"})
    assert answer.headers["blueprint-checkpoint"] == answered
    assert answer.headers["blueprint-distance"] == distance


@pytest.mark.parametrize("path", ["org/name", "org%2Fname"])
def test_a_model_id_may_hold_a_slash_on_every_path(publisher: httpx2.Client, path: str) -> None:
    publish(publisher, blueprint_document("org/name", norm=1))
    publish(publisher, blueprint_document("org/name", norm=2))
    model = f"/v1/models/{path}"
    assert publisher.get(model).json()["model_id"] == "org/name"
    assert publisher.get(f"{model}/checkpoints").json()["checkpoints"][0]["newest"] == 2
    assert publisher.get(f"{model}/checkpoints/0.8/blueprint").json()["model_id"] == "org/name"
    assert len(publisher.get(f"{model}/checkpoints/0.8/versions").json()["versions"]) == 2
    assert publisher.put(f"{model}/aliases/stable", json={"training_checkpoint": 0.8, "version": 1}).status_code == 200
    assert publisher.get(f"{model}/aliases").json()["aliases"][0]["name"] == "stable"
    assert publisher.get(f"{model}/aliases/stable").status_code == 200
    assert publisher.get(f"{model}/aliases/stable/history").status_code == 200
    assert publisher.get(f"{model}/aliases/stable/blueprint").headers["blueprint-version"] == "1"
    assert publisher.get(f"{model}/compare", params={"base": "0.8@1", "other": "0.8@2"}).status_code == 200
    yank = f"{model}/checkpoints/0.8/versions/2"
    assert publisher.post(f"{yank}/yank", json={"reason": "a test"}).status_code == 200
    assert publisher.post(f"{yank}/unyank").status_code == 200


def test_a_second_labs_publish_never_changes_the_default_fetch(server: Server, publisher: httpx2.Client) -> None:
    publish(publisher, blueprint_document(norm=1))
    with httpx2.Client(base_url=server.url, headers={"Authorization": f"Bearer {server.key('lab-b')}"}) as other:
        theirs = publish(other, blueprint_document(norm=2))
        assert (theirs.status_code, theirs.json()["version"], theirs.json()["lab"]) == (201, 2, "lab-b")
        same = publish(other, blueprint_document(norm=1))
        assert (same.status_code, same.json()["version"]) == (201, 3), "another lab's word for the same bytes"
        path = "/v1/models/tiny/checkpoints/0.8/blueprint"
        assert other.get(path).headers["blueprint-version"] == "1"
        assert other.get(path, params={"lab": "lab-b"}).headers["blueprint-version"] == "3"
        assert other.get(path, params={"lab": "*"}).headers["blueprint-version"] == "3"
        assert other.get(path, params={"lab": "lab-c"}).status_code == 404
        assert other.get(path, params={"version": 2}).headers["blueprint-lab"] == "lab-b"


def test_yanked_is_skipped_by_resolution_and_served_by_digest_with_a_warning(publisher: httpx2.Client) -> None:
    publish(publisher, blueprint_document(norm=1))
    digest = publish(publisher, blueprint_document(norm=2)).json()["digest"]
    versions = "/v1/models/tiny/checkpoints/0.8/versions"
    yanked = publisher.post(f"{versions}/2/yank", json={"reason": "wrong tokenizer"}).json()
    assert (yanked["yanked"], yanked["yanked_reason"]) == (True, "wrong tokenizer")

    path = "/v1/models/tiny/checkpoints/0.8/blueprint"
    assert publisher.get(path).headers["blueprint-version"] == "1"
    by_digest = publisher.get(f"/v1/blueprints/{digest}")
    assert by_digest.status_code == 200
    assert "wrong tokenizer" in by_digest.headers["blueprint-warning"]
    assert "wrong tokenizer" in publisher.get(path, params={"version": 2}).headers["blueprint-warning"]

    publisher.post(f"{versions}/1/yank", json={"reason": "also wrong"})
    assert publisher.get(path).json()["code"] == "blueprint_not_found"
    publisher.post(f"{versions}/2/unyank")
    assert publisher.get(path).headers["blueprint-version"] == "2"
    assert "blueprint-warning" not in publisher.get(path).headers


def test_another_lab_cannot_take_the_yank_warning_from_a_digest(server: Server, publisher: httpx2.Client) -> None:
    digest = publish(publisher, blueprint_document()).json()["digest"]
    publisher.post("/v1/models/tiny/checkpoints/0.8/versions/1/yank", json={"reason": "wrong data"})
    again = publish(publisher, blueprint_document()).json()
    assert (again["created"], again["warnings"][0]["code"]) == (False, "yanked")
    with httpx2.Client(base_url=server.url, headers={"Authorization": f"Bearer {server.key('lab-b')}"}) as other:
        assert publish(other, blueprint_document()).json()["version"] == 2
    found = publisher.get(f"/v1/blueprints/{digest}")
    assert found.headers["blueprint-lab"] == "lab-a"
    assert "wrong data" in found.headers["blueprint-warning"]


def test_an_unchanged_blueprint_is_304_and_a_new_version_is_seen_at_once(publisher: httpx2.Client) -> None:
    publish(publisher, PAPER_EXAMPLE)
    first = publisher.get(PAPER_PATH)
    assert first.headers["cache-control"] == "no-cache"
    unchanged = publisher.get(PAPER_PATH, headers={"If-None-Match": first.headers["etag"]})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert unchanged.headers["etag"] == first.headers["etag"]

    publish(publisher, paper_example(statistic="mean"))
    changed = publisher.get(PAPER_PATH, headers={"If-None-Match": first.headers["etag"]})
    assert (changed.status_code, changed.headers["blueprint-version"]) == (200, "2")


def test_a_csv_tag_does_not_stand_for_json(publisher: httpx2.Client) -> None:
    publish(publisher, PAPER_EXAMPLE)
    tag = publisher.get(PAPER_PATH, headers={"Accept": "text/csv"}).headers["etag"]
    assert publisher.get(PAPER_PATH, headers={"If-None-Match": tag}).status_code == 200
    assert publisher.get(PAPER_PATH, headers={"If-None-Match": tag, "Accept": "text/csv"}).status_code == 304


def test_a_digest_is_immutable_to_every_cache(publisher: httpx2.Client) -> None:
    digest = publish(publisher, PAPER_EXAMPLE).json()["digest"]
    answer = publisher.get(f"/v1/blueprints/{digest}")
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.json() == PAPER_EXAMPLE
    assert publisher.get("/v1/blueprints/sha256:" + "0" * 64).json()["code"] == "blueprint_not_found"
    assert publisher.get("/v1/blueprints/sha256:short").status_code == 422


@pytest.mark.parametrize(
    ("accepted", "encoding", "decode"),
    [
        ("gzip", "gzip", gzip.decompress),
        ("zstd", "zstd", zstandard.decompress),
        ("gzip;q=0.5, zstd;q=0.9", "zstd", zstandard.decompress),
        ("zstd;q=0, *;q=0.1", "gzip", gzip.decompress),
        ("gzip;q=0.5, identity;q=0.1", "gzip", gzip.decompress),
    ],
)
def test_bodies_are_compressed_as_the_client_accepts(
    publisher: httpx2.Client, accepted: str, encoding: str, decode: object
) -> None:
    digest = publish(publisher, blueprint_document(layers=100)).json()["digest"]
    plain = publisher.get(f"/v1/blueprints/{digest}", headers={"Accept-Encoding": "identity;q=1, gzip;q=0.1"})
    assert "content-encoding" not in plain.headers
    for _ in range(2):  # made, then from memory
        with publisher.stream("GET", f"/v1/blueprints/{digest}", headers={"Accept-Encoding": accepted}) as answer:
            raw = b"".join(answer.iter_raw())
        assert answer.headers["content-encoding"] == encoding
        assert answer.headers["etag"] != plain.headers["etag"]
        assert "Accept-Encoding" in answer.headers["vary"]
        assert callable(decode)
        assert decode(raw) == plain.content
        assert len(raw) < len(plain.content) / 2


def test_what_cannot_be_represented_is_not_acceptable(publisher: httpx2.Client) -> None:
    publish(publisher, PAPER_EXAMPLE)
    assert publisher.get(PAPER_PATH, headers={"Accept": "text/html"}).status_code == 406
    assert publisher.get(PAPER_PATH, headers={"Accept": "text/html, */*;q=0.1"}).status_code == 200
