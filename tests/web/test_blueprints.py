"""The page of one blueprint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx2
import pytest
from playwright.sync_api import Page

from gradient_blueprints import Blueprint, Client
from gradient_blueprints.models import Publication
from tests.conftest import Server
from tests.documents import blueprint_document, paper_example
from tests.web.conftest import Visitor
from tests.web.seeding import MODEL

NEWEST = f"/models/{MODEL}/checkpoints/0.8"
SVG = "{http://www.w3.org/2000/svg}"


def column(page: Page, number: int) -> list[str]:
    """A column of the layers by its place among the headers, as it is shown, intervals left out."""
    cells = page.locator(f"#layers tbody tr > :nth-child({number})").all_inner_texts()
    return [cell.partition(" [")[0] for cell in cells]


@pytest.fixture
def fetched(registry: Server) -> Blueprint:
    with Client(registry.url) as client:
        return client.fetch_blueprint(MODEL, 0.8)


def test_layers_are_sorted_by_links_without_script(
    registry: Server, open_visitor: Callable[..., Visitor], fetched: Blueprint
) -> None:
    visitor = open_visitor(registry.url, script=False)
    page = visitor.visit(NEWEST)
    by_norm = [layer.id for layer in sorted(fetched.layers, key=lambda layer: -layer.gradient_norm)]
    assert column(page, 1) == by_norm
    page.get_by_role("link", name="Gradient norm").click()
    assert column(page, 1) == by_norm[::-1]
    assert page.locator("th[aria-sort=ascending]").inner_text() == "Gradient norm"
    page.get_by_role("link", name="Layer", exact=True).click()
    assert column(page, 1)[:3] == [
        "model.embed_tokens",
        "model.layers.0.input_layernorm",
        "model.layers.0.mlp",
    ]
    page.get_by_role("link", name="Depth").click()
    assert column(page, 3)[:4] == ["7"] * 4
    assert column(page, 3)[-2:] == ["–", "–"]
    page.get_by_role("link", name="legal").click()
    weights = [float(cell) for cell in column(page, len(page.locator("#layers thead th").all()) + 1)]
    assert weights == sorted(weights, reverse=True)
    assert visitor.faults == []


def test_numbers_within_names_are_sorted_as_numbers(
    registry: Server, publish: Callable[..., Publication], open_visitor: Callable[..., Visitor]
) -> None:
    publish("lab-a", blueprint_document("sorting", 0.5, layers=12))
    page = open_visitor(registry.url).visit("/models/sorting/checkpoints/0.5?sort=id")
    assert column(page, 1) == [f"block.{number}.attn" for number in range(12)]


def test_intervals_are_written_and_drawn(
    registry: Server, open_visitor: Callable[..., Visitor], fetched: Blueprint
) -> None:
    page = open_visitor(registry.url).visit(NEWEST)
    largest = max(fetched.layers, key=lambda layer: layer.gradient_norm)
    assert largest.gradient_norm_ci is not None
    row = page.locator("#layers tbody tr").first
    low, high = largest.gradient_norm_ci
    assert f"{largest.gradient_norm:.2f} [{low:.2f}, {high:.2f}]" in row.inner_text().replace("\t", " ")
    line = row.locator("svg path").bounding_box()
    dot = row.locator("svg circle").bounding_box()
    assert line is not None
    assert dot is not None
    assert line["x"] < dot["x"] + dot["width"] / 2 < line["x"] + line["width"]


def test_many_layers_come_in_pages(
    registry: Server, publish: Callable[..., Publication], open_visitor: Callable[..., Visitor]
) -> None:
    publish("lab-a", blueprint_document("paging", 0.5, layers=260))
    page = open_visitor(registry.url).visit("/models/paging/checkpoints/0.5")
    assert len(column(page, 1)) == 250
    page.get_by_role("link", name="Next").click()
    assert column(page, 1) == [f"block.{number}.attn" for number in range(250, 260)]
    assert "251 to 260 of 260" in page.inner_text("main")
    page.get_by_role("link", name="Previous").click()
    assert column(page, 1)[0] == "block.0.attn"


def test_the_lines_to_copy_fetch_this_very_blueprint(
    registry: Server, open_visitor: Callable[..., Visitor], fetched: Blueprint
) -> None:
    visitor = open_visitor(registry.url)
    visitor.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = visitor.visit(NEWEST)
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    names: dict[str, Any] = {}
    exec(page.evaluate("navigator.clipboard.readText()"), names)
    assert names["blueprint"].digest == fetched.digest
    names["client"].close()


@pytest.mark.parametrize("form", ["json", "csv"])
def test_the_document_is_downloaded_whole(registry: Server, fetched: Blueprint, form: str) -> None:
    answer = httpx2.get(f"{registry.url}/blueprints/{fetched.digest}/{form}")
    assert answer.headers["content-disposition"] == f'attachment; filename="northwind-atlas-1b-0.8-v4.{form}"'
    assert "immutable" in answer.headers["cache-control"]
    read = Blueprint.from_csv(answer.text) if form == "csv" else Blueprint.from_json(answer.content)
    assert read.digest == fetched.digest


def test_a_yanked_version_says_why_and_is_not_what_a_fetch_answers(registry: Server) -> None:
    yanked = httpx2.get(f"{registry.url}{NEWEST}/versions/1").text
    assert "Yanked by northwind." in yanked
    assert "profiled with the wrong tokenizer; use version 4" in yanked
    assert "not the latest version" in yanked
    assert "Version 4, published by" in httpx2.get(registry.url + NEWEST).text
    assert "Version 2, published by" in httpx2.get(f"{registry.url}{NEWEST}?lab=blue-harbour").text


def test_the_latest_version_is_that_which_a_fetch_of_its_lab_answers(
    registry: Server, publish: Callable[..., Publication], tmp_path: Path
) -> None:
    def is_latest(path: str) -> bool:
        return "not the latest version" not in httpx2.get(registry.url + path).raise_for_status().text

    assert is_latest(f"{NEWEST}/versions/2")  # of blue-harbour; others have published since
    for norm in (0.5, 0.6):
        publish("lab-a", blueprint_document("yanked-last", norm=norm))
    place = "/models/yanked-last/checkpoints/0.8/versions"
    assert [is_latest(f"{place}/{number}") for number in (1, 2)] == [False, True]
    with Client(registry.url, api_key=registry.key("lab-a"), cache=tmp_path / "yanking") as client:
        client.yank_version("yanked-last", 0.8, 2, reason="too early")
        assert [is_latest(f"{place}/{number}") for number in (1, 2)] == [True, False]
        client.yank_version("yanked-last", 0.8, 1, reason="too early")
    assert [is_latest(f"{place}/{number}") for number in (1, 2)] == [True, True]  # there is none


def test_a_digest_is_a_permanent_address(registry: Server, fetched: Blueprint) -> None:
    page = httpx2.get(f"{registry.url}/blueprints/{fetched.digest}").text
    assert "Version 4, published by" in page
    assert fetched.digest in page


def test_warnings_are_gathered_by_their_kind(registry: Server, open_visitor: Callable[..., Visitor]) -> None:
    page = open_visitor(registry.url).visit("/models/northwind/atlas-7b/checkpoints/0.8")
    (summary,) = page.locator("details.warnings summary").all_inner_texts()
    assert "alpha outside 1 2 1 place, such as /layers/0/alpha: 2.7 lies outside (1, 2)" in summary


def test_the_pictures_show_each_kind_and_change_with_the_colour_scheme(registry: Server, fetched: Blueprint) -> None:
    shown = {}
    for name in ("norms", "heatmap", "retained-mass"):
        answer = httpx2.get(f"{registry.url}/blueprints/{fetched.digest}/pictures/{name}.svg")
        assert answer.headers["content-type"] == "image/svg+xml"
        assert "immutable" in answer.headers["cache-control"]
        assert "sandbox" in answer.headers["content-security-policy"]
        assert "@media (prefers-color-scheme:dark)" in answer.text
        assert "#0072b2" not in answer.text.replace("--attention:#0072b2", "")
        texts = ElementTree.fromstring(answer.content).iter(f"{SVG}text")
        shown[name] = {"".join(element.itertext()).strip() for element in texts}
    kinds = {"attention", "feed forward", "normalization"}
    assert {**shown, "norms": kinds | {"embedding"} | shown["norms"]} == shown
    assert kinds <= shown["heatmap"]
    assert "embedding" not in shown["heatmap"]  # it has no depth
    assert {"0", "7"} <= shown["heatmap"]
    assert kinds | {"embedding"} <= shown["retained-mass"]


def test_a_blueprint_without_kinds_depths_and_intervals_still_has_its_page(
    registry: Server, publish: Callable[..., Publication], open_visitor: Callable[..., Visitor]
) -> None:
    digest = publish("lab-a", paper_example(model_id="plain")).digest
    visitor = open_visitor(registry.url)
    page = visitor.visit(f"/blueprints/{digest}")
    visitor.check()
    assert column(page, 1) == ["attn.0", "attn.1", "ffn.0"]
    assert page.locator("#layers svg").count() == 3
    assert page.locator("h2").all_inner_texts() == [
        "Gradient norms",
        "Layers",
        "Warnings",
        "Provenance",
        "Versions at 0.8",
    ]
    for picture in ("heatmap", "retained-mass"):
        assert httpx2.get(f"{registry.url}/blueprints/{digest}/pictures/{picture}.svg").status_code == 404
