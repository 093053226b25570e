"""Spectrum's ratios as blueprints: kept, found again, never taken for gradients."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint
from gradient_blueprints.training.bridges.spectrum import from_spectrum, spectrum_choice, spectrum_ratios
from gradient_blueprints.training.selection import select

# As snr_results_HuggingFaceTB-SmolLM-135M.json of cognitivecomputations/spectrum writes them, and one NaN.
FILE = """{
    "model.layers.0.input_layernorm": {"snr": Infinity, "type": "input_layernorm"},
    "lm_head": {"snr": 8.281196594238281, "type": "lm_head"},
    "model.layers.0.mlp.down_proj": {"snr": 0.34814128279685974, "type": "mlp.down_proj"},
    "model.layers.1.mlp.down_proj": {"snr": 0.17390966415405273, "type": "mlp.down_proj"},
    "model.layers.2.mlp.down_proj": {"snr": NaN, "type": "mlp.down_proj"},
    "model.layers.3.mlp.down_proj": {"snr": 0.2220461070537567, "type": "mlp.down_proj"}
}"""


@pytest.fixture
def imported(tmp_path: Path) -> Blueprint:
    path = tmp_path / "snr_results_SmolLM-135M.json"
    path.write_text(FILE)
    return from_spectrum(path, "smollm-135m")


def test_ratios_come_back_as_they_were(imported: Blueprint) -> None:
    wanted = {name: entry["snr"] for name, entry in json.loads(FILE).items() if not math.isnan(entry["snr"])}
    assert spectrum_ratios(imported) == wanted
    again = Blueprint.from_json(imported.to_json())
    assert again.digest == imported.digest
    assert spectrum_ratios(again) == wanted


def test_no_gradient_is_claimed(imported: Blueprint) -> None:
    assert {layer.gradient_norm for layer in imported.layers} == {0.0}
    assert imported.statistic is None
    assert imported.provenance is not None
    assert "no gradient" in str(imported.provenance.notes)
    shares = {layer.share for layer in select(Blueprint.from_dict(sized(imported))).layers}
    assert shares == {1 / 6}


def sized(blueprint: Blueprint) -> dict[str, object]:
    return blueprint.to_dict() | {"layers": [layer | {"parameters": 10} for layer in blueprint.to_dict()["layers"]]}


def test_the_choice_is_spectrums_own_the_best_of_each_type(imported: Blueprint) -> None:
    assert spectrum_choice(imported, 0.67) == ["model.layers.0.mlp.down_proj", "model.layers.3.mlp.down_proj"]
    assert len(spectrum_choice(imported, 1.0)) == 5


@pytest.mark.parametrize("fraction", [25, 0, -0.25, math.nan])
def test_a_percentage_is_no_fraction(imported: Blueprint, fraction: float) -> None:
    with pytest.raises(ConfigurationError, match=r"a quarter 0\.25"):
        spectrum_choice(imported, fraction)


def test_the_sorted_form_is_read_too() -> None:
    data = {"mlp.down_proj": {"model.layers.3.mlp.down_proj": 1.08, "model.layers.2.mlp.down_proj": 1.07}}
    blueprint = from_spectrum(data, "m")
    assert spectrum_ratios(blueprint)["model.layers.2.mlp.down_proj"] == 1.07
    assert spectrum_choice(blueprint, 0.5) == ["model.layers.3.mlp.down_proj"]


@pytest.mark.parametrize("data", [{"a": 1.0}, {"a": {"snr": "high", "type": "b"}}, {"a": {"snr": 1.0}}])
def test_another_file_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="Spectrum"):
        from_spectrum(data, "m")


def test_a_blueprint_of_gradients_has_no_ratios() -> None:
    with pytest.raises(ConfigurationError, match="from_spectrum"):
        spectrum_ratios(Blueprint(model_id="m", training_checkpoint=1, layers=[{"id": "a", "gradient_norm": 1.0}]))
