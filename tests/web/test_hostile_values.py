"""Whatever users write is text on a page, and whatever number is legal has a page."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx2
import pytest

from gradient_blueprints import Client
from gradient_blueprints.models import Publication
from tests.conftest import Server
from tests.web.conftest import Visitor

ATTACK = """\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7919*7919 }}{% raise %}${7919*7919}&lt;"""
PAGES = [
    "/models/hostile",
    "/models/hostile/checkpoints/0.5",
    "/models/hostile/checkpoints/0.5/versions/1",
    "/models/hostile/checkpoints/0.5?sort=id",
    "/models/hostile/compare?base=0.5@1&other=0.5@2",
    "/models/hostile/checkpoints/0.5/consensus",
]
PICTURES = ["norms.svg", "heatmap.svg", "retained-mass.svg"]


class _Tags(HTMLParser):
    """Elements that a template did not write, and attributes that run something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "script" and not (given.get("src") or "").startswith("/static/"):
            self.found.append(tag)
        if tag == "img" and not (given.get("src") or "").startswith("/"):
            self.found.append(tag)
        self.found += [f"{tag} {name}" for name in given if name.startswith("on") or name == "style"]


def foreign(page: str) -> list[str]:
    parser = _Tags()
    parser.feed(page)
    return parser.found


def hostile_document(norm: float) -> dict[str, Any]:
    layer = {"gradient_norm": norm, "kind": "attention", "depth": 1, "alpha": 9.0, "retained_mass": [[0.1, 0.5]]}
    return {
        "model_id": "hostile",
        "training_checkpoint": 0.5,
        "layers": [
            {"id": ATTACK, **layer, "domain_tags": {"a: b/c.d -e": 0.5}},
            {"id": f"{ATTACK} again", **layer, "gradient_norm": norm / 2},
        ],
        "provenance": {"profiler": ATTACK, "notes": ATTACK, "device": ATTACK, "versions": {"a": ATTACK}},
        "extra": {ATTACK: ATTACK},
    }


def test_what_users_write_stays_text(registry: Server, open_visitor: Callable[..., Visitor], tmp_path: Path) -> None:
    with Client(registry.url, api_key=registry.key("hostile-lab"), cache=tmp_path) as client:
        for norm in (1.0, 2.0):
            digest = client.publish_blueprint(hostile_document(norm)).digest
        client.yank_version("hostile", 0.5, 1, reason=ATTACK)
    with httpx2.Client(base_url=registry.url) as http:
        for path in [*PAGES, f"/blueprints/{digest}"]:
            answer = http.get(path)
            assert (path, answer.status_code, foreign(answer.text)) == (path, 200, [])
            assert "62710561" not in answer.text  # 7919 squared: no template was made of it
        for address in ("/", "/nowhere/", "/models/"):
            page = http.get(address, params={"q": ATTACK}, headers={"Accept": "text/html"}).text
            assert foreign(page) == []
        for path in (f"/nowhere/{ATTACK}", f"/models/{ATTACK}", f"/static/x/{ATTACK}"):
            page = http.get(path.replace("%", "%25"), headers={"Accept": "text/html"}).text
            assert "<h1>" in page
            assert foreign(page) == []
        for picture in PICTURES:
            drawing = ElementTree.fromstring(http.get(f"/blueprints/{digest}/pictures/{picture}").content)
            assert [element.tag for element in drawing.iter() if element.tag.endswith("script")] == []
    visitor = open_visitor(registry.url)
    for path in PAGES:
        shown = visitor.visit(path)
        assert ATTACK in shown.inner_text("main") or path == "/models/hostile", path
        assert visitor.faults == []


EXTREMES = {
    "zeros": [0.0, 0.0],
    "ends": [1.7976931348623157e308, 1e300, 0.0, 1.0, 1e-310, 5e-324],
    "far-apart": [5e-324, 1.7976931348623157e308],
    "alone": [0.1],
}


@pytest.mark.parametrize("name", EXTREMES)
def test_every_legal_number_has_its_pages_and_pictures(
    registry: Server, publish: Callable[..., Publication], name: str
) -> None:
    for lab, factor in (("lab-a", 1.0), ("lab-b", 0.5)):
        layers = [
            {
                "id": f"layer.{number}",
                "gradient_norm": norm * factor,
                "gradient_norm_ci": [norm * factor / 2, norm * factor],
                "kind": "attention",
                "depth": number * 1_000,
                "retained_mass": [[0.0, 0.0], [1.0, 1.0]],
            }
            for number, norm in enumerate(EXTREMES[name])
        ]
        document = {"model_id": name, "training_checkpoint": 1.0, "layers": layers}
        digest = publish(lab, document).digest
    paths = [
        f"/models/{name}",
        f"/models/{name}/checkpoints/1",
        f"/models/{name}/compare?base=1@1&other=1@2",
        f"/models/{name}/checkpoints/1/consensus",
        f"/pictures/comparison.svg?model_id={name}&base=1@1&other=1@2",
        f"/pictures/consensus.svg?model_id={name}&checkpoint=1",
        *(f"/blueprints/{digest}/pictures/{picture}" for picture in PICTURES),
    ]
    with httpx2.Client(base_url=registry.url) as http:
        assert [path for path in paths if http.get(path).status_code != 200] == []
