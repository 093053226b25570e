"""While a page or a picture is made, however long that takes, the database's connections are for others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from app.api import representations
from app.web import blueprints, comparison, consensus, drawings
from tests.conftest import Server, fresh_database, make_settings, serving
from tests.documents import blueprint_document


@pytest.fixture(scope="module")
def one_connection(
    postgres_url: str, template_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server with a single connection to its database, and two versions of a checkpoint."""
    with fresh_database(postgres_url, template_database) as url:
        settings = make_settings(url, tmp_path_factory.mktemp("one_connection"))
        with serving(settings.model_copy(update={"pool_size": 1, "pool_overflow": 0})) as server:
            for lab in ("lab-a", "lab-b"):
                httpx2.post(
                    f"{server.url}/v1/blueprints",
                    json=blueprint_document("tiny", 0.5, norm=1 if lab == "lab-a" else 2),
                    headers={"Authorization": f"Bearer {server.key(lab)}"},
                    timeout=60,
                ).raise_for_status()
            yield server


@pytest.mark.parametrize(
    ("module", "step", "path"),
    [
        (blueprints, "arrange", "/models/tiny/checkpoints/0.5"),
        (comparison, "arrange", "/models/tiny/compare?base=0.5@1&other=0.5@2"),
        (consensus, "arrange", "/models/tiny/checkpoints/0.5/consensus"),
        (drawings, "draw_norms", "{blueprint}/pictures/norms.svg"),
        (drawings, "draw_comparison", "/pictures/comparison.svg?model_id=tiny&base=0.5@1&other=0.5@2"),
        (drawings, "draw_norms", "/pictures/consensus.svg?model_id=tiny&checkpoint=0.5"),
        (representations, "encode", "{blueprint}/csv"),
    ],
)
def test_others_reach_the_database_meanwhile(
    one_connection: Server, monkeypatch: pytest.MonkeyPatch, module: Any, step: str, path: str
) -> None:
    made: Callable[..., Any] = getattr(module, step)
    others: list[int] = []

    def interrupted(*arguments: Any, **named: Any) -> Any:
        others.append(httpx2.get(f"{one_connection.url}/v1/models", timeout=5).status_code)
        return made(*arguments, **named)

    monkeypatch.setattr(module, step, interrupted)
    with httpx2.Client(base_url=one_connection.url, timeout=60) as http:
        digest = http.get("/v1/models/tiny/checkpoints/0.5/versions").json()["versions"][0]["digest"]
        assert http.get(path.format(blueprint=f"/blueprints/{digest}")).status_code == 200
    assert others == [200]
