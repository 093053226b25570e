"""The dashboard asks for what the processes tell, and for all of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from app import relay_metrics
from app.api.metrics import Metrics
from worker import metrics as worker_metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
NAME = re.compile(r"\b(blueprints_\w+?)(?:_(?:total|bucket|count|sum|created))?(?=[{\[)\s]|$)")
LABELS = re.compile(r"(\w+)(?==~?\"|!~\")|by \(([^)]*)\)")


def queries() -> list[str]:
    dashboard: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def told() -> dict[str, set[str]]:
    """The labels of every metric of every process."""
    registries: list[CollectorRegistry] = [Metrics().registry, relay_metrics.REGISTRY, worker_metrics.REGISTRY]
    collectors = [collector for registry in registries for collector in registry._names_to_collectors.values()]
    return {str(collector._name): set(collector._labelnames) for collector in collectors}  # type: ignore[attr-defined]


def test_every_metric_that_the_dashboard_asks_for_exists_and_every_one_is_shown() -> None:
    asked = {name for query in queries() for name in NAME.findall(query)}
    assert asked == set(told())


def test_every_label_that_the_dashboard_names_exists() -> None:
    known = told()
    unknown = set()
    for query in queries():
        names = set(NAME.findall(query))
        allowed = set.union(*(known[name] for name in names)) | {"le", "instance"}
        labels = {label.strip() for one, several in LABELS.findall(query) for label in (one or several).split(",")}
        unknown |= labels - allowed
    assert unknown == set()


def test_panels_have_ids_and_places_of_their_own() -> None:
    panels = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
