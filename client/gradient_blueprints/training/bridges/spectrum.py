"""Spectrum's signal-to-noise ratios as blueprints, without passing them off as gradients."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint


def from_spectrum(source: str | Path | Mapping[str, Any], model_id: str, training_checkpoint: float = 1.0) -> Blueprint:
    """A file of Spectrum's signal-to-noise ratios as a blueprint that says no more than it does.

    Spectrum (Hartford et al. 2024) writes `{module: {"snr": number, "type": text}}`, or sorted `{type: {module: snr}}`
    (cognitivecomputations/spectrum, spectrum.py and model_snr_results/). The ratio is one of singular values of a
    *weight*: no gradient was measured, so every `gradient_norm` is 0, which the registry stores with the warning
    `no_positive_norm` and which `select` reads as "nothing tells the layers apart". The ratios are under
    `extra.spectrum`, for `spectrum_ratios` and `spectrum_choice`; vectors, for which Spectrum writes Infinity, and
    what it could not measure (NaN) stand in lists of their own, since JSON has neither.
    """
    data = source if isinstance(source, Mapping) else json.loads(Path(source).read_text(encoding="utf-8"))
    entries: dict[str, tuple[float, str]] = {}
    try:
        for key, member in data.items():
            if "snr" in member:
                entries[key] = float(member["snr"]), str(member["type"])
            else:
                entries.update({name: (float(snr), key) for name, snr in member.items()})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"This is not a file of Spectrum's ratios, {{module: {{snr, type}}}}: {error!r}"
        ) from None
    extra = {
        "snr": {name: snr for name, (snr, _) in entries.items() if math.isfinite(snr)},
        "infinite": [name for name, (snr, _) in entries.items() if math.isinf(snr)],
        "unmeasured": [name for name, (snr, _) in entries.items() if math.isnan(snr)],
        "type": {name: kind for name, (_, kind) in entries.items()},
    }
    notes = "Signal-to-noise ratios of the weights by Spectrum, in extra.spectrum; no gradient was measured."
    return Blueprint.from_dict(
        {
            "model_id": model_id,
            "training_checkpoint": training_checkpoint,
            "layers": [{"id": name, "gradient_norm": 0.0} for name in entries],
            "provenance": {"profiler": "Spectrum (weights only)", "notes": notes},
            "extra": {"spectrum": extra},
        }
    )


def spectrum_ratios(blueprint: Blueprint) -> dict[str, float]:
    """Module → signal-to-noise ratio, infinite ones too; without those that could not be measured."""
    found: Any = _spectrum(blueprint)
    return dict(found["snr"]) | dict.fromkeys(found["infinite"], math.inf)


def spectrum_choice(blueprint: Blueprint, fraction: float) -> list[str]:
    """The modules that Spectrum itself would train: the `fraction` with the largest ratio among those of each type.

    Its YAML file adds embedding and head to them, whatever their ratio. For `unfrozen_parameters` as they are.
    """
    if not 0 < fraction <= 1:
        raise ConfigurationError(f"fraction = {fraction} is a share in (0, 1], a quarter 0.25")
    ratios, types = spectrum_ratios(blueprint), _spectrum(blueprint)["type"]
    by_type: dict[str, list[str]] = {}
    for name in ratios:
        by_type.setdefault(types[name], []).append(name)
    return [
        name
        for names in by_type.values()
        for name in sorted(names, key=lambda name: -ratios[name])[: int(len(names) * fraction + 1e-9)]
    ]


def _spectrum(blueprint: Blueprint) -> Any:
    found = (blueprint.extra or {}).get("spectrum")
    if not isinstance(found, Mapping):
        raise ConfigurationError("This blueprint holds no ratios of Spectrum; from_spectrum makes one that does.")
    return found
