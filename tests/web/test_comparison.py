"""The page that compares two blueprints."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree

import httpx2

from gradient_blueprints import Client
from tests.conftest import Server
from tests.web.conftest import Visitor
from tests.web.seeding import MODEL

COMPARE = f"/models/{MODEL}/compare"


def test_two_versions_are_chosen_and_compared_without_script(
    registry: Server, open_visitor: Callable[..., Visitor]
) -> None:
    page = open_visitor(registry.url, script=False).visit(COMPARE)
    page.get_by_label("Base").select_option("0.2@1")
    page.get_by_label("Other").select_option("0.8@3")
    page.get_by_label("Size of the top").fill("5")
    page.get_by_role("button", name="Compare").click()
    with Client(registry.url) as client:
        compared = client.compare_blueprints(MODEL, (0.2, 1), (0.8, 3), top=5)
    shown = page.inner_text("main")
    assert f"Spearman {compared.spearman:.3f}, Kendall {compared.kendall:.3f}" in shown
    assert page.locator("section", has_text="Entered the top 5").locator("li").all_inner_texts() == list(
        compared.entered_top
    )
    gained = [layer.base_rank - layer.other_rank for layer in compared.layers if layer.base_rank and layer.other_rank]
    cells = page.locator("#layers tbody td:last-child").all_inner_texts()
    assert [int(cell.replace("−", "-")) for cell in cells] == sorted(gained, reverse=True)


def test_a_checkpoint_alone_means_its_newest_version(registry: Server) -> None:
    page = httpx2.get(f"{registry.url}{COMPARE}?base=0.2&other=0.8").text
    assert "0.2@1 → 0.8@4" in page
    assert '<option value="0.8@4" selected>' in page


def test_the_picture_marks_what_entered_and_left_the_top(registry: Server) -> None:
    asked = {"model_id": MODEL, "base": "0.2", "other": "0.8", "top": "8"}
    answer = httpx2.get(f"{registry.url}/pictures/comparison.svg", params=asked)
    texts = [
        "".join(element.itertext())
        for element in ElementTree.fromstring(answer.content).iter()
        if "text" in element.tag
    ]
    assert {"entered the top", "left the top", "gradient norm, 0.2@1", "gradient norm, 0.8@4"} <= set(texts)
