"""The page of what the labs say together."""

from __future__ import annotations

from collections.abc import Callable

import httpx2
import pytest

from app.settings import Settings
from gradient_blueprints import Client
from gradient_blueprints.models import Publication
from tests.conftest import Server, serving
from tests.documents import blueprint_document
from tests.web.conftest import Visitor
from tests.web.seeding import MODEL


def test_the_page_shows_estimates_and_where_the_labs_disagree(
    registry: Server, open_visitor: Callable[..., Visitor]
) -> None:
    page = open_visitor(registry.url).visit(f"/models/{MODEL}/checkpoints/0.8/consensus?sort=spread")
    with Client(registry.url) as client:
        (consensus,) = client.consensus_blueprints(MODEL, checkpoints=[0.8])
    labs = page.get_by_role("region", name="Labs", exact=True).locator("tbody th").all_inner_texts()
    assert labs == ["blue-harbour", "northwind", "tundra.ai"]
    assert f"Kendall's W {consensus.kendall_w:.3f}" in page.inner_text("main")
    disputed = [layer.id for layer in sorted(consensus.layers, key=lambda layer: -(layer.spread or 0))]
    assert page.locator("#layers tbody th").all_inner_texts() == disputed
    assert page.locator("main p code").all_inner_texts() == disputed[:5]


def test_where_reads_are_closed_the_lines_to_copy_have_a_place_for_the_key(settings: Settings) -> None:
    with serving(settings.model_copy(update={"public_reads": False})) as server:
        key = {"Authorization": f"Bearer {server.key('lab-a')}"}
        with httpx2.Client(base_url=server.url, headers=key, timeout=60) as http:
            http.post("/v1/blueprints", json=blueprint_document("tiny", 0.5)).raise_for_status()
            for path in ("/models/tiny/checkpoints/0.5", "/models/tiny/checkpoints/0.5/consensus"):
                assert f'Client("{server.url}", api_key=' in http.get(path).text


def test_a_single_lab_has_nobody_to_disagree_with(registry: Server) -> None:
    assert "nobody to disagree" in httpx2.get(f"{registry.url}/models/{MODEL}/checkpoints/0.2/consensus").text


def test_labs_without_a_positive_norm_are_left_out_in_words(
    registry: Server, publish: Callable[..., Publication]
) -> None:
    publish("lab-a", blueprint_document("zeros", norm=0))
    page = httpx2.get(f"{registry.url}/models/zeros/checkpoints/0.8/consensus")
    assert page.status_code == 200
    assert "cannot be compared" in page.text
    assert "no positive norm" in page.text


@pytest.mark.parametrize(
    "path", ["/models/nothing/checkpoints/0.8/consensus", f"/models/{MODEL}/checkpoints/0.7/consensus"]
)
def test_what_is_not_there_has_no_consensus(registry: Server, path: str) -> None:
    assert httpx2.get(registry.url + path).status_code == 404
