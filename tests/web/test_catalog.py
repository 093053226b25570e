"""The pages of models."""

from __future__ import annotations

import re
from collections.abc import Callable
from xml.etree import ElementTree

import httpx2
import pytest

from tests.conftest import Server, execute
from tests.documents import blueprint_document
from tests.web.conftest import Visitor
from tests.web.seeding import MODEL

SVG = "{http://www.w3.org/2000/svg}"


def test_a_reader_searches_and_opens_a_model(registry: Server, open_visitor: Callable[..., Visitor]) -> None:
    visitor = open_visitor(registry.url, script=False)
    page = visitor.visit("/")
    names = page.locator("tbody th").all_inner_texts()
    assert {"harbour-350m", MODEL, "northwind/atlas-7b", "tundra.ai/permafrost-13b-base"} <= set(names)
    assert names == sorted(names)
    page.get_by_label("Part of a model's name").fill("ATLAS")
    page.get_by_role("button", name="Search").click()
    assert page.locator("tbody th").all_inner_texts() == [MODEL, "northwind/atlas-7b"]
    page.get_by_role("link", name=MODEL).click()
    assert page.locator("h1").inner_text() == MODEL
    page.goto(f"{registry.url}/?q=zeppelin")
    assert "No model's name contains “zeppelin”." in page.inner_text("main")


def test_models_come_in_pages(registry: Server) -> None:
    execute(
        registry.settings.database_url,
        "INSERT INTO models (name, lab_id) SELECT 'paged-' || lpad(n::text, 2, '0'), min(labs.id)"
        " FROM labs, generate_series(0, 51) n GROUP BY n",
    )
    with httpx2.Client(base_url=registry.url) as http:
        first = http.get("/?q=paged").text
        assert ("paged-49" in first, "paged-50" in first) == (True, False)
        (address,) = [part for part in first.split('"') if "cursor=" in part]
        second = http.get(address.replace("&amp;", "&")).text
    assert ("paged-49" in second, "paged-50" in second, "Next page" in second) == (False, True, False)
    assert 'href="/?q=paged"' in second


def test_an_empty_registry_says_how_to_begin(server: Server, open_visitor: Callable[..., Visitor]) -> None:
    visitor = open_visitor(server.url)
    page = visitor.visit("/")
    visitor.check()
    assert "No model has been published yet." in page.inner_text("main")
    assert f'Client("{server.url}"' in page.inner_text("pre")


def test_a_model_shows_checkpoints_versions_labs_aliases_and_evidence(
    registry: Server, open_visitor: Callable[..., Visitor]
) -> None:
    page = open_visitor(registry.url).visit(f"/models/{MODEL}")

    def rows(name: str) -> list[str]:
        return [
            row.replace("\t", " ").replace("\n", " ")
            for row in page.get_by_role("region", name=name, exact=True).locator("tbody tr").all_inner_texts()
        ]

    assert [row.split()[:3] for row in rows("Checkpoints")] == [
        ["0.2", "version", "1"],
        ["0.4", "version", "1"],
        ["0.6", "version", "1"],
        ["0.8", "version", "4"],
        ["1", "version", "1"],
    ]
    assert [row.split()[0] for row in rows("Versions")][:5] == ["0.8@4", "0.8@3", "0.8@2", "1@1", "0.8@1"]
    assert ["yanked" in row for row in rows("Versions")][:5] == [False, False, False, False, True]
    assert rows("Labs")[0].startswith("northwind owner 6 5")
    assert {row.split()[0] for row in rows("Labs")} == {"northwind", "blue-harbour", "tundra.ai"}
    assert [row.split()[:2] for row in rows("Aliases")] == [["latest", "1@1"], ["stable", "0.8@4"]]
    found = {row.split()[3]: row for row in rows("What adapters found")}
    assert found.keys() == {"bio", "general", "legal"}
    assert " stale " in found["bio"]
    assert "0.8@4 is stale in bio" in page.inner_text(".note")


def test_labs_are_counted_whole_though_not_all_are_shown(server: Server, publisher: httpx2.Client) -> None:
    publisher.post("/v1/blueprints", json=blueprint_document("tiny")).raise_for_status()
    assert "1 checkpoint by 1 lab." in httpx2.get(f"{server.url}/models/tiny").text
    execute(
        server.settings.database_url,
        "INSERT INTO labs (name) SELECT 'crowd-' || n FROM generate_series(1, 60) n",
        "INSERT INTO versions (checkpoint_id, number, lab_id, key_id, document_id) SELECT checkpoint_id,"
        " 1 + row_number() OVER (), labs.id, key_id, document_id FROM versions, labs WHERE labs.name LIKE 'crowd-%'",
    )
    page = httpx2.get(f"{server.url}/models/tiny").text
    assert "1 checkpoint by 61 labs." in page
    assert "The owner and those that published last are shown." in page


def test_alarms_are_counted_over_the_weeks_that_are_drawn(registry: Server) -> None:
    execute(
        registry.settings.database_url,
        "INSERT INTO staleness_events (kind, at, checkpoint_id, document_id, domain, stale_share, users)"
        " SELECT kind, at - interval '2 years', checkpoint_id, document_id, domain, stale_share, users"
        " FROM staleness_events ORDER BY id",
    )
    page = httpx2.get(f"{registry.url}/models/{MODEL}").text
    assert re.search(r"since \d+ \w+ \d{4}\. 3 alarms were raised or cleared", page)


def test_a_model_without_evidence_says_so(registry: Server) -> None:
    text = httpx2.get(f"{registry.url}/models/harbour-350m").text
    assert "No adapter has let the registry keep a check yet." in text
    assert "evidence.svg" not in text


def test_the_picture_of_the_evidence_shows_verdicts_and_alarms(registry: Server) -> None:
    answer = httpx2.get(f"{registry.url}/pictures/evidence.svg", params={"model_id": MODEL})
    drawing = ElementTree.fromstring(answer.content)
    texts = ["".join(element.itertext()).strip() for element in drawing.iter(f"{SVG}text")]
    assert {"fresh", "stale", "indeterminate", "checks a week"} <= set(texts)
    assert sorted(text for text in texts if text in ("raised", "cleared")) == ["cleared", "raised", "raised"]


@pytest.mark.parametrize("path", ["/pictures/evidence.svg?model_id=harbour-350m"])
def test_without_evidence_there_is_no_picture(registry: Server, path: str) -> None:
    assert httpx2.get(registry.url + path).status_code == 404
