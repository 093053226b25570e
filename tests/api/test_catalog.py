"""Search, listings and their pages, comparison."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from app.registry.paging import encode_cursor
from tests.api.test_runs import begin
from tests.documents import blueprint_document


def publish(http: httpx2.Client, *args: Any, **kwargs: Any) -> None:
    http.post("/v1/blueprints", json=blueprint_document(*args, **kwargs)).raise_for_status()


def pages(http: httpx2.Client, path: str, key: str) -> list[list[Any]]:
    found, following = [], path
    while following:
        answer = http.get(following).raise_for_status()
        found.append(answer.json()[key])
        following = answer.json().get("next", "")
        assert answer.links.get("next", {}).get("url", "") == following
    return found


def test_pages_hold_every_model_once(publisher: httpx2.Client) -> None:
    names = [f"org/model-{number}" for number in range(7)]
    for name in names:
        publish(publisher, name)
    found = pages(publisher, "/v1/models?limit=3&q=model", "models")
    assert [len(page) for page in found] == [3, 3, 1]
    assert [model["model_id"] for page in found for model in page] == names


def test_search_takes_its_text_literally(publisher: httpx2.Client) -> None:
    for name in ("llama-7b", "llama_7b", "org/Llama-70b"):
        publish(publisher, name)

    def search(q: str) -> list[str]:
        return [model["model_id"] for model in publisher.get("/v1/models", params={"q": q}).json()["models"]]

    assert search("LLAMA") == ["llama-7b", "llama_7b", "org/Llama-70b"]
    assert search("a_7") == ["llama_7b"]
    assert search("7B") == ["llama-7b", "llama_7b"]
    assert search("G/") == ["org/Llama-70b"]
    assert search("7") == ["llama-7b", "llama_7b", "org/Llama-70b"]
    assert search("_7") == ["llama_7b"]
    assert search("bl") == search("_%") == search("é") == []
    assert search("%") == search("\\") == []
    assert search("org/") == ["org/Llama-70b"]


def test_versions_are_listed_newest_first(publisher: httpx2.Client) -> None:
    for norm in range(1, 6):
        publish(publisher, norm=norm)
    found = pages(publisher, "/v1/models/tiny/checkpoints/0.8/versions?limit=2", "versions")
    assert [version["version"] for page in found for version in page] == [5, 4, 3, 2, 1]
    assert found[0][0]["layers"] == 3
    missing = publisher.get("/v1/models/tiny/checkpoints/0.9/versions").json()
    assert (missing["code"], missing["checkpoints"]) == ("checkpoint_not_found", [0.8])


def test_checkpoints_are_listed_in_the_order_of_training(publisher: httpx2.Client) -> None:
    for checkpoint in (1.0, 0.05, 0.5):
        publish(publisher, checkpoint=checkpoint)
    publisher.post("/v1/models/tiny/checkpoints/0.5/versions/1/yank", json={"reason": "a test"})
    found = pages(publisher, "/v1/models/tiny/checkpoints?limit=2", "checkpoints")
    listed = [(item["training_checkpoint"], item.get("newest")) for page in found for item in page]
    assert listed == [(0.05, 1), (0.5, None), (1.0, 1)]
    model = publisher.get("/v1/models/tiny").json()
    assert (model["owner"], model["checkpoints"], model["versions"]) == ("lab-a", 3, 3)


@pytest.mark.parametrize("cursor", ["x", "W10", "WzFd", "WyJcdWQ4MDAiXQ", "WyJhIiwgImIiXQ", "///", "WyJcdTAwMDAiXQ"])
def test_a_foreign_cursor_is_refused(publisher: httpx2.Client, cursor: str) -> None:
    assert publisher.get("/v1/models", params={"cursor": cursor}).status_code == 422


@pytest.mark.parametrize(("number", "status"), [(2**31 - 1, 200), (2**31, 422), (-(2**31) - 1, 422), (2**63 - 1, 422)])
def test_a_cursor_beyond_the_numbers_of_its_column_is_refused(
    publisher: httpx2.Client, number: int, status: int
) -> None:
    publish(publisher)
    to_move = {"training_checkpoint": 0.8, "version": 1}
    publisher.put("/v1/models/tiny/aliases/stable", json=to_move).raise_for_status()
    for path in (
        "/v1/models/tiny/checkpoints/0.8/versions",
        "/v1/models/tiny/aliases/stable/history",
        f"{begin(publisher)}/points",
    ):
        assert publisher.get(path, params={"cursor": encode_cursor(number)}).status_code == status, path
    largest = encode_cursor(2**63 - 1)  # of an id
    assert publisher.get("/v1/runs", params={"cursor": largest}).status_code == 200


def test_compare_says_what_moved(publisher: httpx2.Client) -> None:
    def layers(**norms: float) -> list[dict[str, Any]]:
        return [{"id": name, "gradient_norm": norm} for name, norm in norms.items()]

    before, after = layers(a=4, b=3, c=2, d=1, gone=0), layers(a=1, b=3, c=4, d=2, new=9)
    publisher.post("/v1/blueprints", json=blueprint_document(checkpoint=0.5) | {"layers": before})
    publisher.post("/v1/blueprints", json=blueprint_document(checkpoint=0.8) | {"layers": after})
    answer = publisher.get("/v1/models/tiny/compare", params={"base": "0.5", "other": "0.8@1", "top": 2}).json()
    assert (answer["matched"], answer["only_base"], answer["only_other"]) == (4, ["gone"], ["new"])
    assert answer["entered_top"] == ["new", "c"]
    assert answer["left_top"] == ["a", "b"]
    # By hand: ranks 1 2 3 4 against 4 2 1 3, sum of squared differences 9 + 0 + 4 + 1 = 14, 1 - 6 * 14 / 60.
    assert answer["spearman"] == pytest.approx(1 - 6 * 14 / 60)
    assert answer["kendall"] == pytest.approx(-1 / 3)  # 2 of 6 pairs in the same order, 4 in the other
    changed = {layer["id"]: layer for layer in answer["layers"]}
    assert changed["a"] == {"id": "a", "base": 4, "other": 1, "ratio": 0.25, "base_rank": 1, "other_rank": 5}
    assert changed["gone"] == {"id": "gone", "base": 0, "base_rank": 5}


def test_a_comparison_without_information_has_no_correlation(publisher: httpx2.Client) -> None:
    constant = [{"id": name, "gradient_norm": 1.0} for name in "abc"]
    publisher.post("/v1/blueprints", json=blueprint_document() | {"layers": constant})
    answer = publisher.get("/v1/models/tiny/compare", params={"base": "0.8", "other": "0.8"}).json()
    assert "spearman" not in answer
    assert "kendall" not in answer


@pytest.mark.parametrize("side", ["", "0.8@", "0.8@0", "x", "2", "0.8@1@1", "..", "1e5"])
def test_a_side_that_cannot_be_read_is_refused(publisher: httpx2.Client, side: str) -> None:
    publish(publisher)
    answer = publisher.get("/v1/models/tiny/compare", params={"base": side, "other": "0.8"})
    assert answer.status_code == 422
