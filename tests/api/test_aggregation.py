"""The table, the consensus and the course: what each says, where labs agree, where they do not, and when hostile."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from typing import Any

import httpx2
import pytest

from tests.conftest import Server
from tests.documents import PAPER_EXAMPLE, blueprint_document, paper_example

NDJSON = "application/x-ndjson"


class Registry:
    """Plain HTTP with a key per lab."""

    def __init__(self, server: Server, http: httpx2.Client) -> None:
        self._server = server
        self._http = http
        self._keys: dict[str, str] = {}

    def publish(self, lab: str, document: dict[str, Any]) -> dict[str, Any]:
        key = self._keys.setdefault(lab, self._server.key(lab))
        answer = self._http.post("/v1/blueprints", json=document, headers={"Authorization": f"Bearer {key}"})
        return dict(answer.raise_for_status().json())

    def yank(self, lab: str, version: int) -> None:
        path = f"/v1/models/tiny/checkpoints/0.8/versions/{version}/yank"
        headers = {"Authorization": f"Bearer {self._keys[lab]}"}
        self._http.post(path, json={"reason": "a test"}, headers=headers).raise_for_status()

    def ask(self, accept: str = "application/json", **selection: Any) -> httpx2.Response:
        return self._http.post("/v1/aggregate", json=selection, headers={"Accept": accept})

    def table(self, **selection: Any) -> list[dict[str, Any]]:
        return list(self.ask(**selection).raise_for_status().json()["rows"])

    def consensus(self, **selection: Any) -> dict[str, Any]:
        answer = self.ask(result="consensus", **({"models": ["tiny"]} | selection)).raise_for_status()
        (consensus,) = answer.json()["consensuses"]
        return dict(consensus)


@pytest.fixture
def registry(server: Server, http: httpx2.Client) -> Registry:
    return Registry(server, http)


def with_norms(checkpoint: float = 0.8, /, **norms: float) -> dict[str, Any]:
    layers = [{"id": name.replace("_", "."), "gradient_norm": norm} for name, norm in norms.items()]
    return blueprint_document(checkpoint=checkpoint) | {"layers": layers}


# --- the table


def test_the_table_holds_the_layers_as_they_were_published(registry: Registry) -> None:
    published = registry.publish("lab-a", PAPER_EXAMPLE)
    rows = registry.table(models=["foundation-7b"])
    assert [row["layer"] for row in rows] == PAPER_EXAMPLE["layers"]
    assert {(row["lab"], row["version"], row["digest"], row["collision"]) for row in rows} == {
        ("lab-a", 1, published["digest"], False)
    }


def test_rows_of_two_labs_are_both_kept_and_flagged(registry: Registry) -> None:
    registry.publish("lab-a", with_norms(a=1, b=2))
    registry.publish("lab-b", with_norms(b=3, c=4))
    rows = registry.table(models=["tiny"])
    assert [(row["lab"], row["layer"]["id"], row["collision"]) for row in rows] == [
        ("lab-a", "a", False),
        ("lab-a", "b", True),
        ("lab-b", "b", True),
        ("lab-b", "c", False),
    ]


def test_every_criterion_of_a_selection_narrows_it(registry: Registry) -> None:
    tagged = with_norms(0.5, a=1)
    tagged["layers"][0]["domain_tags"] = {"bio": 0.5}
    digest = registry.publish("lab-a", tagged)["digest"]
    registry.publish("lab-a", with_norms(a=2))
    registry.publish("lab-a", with_norms(a=3))
    registry.publish("lab-b", with_norms(1.0, a=4))

    def norms(**selection: Any) -> list[float]:
        return [row["layer"]["gradient_norm"] for row in registry.table(**selection)]

    assert norms(models=["tiny"]) == [1, 3, 4]
    assert norms(models=["tiny"], versions="all") == [1, 2, 3, 4]
    assert norms(models=["tiny"], versions=[1]) == [1, 2, 4]
    assert norms(models=["tiny"], checkpoints=[0.5, 1]) == [1, 4]
    assert norms(models=["tiny"], from_checkpoint=0.6) == [3, 4]
    assert norms(models=["tiny"], to_checkpoint=0.8) == [1, 3]
    assert norms(labs=["lab-b"]) == [4]
    assert norms(models=["tiny"], tags=["bio", "legal"]) == [1]
    assert norms(digests=[digest]) == [1]
    assert norms(labs=["lab-b"], digests=[digest]) == [1, 4]
    assert norms(models=["tiny"], from_checkpoint=0.9, to_checkpoint=0.95) == []


def test_a_yanked_version_is_left_out_unless_it_is_named(registry: Registry) -> None:
    registry.publish("lab-a", with_norms(a=1))
    digest = registry.publish("lab-a", with_norms(a=2))["digest"]
    registry.yank("lab-a", 2)
    assert [row["layer"]["gradient_norm"] for row in registry.table(models=["tiny"])] == [1]
    assert [row["version"] for row in registry.table(models=["tiny"], versions="all")] == [1]
    for selection in ({"models": ["tiny"], "versions": [2]}, {"digests": [digest]}):
        (row,) = registry.table(**selection)
        assert (row["version"], row["yanked"]) == (2, True)


def test_the_three_forms_of_the_table_hold_the_same(registry: Registry) -> None:
    document = paper_example()
    shares = [[0, 0], [0.00001, 0.1], [0.5, 0.9], [1.0, 1.0]]
    document["layers"][0] |= {"retained_mass": shares, "gradient_norm_ci": [0.05, 0.06]}
    document["layers"][1]["domain_norms"] = {"bio": 1e-7}
    registry.publish("lab-a", document)
    rows = registry.table(models=["foundation-7b"])
    lines = registry.ask(NDJSON, models=["foundation-7b"])
    assert lines.headers["content-type"] == NDJSON
    assert [json.loads(line) for line in lines.text.splitlines()] == rows
    table = registry.ask("text/csv", models=["foundation-7b"])
    assert table.headers["content-type"] == "text/csv; charset=utf-8"
    cells = list(csv.DictReader(io.StringIO(table.text)))
    assert [float(cell["gradient_norm"]) for cell in cells] == [0.052, 0.033, 0.045]
    assert cells[0]["domain_tags.bio"] == "0.79"
    kept = [[float(cells[0][f"retained_mass.{k}"]), k] for k in ("0.0", "1e-05", "0.5", "1.0")]
    assert [[float(k), share] for share, k in kept] == shares
    assert cells[0]["gradient_norm_ci.high"] == "0.06"
    assert float(cells[1]["domain_norms.bio"]) == 1e-7
    assert (cells[0]["lab"], cells[0]["collision"], cells[0]["yanked"]) == ("lab-a", "false", "false")


@pytest.mark.parametrize(
    ("selection", "status", "code"),
    [
        ({}, 422, "invalid_request"),
        ({"checkpoints": [0.8]}, 422, "invalid_request"),
        ({"models": ["nobody"]}, 404, "model_not_found"),
        ({"labs": ["nobody"]}, 404, "lab_not_found"),
        ({"digests": ["sha256:" + "0" * 64]}, 404, "blueprint_not_found"),
        ({"digests": ["sha256:x"]}, 422, "invalid_request"),
        ({"models": ["tiny"], "from_checkpoint": 0.9, "to_checkpoint": 0.1}, 422, "invalid_request"),
        ({"models": ["tiny"], "versions": "latest"}, 422, "invalid_request"),
        ({"models": ["tiny"], "versions": [0]}, 422, "invalid_request"),
        ({"models": ["tiny"], "checkpoints": [0.12345]}, 422, "invalid_request"),
        ({"models": ["tiny'; DROP TABLE layers; --"]}, 422, "invalid_request"),
        ({"models": ["tiny"], "tags": ["a\x00b"]}, 422, "invalid_request"),
        ({"models": ["tiny"], "unheard": 1}, 422, "invalid_request"),
        ({"models": ["tiny"] * 1_001}, 422, "invalid_request"),
    ],
)
def test_a_selection_that_cannot_be_is_refused_before_anything_is_sent(
    registry: Registry, selection: dict[str, Any], status: int, code: str
) -> None:
    registry.publish("lab-a", with_norms(a=1))
    answer = registry.ask(**selection)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_a_form_that_there_is_not_is_refused(registry: Registry) -> None:
    registry.publish("lab-a", with_norms(a=1))
    assert registry.ask("image/png", models=["tiny"]).json()["code"] == "not_acceptable"


# --- the consensus


def test_labs_on_different_scales_agree_once_their_scales_are_divided_out(registry: Registry) -> None:
    norms = {"a": 8.0, "b": 4.0, "c": 2.0}
    for lab, unit in (("lab-a", 1), ("lab-b", 10), ("lab-c", 100)):
        registry.publish(lab, with_norms(**{name: unit * norm for name, norm in norms.items()}))
    answer = registry.consensus()
    assert (answer["status"], answer["method"], answer["method_version"]) == (
        "consensus",
        "weighted-median-of-centred-logs",
        1,
    )
    assert [source["scale"] for source in answer["sources"]] == pytest.approx([4, 40, 400])
    assert answer["scale"] == pytest.approx(40)
    assert {layer["id"]: layer["gradient_norm"] for layer in answer["layers"]} == pytest.approx(
        {"a": 80, "b": 40, "c": 20}
    )
    assert [layer["rank"] for layer in answer["layers"]] == [1, 2, 3]
    assert answer["kendall_w"] == pytest.approx(1)
    assert all(layer["spread"] == pytest.approx(0, abs=1e-9) for layer in answer["layers"])


def test_one_lab_has_one_voice_its_newest_that_is_not_yanked(registry: Registry) -> None:
    registry.publish("lab-a", with_norms(a=1, b=9))
    for norm in (2, 3, 4):
        registry.publish("lab-a", with_norms(a=norm, b=1))
    registry.publish("lab-b", with_norms(a=5, b=1))
    registry.yank("lab-a", 4)
    for versions in ("newest", "all"):
        answer = registry.consensus(versions=versions)
        assert [(source["lab"], source["version"]) for source in answer["sources"]] == [("lab-a", 3), ("lab-b", 5)]


@pytest.mark.parametrize("attack", ["huge", "tiny", "zeros", "permuted", "one_layer", "sure"])
def test_a_hostile_lab_moves_no_layer_beyond_what_the_others_say(registry: Registry, attack: str) -> None:
    honest = [{f"l{i}": math.exp(-i / 3 + 0.1 * ((i * (lab + 2)) % 5)) for i in range(9)} for lab in range(3)]
    for lab, norms in enumerate(honest):
        document = with_norms(**{name: 10**lab * norm for name, norm in norms.items()})
        for layer in document["layers"]:
            layer["gradient_norm_ci"] = [0.9 * layer["gradient_norm"], 1.1 * layer["gradient_norm"]]
        registry.publish(f"lab-{lab}", document)
    names = list(honest[0])
    hostile = {
        "huge": dict.fromkeys(names, 1e9) | {"l8": 1e300},
        "tiny": dict.fromkeys(names, 1e-9) | {"l0": 1e-300},
        "zeros": dict.fromkeys(names, 0.0) | {"l8": 1.0},
        "permuted": dict(zip(names, reversed(list(honest[0].values())), strict=True)),
        "one_layer": {"l8": 1e9},
        "sure": dict(zip(names, reversed(list(honest[0].values())), strict=True)),
    }[attack]
    document = with_norms(**hostile)
    if attack == "sure":
        for layer in document["layers"]:
            layer["gradient_norm_ci"] = [layer["gradient_norm"] * (1 - 1e-12), layer["gradient_norm"] * (1 + 1e-12)]
    registry.publish("mallory", document)
    answer = registry.consensus()
    for layer in answer["layers"]:
        own = [norms[layer["id"]] / statistics.median(norms.values()) for norms in honest]
        relative = layer["gradient_norm"] / answer["scale"]
        assert min(own) * (1 - 1e-9) <= relative <= max(own) * (1 + 1e-9)
    mallory = next(source for source in answer["sources"] if source["lab"] == "mallory")
    if attack == "permuted":
        others = [source["deviation"] for source in answer["sources"] if source["lab"] != "mallory"]
        assert mallory["deviation"] > 3 * max(others)
        assert answer["kendall_w"] < 0.7


def test_a_lab_of_zeros_has_no_voice_and_is_named(registry: Registry) -> None:
    registry.publish("lab-a", with_norms(a=1, b=2))
    registry.publish("lab-b", with_norms(a=0, b=0))
    answer = registry.consensus()
    assert answer["status"] == "single_lab"
    assert [source.get("left_out") for source in answer["sources"]] == [None, "no_positive_norm"]
    assert [layer["gradient_norm"] for layer in answer["layers"]] == pytest.approx([1, 2])


def test_a_zero_among_positive_norms_counts_as_the_smallest(registry: Registry) -> None:
    for lab, norm in (("lab-a", 0), ("lab-b", 0), ("lab-c", 5)):
        registry.publish(lab, with_norms(a=norm, b=1, c=2, d=3))
    layers = {layer["id"]: layer for layer in registry.consensus()["layers"]}
    assert layers["a"]["gradient_norm"] == 0
    assert layers["a"]["rank"] == 4
    assert layers["a"]["influence"]["lab"] in {"lab-a", "lab-b"}


def test_a_single_lab_answers_its_own_norms(registry: Registry) -> None:
    registry.publish("lab-a", PAPER_EXAMPLE)
    answer = registry.consensus(models=["foundation-7b"])
    assert answer["status"] == "single_lab"
    assert "kendall_w" not in answer
    by_id = sorted(PAPER_EXAMPLE["layers"], key=lambda layer: str(layer["id"]))
    for layer, published in zip(answer["layers"], by_id, strict=True):
        assert layer["gradient_norm"] == pytest.approx(published["gradient_norm"])
        assert {tag: given["weight"] for tag, given in layer["domain_tags"].items()} == published["domain_tags"]
        assert not {"spread", "influence", "i_squared"} & set(layer)


def test_labs_without_a_common_layer_cannot_be_compared(registry: Registry) -> None:
    registry.publish("lab-a", with_norms(a=1, b=2))
    registry.publish("lab-b", with_norms(c=1, d=2))
    answer = registry.consensus()
    assert (answer["status"], answer["layers"], answer["core_layers"]) == ("not_comparable", [], 0)
    assert {source["left_out"] for source in answer["sources"]} == {"no_common_layers"}
    assert registry.ask("text/csv", result="consensus", models=["tiny"]).text.splitlines()[1].startswith("tiny,0.8,")


def test_a_layer_that_a_lab_lacks_is_combined_of_the_others(registry: Registry) -> None:
    registry.publish("lab-a", with_norms(a=1, b=2, c=3))
    registry.publish("lab-b", with_norms(a=1, b=2))
    registry.publish("lab-c", with_norms(a=1, b=2, d=4))
    answer = registry.consensus()
    assert {layer["id"]: layer["labs"] for layer in answer["layers"]} == {"a": 3, "b": 3, "c": 1, "d": 1}
    assert (answer["core_layers"], answer["complete_layers"]) == (2, 2)
    assert [layer.get("rank") for layer in answer["layers"]] == [2, 1, None, None]


def test_finer_layers_of_one_lab_are_put_together_to_the_layer_of_another(registry: Registry) -> None:
    registry.publish("lab-a", with_norms(attn_0=5, ffn_0=1))
    registry.publish("lab-b", with_norms(attn_0_q=3, attn_0_k=4, ffn_0=1))
    layers = {layer["id"]: layer for layer in registry.consensus()["layers"]}
    assert layers["attn.0"]["gradient_norm"] == pytest.approx(5)  # sqrt(3^2 + 4^2), on the same scale
    assert (layers["attn.0"]["labs"], layers["attn.0"]["rolled_up"]) == (2, 1)
    assert (layers["attn.0.q"]["labs"], layers["attn.0.q"]["rolled_up"]) == (1, 0)


def test_parts_that_do_not_add_up_are_not_put_together(registry: Registry) -> None:
    whole, pieces = with_norms(attn_0=5, ffn_0=1), with_norms(attn_0_q=3, attn_0_k=4, ffn_0=1)
    whole["layers"][0]["parameters"] = 100
    for layer in pieces["layers"][:2]:
        layer["parameters"] = 10
    registry.publish("lab-a", whole)
    registry.publish("lab-b", pieces)
    layers = {layer["id"]: layer for layer in registry.consensus()["layers"]}
    assert (layers["attn.0"]["labs"], layers["attn.0"]["rolled_up"]) == (1, 0)


def counted(document: dict[str, Any], **parameters: int) -> dict[str, Any]:
    for layer in document["layers"]:
        layer["parameters"] = parameters[layer["id"].replace(".", "_")]
    return document


def test_a_wrong_count_of_one_lab_does_not_keep_the_parts_of_others_apart(registry: Registry) -> None:
    for lab, count in (("lab-a", 100), ("mallory", 101)):
        registry.publish(lab, counted(with_norms(attn=5, ffn=1), attn=count, ffn=9))
    registry.publish("lab-b", counted(with_norms(attn_q=3, attn_k=4, ffn=1), attn_q=60, attn_k=40, ffn=9))
    layers = {layer["id"]: layer for layer in registry.consensus()["layers"]}
    assert (layers["attn"]["labs"], layers["attn"]["rolled_up"]) == (3, 1)


def test_counts_whose_sum_leaves_64_bits_are_added_up(registry: Registry) -> None:
    parts = {f"attn_{number}": 0.1 for number in range(1_100)}
    registry.publish("lab-a", with_norms(attn=5))
    registry.publish("lab-b", counted(with_norms(**parts), **dict.fromkeys(parts, 2**53 - 1)))
    layers = {layer["id"]: layer for layer in registry.consensus()["layers"]}
    assert (layers["attn"]["labs"], layers["attn"]["rolled_up"]) == (2, 1)
    assert registry.ask(result="course", models=["tiny"]).status_code == 200


def test_extreme_norms_are_put_together_without_overflow(registry: Registry) -> None:
    registry.publish("lab-a", with_norms(x=1e300, y=1e-300, z=1))
    registry.publish("lab-b", with_norms(x_a=1e300, x_b=1e300, y_a=1e-300, y_b=5e-324, z=1))
    assert registry.consensus()["status"] == "consensus"


def test_domain_weights_combine_per_tag_and_intervals_tell_heterogeneity(registry: Registry) -> None:
    for lab, (bio, norm) in {"lab-a": (0.2, 1.0), "lab-b": (0.4, 1.0), "lab-c": (0.9, 9.0)}.items():
        document = with_norms(a=norm, b=1, c=1)
        for layer in document["layers"]:
            layer["gradient_norm_ci"] = [layer["gradient_norm"] * 0.9, layer["gradient_norm"] / 0.9]
        document["layers"][0]["domain_tags"] = {"bio": bio} | ({"legal": bio / 2} if lab != "lab-c" else {})
        registry.publish(lab, document)
    layers = {layer["id"]: layer for layer in registry.consensus()["layers"]}
    assert layers["a"]["domain_tags"] == {"bio": {"weight": 0.4, "labs": 3}, "legal": {"weight": 0.15, "labs": 2}}
    assert layers["a"]["i_squared"] > 0.9
    assert layers["b"]["i_squared"] == 0
    only = {layer["id"]: layer for layer in registry.consensus(tags=["legal"], labs=["lab-a"])["layers"]}
    assert list(only["a"]["domain_tags"]) == ["legal"]


def test_the_same_selection_gives_the_same_bytes_whatever_its_order(registry: Registry) -> None:
    digests = [
        registry.publish(f"lab-{lab}", with_norms(a=lab + 1, b=2, c=1 / (lab + 1)))["digest"] for lab in range(4)
    ]
    first = registry.ask(result="consensus", digests=digests).content
    assert registry.ask(result="consensus", digests=[*reversed(digests), digests[0]]).content == first
    by_name = registry.consensus()
    assert [source["digest"] for source in by_name["sources"]] == digests
    assert json.loads(first)["consensuses"] == [by_name]


# --- the course


def test_the_course_tells_what_rises_and_falls(registry: Registry) -> None:
    registry.publish("lab-a", with_norms(0.5, a=5, b=4, c=3, d=2, e=1))
    registry.publish("lab-a", with_norms(0.8, a=4, b=5, c=3, d=2, e=1))
    registry.publish("lab-a", with_norms(1.0, a=1, b=5, c=3, d=2, new=9))
    answer = registry.ask(result="course", models=["tiny"]).raise_for_status().json()
    (course,) = answer["courses"]
    assert course["checkpoints"] == [0.5, 0.8, 1.0]
    layers = {layer["id"]: layer for layer in course["layers"]}
    assert layers["a"]["ranks"] == [1, 2, 5]
    assert layers["a"]["rank_change"] == -4
    assert layers["new"]["ranks"] == [None, None, 1]
    assert layers["new"]["norms"] == [None, None, 9]
    assert course["falling"][0] == "a"
    assert [(pair["layers"], pair["spearman"]) for pair in course["neighbours"]] == [(5, 0.9), (4, pytest.approx(0.4))]
    low, high = course["neighbours"][0]["spearman_ci"]
    assert low < 0.9 < high
    bounds = [low, high, *course["neighbours"][0]["kendall_ci"]]
    assert bounds == [float(f"{bound:.12g}") for bound in bounds]
    lines = registry.ask("text/csv", result="course", models=["tiny"]).text.splitlines()
    assert len(lines) == 1 + 15
