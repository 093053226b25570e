"""Selecting layers through both clients and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gradient_blueprints import Blueprint, Client, ConfigurationError, InvalidRequest
from tests.conftest import Server
from tests.documents import blueprint_document
from tests.sdk.test_cli import Run, blueprints, environment

__all__ = ["blueprints", "environment"]  # fixtures

NORMS = {"head": 6.0, "x": 5.0, "y": 1.0}
SIZES = {"head": 90, "x": 50, "y": 10}


def published() -> dict[str, Any]:
    layers = [{"id": name, "gradient_norm": norm, "parameters": SIZES[name]} for name, norm in NORMS.items()]
    return blueprint_document() | {"layers": layers}


async def test_layers_are_selected_with_numbers_batches_a_blueprint_and_a_file(lab_a: Any, tmp_path: Path) -> None:
    await lab_a.publish_blueprint(published())
    chosen = await lab_a.select_layers("tiny", 0.8, 100, measure="parameters", unit="layer")
    assert {layer.id for layer in chosen.layers if layer.selected} == {"head", "y"}
    blueprint = Blueprint.from_dict(published())
    (tmp_path / "local.json").write_text(blueprint.to_json())
    for local in (NORMS, {name: [norm] for name, norm in NORMS.items()}, blueprint, tmp_path / "local.json"):
        assert (await lab_a.select_layers("tiny", 0.8, 0.1, local)).trust == pytest.approx(0.5)


async def test_a_staleness_check_takes_the_published_sides_say(lab_a: Any) -> None:
    norms = {f"layer.{index}": 1.0 + index for index in range(12)}
    layers = [{"id": name, "gradient_norm": norm, "parameters": 10} for name, norm in norms.items()]
    await lab_a.publish_blueprint(blueprint_document() | {"layers": layers})
    against = {name: [13 - norm] * 12 for name, norm in norms.items()}
    stale = await lab_a.check_staleness("tiny", 0.8, against)
    assert stale.verdict == "stale"
    halves = {
        half: [f"layer.{index}" for index in indices] for half, indices in (("early", range(6)), ("late", (6, 7)))
    }
    assert (await lab_a.select_layers("tiny", 0.8, 0.1, staleness=stale, groups=halves)).trust == 1
    with pytest.raises(InvalidRequest, match="groups name no layer of the blueprint"):
        await lab_a.select_layers("tiny", 0.8, 0.1, staleness=stale, groups={})
    assert (await lab_a.select_layers("tiny", 0.8, 0.1, staleness=stale)).trust == 0


async def test_what_does_not_fit_is_refused(lab_a: Any) -> None:
    await lab_a.publish_blueprint(published())
    for unfit in ({"budget": 2.0}, {"budget": 0.1, "trust": 2}, {"budget": 0.1, "criterion": "absolute"}):
        with pytest.raises(ConfigurationError):
            await lab_a.select_layers("tiny", 0.8, **unfit)
    with pytest.raises(ConfigurationError, match=r"SelectionBudget: a fraction is at most 1, got 10; 10 % is 0\.1"):
        await lab_a.select_layers("tiny", 0.8, 10)
    with pytest.raises(InvalidRequest, match=r"does not pay for one coordinate anywhere: the least that does is 2 "):
        await lab_a.select_layers("tiny", 0.8, 0.1, measure="parameters")
    with pytest.raises(InvalidRequest, match="take 'norm'"):
        await lab_a.select_layers("tiny", 0.8, 0.1, criterion="signal")


def test_the_command_selects_within_shares_parameters_and_bytes(
    blueprints: Run, server: Server, tmp_path: Path
) -> None:
    with Client(server.url, api_key=server.key("lab-a"), cache=False) as client:
        client.publish_blueprint(published())
    local = tmp_path / "local.json"
    local.write_text(json.dumps(NORMS))
    shown = blueprints("select", "tiny", "0.8", "10%", local).stdout
    assert "15 of 150 parameters (10.0%), trust 0.50" in shown
    assert "training memory 240 B, a full AdamW update 1.8 kB" in shown
    for budget in ("100", "1.2KB"):
        answer = json.loads(blueprints("select", "tiny", "0.8", budget, "--whole", "--json").stdout)
        assert answer["selected"] == 100
    blueprints("select", "tiny", "0.8", "much", code=2)
    assert "a share of them is 10%" in blueprints("select", "tiny", "0.8", "0.1", local, code=2).stderr
